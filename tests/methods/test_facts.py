"""What methods say of themselves, and how a name becomes a method, third parties' included."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar

import pytest

import fedsb.methods
from conftest import set_all
from fedsb.config import load_config
from fedsb.errors import ConfigError, UserError
from fedsb.federation.prices import price_list
from fedsb.methods import GROUP, build_method, method_type, method_types, priced_types
from fedsb.methods.contract import Facts, Method
from fedsb.methods.fed_sb import FedSB
from fedsb.run import federate

OURS = {point.name: point.load() for point in entry_points(group=GROUP) if point.value.startswith("fedsb.")}
KNOWN = {**priced_types(), **OURS}
SHAPES = {"up": (20, 10), "down": (10, 20)}


def test_ours_are_announced_and_priced() -> None:
    assert set(OURS) == {"fed-sb", "fedit", "local", "central"}
    assert set(priced_types()) - set(OURS) == {"ffa-lora", "fedex-lora", "flora"}


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_facts_are_complete(name: str) -> None:
    cls = KNOWN[name]
    facts = cls.facts
    assert facts.id == name
    assert facts.adapter in ("core", "factors", None)
    assert facts.dp_noise in ("linear", "quadratic")
    for field in ("exact", "sum_only", "changes_base", "mixed_ranks", "global_model", "pools_data", "trainable_here"):
        assert isinstance(getattr(facts, field), bool), field
    assert facts.travels and facts.client_state
    assert re.search(r"arXiv \d{4}\.\d{5}|^a control", facts.paper)
    assert facts.trainable_here == (name in method_types())
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_facts_agree_with_each_other(name: str) -> None:
    """A method with a residual needs every client's factors; one whose clients keep a model has none in common."""
    facts = KNOWN[name].facts
    if facts.changes_base:
        assert not facts.sum_only
    if not facts.global_model:
        assert facts.client_state != "nothing"
        assert not facts.exact
    if facts.adapter == "core":
        assert facts.dp_noise == "linear"
    up = KNOWN[name]().traffic(SHAPES, head=3, clients=1)
    more = KNOWN[name]().traffic(SHAPES, head=3, clients=9)
    assert more.up == up.up  # what a client sends does not depend on the others
    assert (more.down > up.down) == (not facts.sum_only)  # but what comes down does, where each one's factors do


@pytest.mark.parametrize("name", sorted(set(OURS)))
def test_facts_say_what_the_spec_says(name: str) -> None:
    wanted = {
        "fed-sb": ("core", True, True, "linear"),
        "fedit": ("factors", False, True, "quadratic"),
        "local": (None, False, True, "linear"),
        "central": (None, True, True, "linear"),
    }
    facts = OURS[name].facts
    assert (facts.adapter, facts.exact, facts.sum_only, facts.dp_noise) == wanted[name]


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


@pytest.mark.parametrize(("wrong", "right"), [("fedsb", "fed-sb"), ("fed_it", "fedit"), ("Local", "local")])
def test_an_unknown_method_gets_the_nearest_name_and_the_list(wrong: str, right: str) -> None:
    with pytest.raises(UserError, match=f"unknown method '{wrong}'; did you mean '{right}'") as caught:
        method_type(wrong)
    assert all(name in str(caught.value) for name in OURS)


@pytest.mark.parametrize("name", ["flora", "fedex-lora", "ffa-lora"])
def test_a_priced_method_is_not_trained(name: str, tiny_config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"'{name}' can be priced but not trained in this version.*fed-sb"):
        build_method(name, {})
    with pytest.raises(ConfigError, match="can be priced but not trained"):
        load_config(set_all(tiny_config, method={"name": name}))


# --- third parties ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfSB(FedSB):
    """A third party's: fed-sb under another name, with an option."""

    facts: ClassVar[Facts] = dataclasses.replace(FedSB.facts, id="half-sb", paper="theirs")
    share: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Silent(Method):
    rank: int = 1


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
        ("theirs", "{here}:no_method", r"entry point 'theirs' \(.*no_method\) is no fedsb.methods.contract.Method"),
        ("theirs", "{here}:Silent", "is no fedsb.methods.contract.Method with facts"),
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
    facts: ClassVar[Facts] = FedSB.facts


def test_methods_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FedSB().rank = 3  # type: ignore[misc]
