"""The specs of all methods, their scales and ranks, and what the specs forbid."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch

from conftest import set_all
from fedsb.adapters.basis import Basis
from fedsb.config.load import load_config
from fedsb.config.registry import GROUP, build_method
from fedsb.methods.control import control_options
from fedsb.protocol.requirements import fitting_rank
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.estimate import estimate
from fedsb.runs.run import federate
from fedsb.utils.errors import UserError

OURS = {point.name: point.load() for point in entry_points(group=GROUP) if point.value.startswith("fedsb.")}
SHAPES = {"up": (20, 10), "down": (10, 20)}


# adapter, exact, secagg_compatible, changes_base, mixed_ranks, dp_noise, global_model, as the specification has them
SPEC = {
    "fed-sb": ("core", True, True, False, True, "linear", True),
    "fed-sb-personal": ("core", False, True, False, True, "linear", True),
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
def test_specs_are_those_of_the_table(name: str) -> None:
    s = OURS[name].spec
    spec = (s.adapter, s.exact, s.secagg_compatible, s.changes_base, s.mixed_ranks, s.dp_noise, s.global_model)
    assert spec == SPEC[name]


@pytest.mark.parametrize("name", sorted(OURS))
def test_specs_are_complete(name: str) -> None:
    cls = OURS[name]
    spec = cls.spec
    assert spec.id == name
    assert spec.adapter in ("core", "factors", None)
    assert spec.dp_noise in ("linear", "quadratic")
    for field in (
        "exact",
        "aggregates",
        "secagg_compatible",
        "changes_base",
        "mixed_ranks",
        "global_model",
        "own_models",
        "pools_data",
        "rotates_basis",
        "supports_server_optimizer",
    ):
        assert isinstance(getattr(spec, field), bool), field
    assert spec.travels and spec.client_state
    assert re.search(r"arXiv \d{4}\.\d{5}|^a control", spec.paper)


@pytest.mark.parametrize("name", sorted(OURS))
def test_the_properties_of_a_spec_agree(name: str) -> None:
    """A method with a residual needs every client's factors; one whose clients keep a model has none in common."""
    spec = OURS[name].spec
    if spec.changes_base:
        assert not spec.secagg_compatible
    if spec.own_models:
        assert spec.client_state != "nothing"
        assert not spec.exact
    assert spec.global_model or spec.own_models
    if spec.adapter == "core":
        assert spec.dp_noise == "linear"
    up = OURS[name]().traffic(SHAPES, head=3, clients=1)
    more = OURS[name]().traffic(SHAPES, head=3, clients=9)
    assert more.up == up.up  # what a client sends does not depend on the others
    assert (more.down > up.down) == spec.changes_base  # but what comes down does, where it is a residual of all


def test_scales_and_ranks() -> None:
    """fed-sb: s = 1 and h r directions; fedit: s = alpha / r, 2 by default; a control trains as another method."""
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
        trained.append({key: tuple(own[key].shape) for key in own if not key.endswith(".P")})  # a client's own core
    assert trained[0] == trained[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 6.0}, "method: alpha scales LoRA's two factors"),
        ({"adapter": "factors", "blocks": 2}, "method: blocks, tied and scalars belong to a core"),
        (
            {"adapter": "factors", "scalars": True},
            "method: blocks, tied and scalars belong to a core",
        ),
    ],
)
def test_a_control_refuses_options_of_the_other_adapter(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config({"method": {"name": "central", **options}})


# --- what the specs forbid ---


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            "fedex-lora",
            {"server": {"optimizer": "adam"}},
            "fedex-lora does not take a plain mean .its fact supports_server_optimizer",
        ),
        ("flora", {"server": {"codec": "int8"}}, "server.codec = 'int8': what flora adds to the base"),
        ("fedsvd", {"train": {"local_steps": 2, "persist_optimizer_state": True}}, "the coordinates of fedsvd turn"),
        (
            "fedit",
            {"clients": {"total_ranks": [1, 2]}},
            "all clients of fedit have one rank .its fact mixed_ranks is false",
        ),
        ("flora", {"clients": {"total_ranks": [1], "memory_mib": [1]}}, "both set the ranks"),
        (
            "flora",
            {"clients": {"count": 3, "total_ranks": [1, 9]}},
            "the total rank 9 with flora. Choose at most 4",
        ),
        (
            "flora",
            {"clients": {"count": 3, "total_ranks": {"client-9": 1}}},
            "names the client 'client-9'; did you mean",
        ),
        ("flora", {"clients": {"count": 3, "memory_mib": [1e-6]}}, "hold not even the smallest rank"),
        (
            "ravan",
            {"clients": {"count": 3, "total_ranks": [3]}},
            "3 with ravan, which trains whole blocks. Choose a multiple of 2",
        ),
    ],
)
def test_what_the_spec_forbids_is_refused(
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
