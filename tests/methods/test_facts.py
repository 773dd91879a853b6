"""What methods say of themselves, and how a name becomes a method, third parties' included."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar

import pytest
import torch

import fedsb.methods
from conftest import set_all
from fedsb.adapters.basis import Basis
from fedsb.config.load import load_config
from fedsb.methods import GROUP, build_method, method_type, method_types
from fedsb.methods.base import Method, MethodSpec
from fedsb.methods.control import control_options
from fedsb.methods.fed_sb import FedSB
from fedsb.planning.estimate import estimate
from fedsb.protocol.prices import price_list
from fedsb.protocol.requirements import fitting_rank
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.run import federate
from fedsb.utils.errors import ConfigError, UserError

OURS = {point.name: point.load() for point in entry_points(group=GROUP) if point.value.startswith("fedsb.")}
SHAPES = {"up": (20, 10), "down": (10, 20)}


# adapter, exact, secagg_compatible, changes_base, mixed_ranks, dp_noise, global_model, as the specification has them
SPEC = {
    "fed-sb": ("core", True, True, False, True, "linear", True),
    "ravan": ("core", True, True, False, True, "linear", True),
    "fedit": ("factors", False, True, False, False, "quadratic", True),
    "ffa-lora": ("factors", True, True, False, False, "linear", True),
    "rolora": ("factors", True, True, False, False, "linear", True),
    "fedsa-lora": ("factors", False, True, False, False, "linear", False),
    "fedex-lora": ("factors", True, False, True, False, "quadratic", True),
    "flora": ("factors", True, False, True, True, "quadratic", True),
    "flexlora": ("factors", False, False, False, True, "quadratic", True),
    "hetlora": ("factors", False, False, False, True, "quadratic", True),
    "flora-na": ("factors", False, False, False, False, "quadratic", True),
    "fedsvd": ("factors", True, True, False, False, "linear", True),
    "fedrot-lora": ("factors", False, True, False, False, "quadratic", True),
    "local": (None, False, True, False, False, "linear", False),
    "central": (None, True, True, False, False, "linear", True),
}


@pytest.mark.parametrize("name", sorted({*OURS, *SPEC}))
def test_facts_say_what_the_spec_says(name: str) -> None:
    f = OURS[name].spec
    facts = (f.adapter, f.exact, f.secagg_compatible, f.changes_base, f.mixed_ranks, f.dp_noise, f.global_model)
    assert facts == SPEC[name]


@pytest.mark.parametrize("name", sorted(OURS))
def test_facts_are_complete(name: str) -> None:
    cls = OURS[name]
    facts = cls.spec
    assert facts.id == name
    assert facts.adapter in ("core", "factors", None)
    assert facts.dp_noise in ("linear", "quadratic")
    for field in (
        "exact",
        "secagg_compatible",
        "changes_base",
        "mixed_ranks",
        "global_model",
        "pools_data",
        "rotates_basis",
        "supports_server_optimizer",
    ):
        assert isinstance(getattr(facts, field), bool), field
    assert facts.travels and facts.client_state
    assert re.search(r"arXiv \d{4}\.\d{5}|^a control", facts.paper)
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(OURS))
def test_facts_agree_with_each_other(name: str) -> None:
    """A method with a residual needs every client's factors; one whose clients keep a model has none in common."""
    facts = OURS[name].spec
    if facts.changes_base:
        assert not facts.secagg_compatible
    if not facts.global_model:
        assert facts.client_state != "nothing"
        assert not facts.exact
    if facts.adapter == "core":
        assert facts.dp_noise == "linear"
    up = OURS[name]().traffic(SHAPES, head=3, clients=1)
    more = OURS[name]().traffic(SHAPES, head=3, clients=9)
    assert more.up == up.up  # what a client sends does not depend on the others
    assert (more.down > up.down) == facts.changes_base  # but what comes down does, where it is a residual of all


def test_scales_and_ranks() -> None:
    """fed-sb: s = 1 and h r directions; fedit: s = alpha / r, 2 unless set; a control has its twin's."""
    build = build_method
    assert (build("fed-sb", {"rank": 4, "blocks": 3}).scale, build("fed-sb", {"rank": 4, "blocks": 3}).total_rank) == (
        1,
        12,
    )
    assert (build("fedit", {"rank": 4}).scale, build("fedit", {"rank": 4, "alpha": 6}).scale) == (2, 1.5)
    assert build("fedit", {"rank": 4, "alpha": 6}).total_rank == 4
    assert build("central", {"adapter": "factors"}).scale == 2 and build("local", {}).scale == 1
    assert build("central", {"adapter": "factors", "rank": 4, "alpha": 6}).scale == 1.5
    assert build("local", {"rank": 4, "blocks": 3}).total_rank == 12


@pytest.mark.parametrize("name", [name for name in OURS if OURS[name].spec.adapter is not None])
@pytest.mark.parametrize("control", ["central", "local"])
def test_the_control_of_a_method_has_its_adapter(control: str, name: str) -> None:
    """The same scale, number of directions and trained tensors, at settings that are no defaults."""
    options = {"rank": 3, "blocks": 2} if OURS[name].spec.adapter == "core" else {"rank": 3, "alpha": 7.5}
    method = build_method(name, options)
    built = build_method(control, control_options(method))
    assert (built.adapter, built.scale, built.rank, built.total_rank) == (
        method.adapter,
        method.scale,
        method.rank,
        method.total_rank,
    )
    basis = None
    if method.adapter == "core":
        A = {layer: torch.zeros(6, n) for layer, (_, n) in SHAPES.items()}
        basis = Basis(kind="random", A=A, B={layer: torch.zeros(m, 6) for layer, (m, _) in SHAPES.items()})
    trained = []
    for each in (method, built):
        state = each.start(SHAPES, basis, {}, 0)
        own = each.init_client(state.shared, each.broadcast(state), {}, 0)
        trained.append({key: tuple(own[key].shape) for key in own})
    assert trained[0] == trained[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 6.0}, "method.alpha scales LoRA's two factors"),
        ({"adapter": "factors", "blocks": 2}, "method.blocks and method.scalars are of a core"),
        ({"adapter": "factors", "scalars": True}, "method.blocks and method.scalars are of a core"),
    ],
)
def test_a_control_refuses_options_of_the_other_adapter(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config({"method": {"name": "central", **options}})


@pytest.mark.parametrize(("wrong", "right"), [("fedsb", "fed-sb"), ("fed_it", "fedit"), ("Local", "local")])
def test_an_unknown_method_gets_the_nearest_name_and_the_list(wrong: str, right: str) -> None:
    with pytest.raises(UserError, match=f"unknown method '{wrong}'; did you mean '{right}'") as caught:
        method_type(wrong)
    assert all(name in str(caught.value) for name in OURS)


# --- what facts forbid ---


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            "fedex-lora",
            {"server": {"optimizer": "adam"}},
            "fedex-lora does not take a plain mean .its fact supports_server_optimizer",
        ),
        ("fedsvd", {"train": {"local_steps": 2, "persist_optimizer_state": True}}, "the coordinates of fedsvd turn"),
        (
            "fedit",
            {"clients": {"total_ranks": [1, 2]}},
            "all clients of fedit have one rank .its fact mixed_ranks is false",
        ),
        ("flora", {"clients": {"total_ranks": [1], "memory_mib": [1]}}, "both set the ranks"),
        ("flora", {"clients": {"count": 3, "total_ranks": [1, 9]}}, "a client's rank of 9: the federation's is 4"),
        (
            "flora",
            {"clients": {"count": 3, "total_ranks": {"client-9": 1}}},
            "names the client 'client-9'; did you mean",
        ),
        ("flora", {"clients": {"count": 3, "memory_mib": [1e-6]}}, "hold not even the smallest rank"),
        ("ravan", {"clients": {"count": 3, "total_ranks": [3]}}, "it must be some of the 4 blocks of 2"),
    ],
)
def test_what_the_facts_forbid_is_refused(
    tiny_config: dict[str, Any], method: str, settings: dict[str, Any], message: str
) -> None:
    config = load_config(
        set_all(tiny_config, **{"method": {"name": method, "rank": 2 if method == "ravan" else 4}, **settings})
    )
    for refuses in (lambda: federate(config), lambda: estimate(config)):
        with pytest.raises(UserError, match=message):
            refuses()


def test_ranks_by_memory() -> None:
    """flora at (20 x 10) and (10 x 20): 60 values a rank, 16 bytes each: 960 bytes a rank."""
    assert fitting_rank(build_method("flora", {"rank": 8}), SHAPES, 4 * 960 + 959, "c") == 4
    assert fitting_rank(build_method("ravan", {"rank": 2, "blocks": 4}), SHAPES, 16 * 2 * 4 * 3, "c") == 6


@pytest.mark.parametrize(
    ("method", "ranks"),
    [
        ({"name": "fed-sb", "rank": 4}, {"site 0": 2, "site 2": 3}),
        ({"name": "ravan", "rank": 2, "blocks": 3}, {"site 0": 4}),
        ({"name": "hetlora", "rank": 4, "gamma": 0.5}, {"site 1": 2}),
        ({"name": "flora", "rank": 4}, {"site 1": 1}),
    ],
)
def test_a_run_of_mixed_ranks(tiny_config: dict[str, Any], method: dict[str, Any], ranks: dict[str, int]) -> None:
    """Smaller clients send less, and the run ends with an adapter that PEFT loads."""
    config = set_all(tiny_config, method=method, clients={**tiny_config["clients"], "total_ranks": ranks})
    finished = federate(load_config(config))
    rows = read_rows(finished.folder / "traffic.jsonl")
    up = {row["client"]: row["values"] for row in rows if row["direction"] == "up" and row["round"] == 1}
    assert max(up[name] for name in ranks) < min(value for name, value in up.items() if name not in ranks)
    assert finished.score is not None


# --- third parties ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfSB(FedSB):
    """A third party's: fed-sb under another name, with an option."""

    spec: ClassVar[MethodSpec] = dataclasses.replace(FedSB.spec, id="half-sb", paper="theirs")
    share: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Silent(Method):
    rank: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoStart(Method):
    spec: ClassVar[MethodSpec] = dataclasses.replace(FedSB.spec, id="theirs")
    rank: int = 1
    traffic = FedSB.traffic
    trainable = FedSB.trainable


class Thawed(NoStart):
    """Its options would be lost: a subclass that is no dataclass of its own still reads as one."""

    start = FedSB.start


def no_method() -> None: ...


@pytest.fixture
def announce(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`announce(name, value)` adds an entry point to ours."""
    real = list(entry_points(group=GROUP))
    extra: list[EntryPoint] = []

    def add(name: str, value: str) -> None:
        extra.append(EntryPoint(name, value, GROUP))

    monkeypatch.setattr(fedsb.methods, "entry_points", lambda group: [*real, *extra])
    method_types.cache_clear()
    yield add
    method_types.cache_clear()


def test_a_third_partys_method_is_known_priced_and_runs(announce: Any, tiny_config: dict[str, Any]) -> None:
    announce("half-sb", f"{__name__}:HalfSB")
    assert build_method("half-sb", {"rank": 4, "share": 0.1}) == HalfSB(rank=4, share=0.1)
    labels = [p.label for p in price_list(FedSB(rank=4), SHAPES, head=0, clients=2, rounds=1, basis=None, sites=2)]
    assert "half-sb (rank 32)" in labels
    with pytest.raises(ConfigError, match="did you mean 'share'"):
        load_config(set_all(tiny_config, method={"name": "half-sb", "shares": 0.1}))
    config = load_config(set_all(tiny_config, rounds=1, method={"name": "half-sb", "rank": 3, "share": 0.2}))
    assert federate(config).score is not None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("theirs", "{here}:no_method", r"entry point 'theirs' \(.*no_method\) is no fedsb.methods.base.Method"),
        ("theirs", "{here}:Silent", "is no fedsb.methods.base.Method with a spec"),
        ("theirs", "{here}:NoStart", "does not define start, which every method must"),
        ("theirs", "{here}:Thawed", "is no frozen dataclass"),
        ("theirs", "{here}:HalfSB", "names a method whose id is 'half-sb'"),
        ("theirs", "{here}:Nothing", "cannot be loaded"),
        ("theirs", "no_such_package.x:Y", "cannot be loaded: No module named 'no_such_package'"),
    ],
)
def test_a_broken_entry_point_is_named(announce: Any, name: str, value: str, message: str) -> None:
    announce(name, value.format(here=__name__))
    with pytest.raises(UserError, match=message):
        method_type("fed-sb")


def test_two_entry_points_of_one_name_are_refused(announce: Any) -> None:
    """Else the last one found would quietly stand in for the other."""
    announce("fed-sb", "fedsb.methods.fed_sb:FedSB")  # installed twice: the same, and fine
    assert method_type("fed-sb") is FedSB
    method_types.cache_clear()
    announce("fed-sb", f"{__name__}:Impostor")
    with pytest.raises(UserError, match=r"'fed-sb'.*another"):
        method_type("fed-sb")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Impostor(FedSB):
    spec: ClassVar[MethodSpec] = FedSB.spec


def test_methods_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FedSB().rank = 3  # type: ignore[misc]
