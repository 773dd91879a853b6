"""How a name becomes a method, those of third parties included."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar

import pytest
from pydantic import Field, ValidationError

from conftest import set_all
from fedsb.config import registry
from fedsb.config.load import load_config
from fedsb.config.registry import GROUP, build_method, method_type, method_types
from fedsb.config.section import Positive
from fedsb.methods.base import Method, MethodSpec, State
from fedsb.methods.fed_sb import FedSB
from fedsb.protocol.prices import PricedBasis, PricedRun, price_list
from fedsb.runs.run import federate
from fedsb.utils.errors import ConfigError, UserError

OURS = {point.name for point in entry_points(group=GROUP) if point.value.startswith("fedsb.")}
SHAPES = {"up": (20, 10), "down": (10, 20)}


@pytest.mark.parametrize(("wrong", "right"), [("fedsb", "fed-sb"), ("fed_it", "fedit"), ("Local", "local")])
def test_an_unknown_method_gets_the_nearest_name_and_the_list(wrong: str, right: str) -> None:
    with pytest.raises(UserError, match=f"unknown method '{wrong}'; did you mean '{right}'") as caught:
        method_type(wrong)
    assert all(name in str(caught.value) for name in OURS)


def test_methods_are_frozen_and_checked() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        FedSB().rank = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="rank"):
        FedSB(rank=0)
    with pytest.raises(ValidationError, match="rnk"):
        build_method("fed-sb", {"rnk": 4})


def test_a_method_names_itself_in_its_dump() -> None:
    method = build_method("ravan", {"rank": 2})
    assert method.model_dump() == {"name": "ravan", "rank": 2, "blocks": 4, "tied": False, "scalars": True}
    assert load_config({"method": method.model_dump()}).config.method == method


# --- third parties ---


class HalfSB(FedSB):
    """A third party's method: fed-sb under another name, with an option."""

    spec: ClassVar[MethodSpec] = dataclasses.replace(FedSB.spec, id="half-sb", paper="theirs")
    share: float = Field(0.5, gt=0, description="An option.")


class WithoutDefault(FedSB):
    """A third party's method with an option that has no default."""

    spec: ClassVar[MethodSpec] = dataclasses.replace(FedSB.spec, id="without-default", paper="theirs")
    share: float


class WithoutSpec(Method):
    rank: Positive = 1


class NoStart(Method):
    spec: ClassVar[MethodSpec] = dataclasses.replace(FedSB.spec, id="theirs")
    rank: Positive = 1
    traffic = FedSB.traffic
    trainable = FedSB.trainable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decorated(FedSB):
    spec: ClassVar[MethodSpec] = dataclasses.replace(FedSB.spec, id="theirs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outdated:
    """A class as the last version's contract asked for."""

    facts: ClassVar[Any] = None
    rank: int = 4

    def receive(self, common: Any, message: Any, kept: Any, round: int) -> Any: ...

    def follow(self, common: Any, message: Any) -> Any: ...

    def broadcast(self, state: Any, *, late: bool = False, rank: int | None = None) -> Any: ...


class HalfUpdated(FedSB):
    """A class of the new contract that still has parameters of the old one."""

    spec: ClassVar[MethodSpec] = dataclasses.replace(FedSB.spec, id="theirs")

    def broadcast(self, state: State, *, late: bool = False, rank: int | None = None) -> Any: ...  # type: ignore[override]


def no_method() -> None: ...


@pytest.fixture
def announce(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`announce(name, value)` adds an entry point to ours."""
    real = list(entry_points(group=GROUP))
    extra: list[EntryPoint] = []

    def add(name: str, value: str) -> None:
        extra.append(EntryPoint(name, value, GROUP))

    monkeypatch.setattr(registry, "entry_points", lambda group: [*real, *extra])
    method_types.cache_clear()
    yield add
    method_types.cache_clear()


def test_a_third_partys_method_is_known_priced_and_runs(announce: Any, tiny_config: dict[str, Any]) -> None:
    announce("half-sb", f"{__name__}:HalfSB")
    assert build_method("half-sb", {"rank": 4, "share": 0.1}) == HalfSB(rank=4, share=0.1)
    labels = [
        p.label
        for p in price_list(
            FedSB(rank=4), PricedRun(shapes=SHAPES, head=0, clients=2, rounds=1), PricedBasis(clients=2)
        )
    ]
    assert "half-sb (rank 32)" in labels
    with pytest.raises(ConfigError, match="did you mean 'share'"):
        load_config(set_all(tiny_config, method={"name": "half-sb", "shares": 0.1}))
    with pytest.raises(ConfigError, match=r"method.share: it must be greater than 0 \(it is -1"):
        load_config(set_all(tiny_config, method={"name": "half-sb", "share": -1.0}))
    config = load_config(set_all(tiny_config, rounds=1, method={"name": "half-sb", "rank": 3, "share": 0.2}))
    assert federate(config).score is not None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "theirs",
            "{here}:no_method",
            r"entry point 'theirs' \(.*no_method\) is not a subclass of",
        ),
        ("theirs", "{here}:WithoutSpec", "is not a subclass of fedsb.methods.base.Method with a spec"),
        ("theirs", "{here}:NoStart", "does not define start. Every method must"),
        ("theirs", "{here}:Decorated", "is a dataclass. A method is a pydantic model: remove the decorator"),
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
    """Otherwise the last one found would silently replace the other."""
    announce("fed-sb", "fedsb.methods.fed_sb:FedSB")  # installed twice: the same, and fine
    assert method_type("fed-sb") is FedSB
    method_types.cache_clear()
    announce("fed-sb", f"{__name__}:Impostor")
    with pytest.raises(UserError, match=r"'fed-sb'.* has the name of another method"):
        method_type("fed-sb")


class Impostor(FedSB):
    spec: ClassVar[MethodSpec] = FedSB.spec


def test_an_option_without_a_default_is_required(announce: Any) -> None:
    announce("without-default", f"{__name__}:WithoutDefault")
    with pytest.raises(ConfigError, match=r"method.share: it is required"):
        load_config({"method": {"name": "without-default"}})


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (
            "{here}:Outdated",
            "facts -> spec, follow -> update_shared, receive -> init_client, late -> missed_last_round, rank -> total_",
        ),
        ("{here}:HalfUpdated", "late -> missed_last_round, rank -> total_rank"),
        (
            "fedsb.methods.contract:Facts",
            "fedsb.methods.contract -> fedsb.methods.base, Facts -> MethodSpec, .* facts -> spec, .* fold -> ",
        ),
    ],
)
def test_a_method_of_the_last_version_is_told_the_new_names(announce: Any, value: str, names: str) -> None:
    announce("theirs", value.format(here=__name__))
    with pytest.raises(UserError, match=f"was written for an older version of fedsb.*: {names}") as caught:
        method_type("fed-sb")
    assert "remove @dataclass" in str(caught.value)
