"""The methods, by name. One short file each; `contract.py` says what a method is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from fedsb.methods.base import Method
from fedsb.utils.errors import UserError, did_you_mean

GROUP = "fedsb.methods"
KNOWN_ELSEWHERE = {  # names that no other name here is like
    "lora": "'fedit', which averages LoRA's factors",
    "fedavg": "'fedit', which averages LoRA's factors",
    "fedlora": "'fedit', which averages LoRA's factors",
    "fed-lora": "'fedit', which averages LoRA's factors",
    "lora-sb": "'fed-sb', which is LoRA-SB with one client too",
}
NEEDED = ("traffic", "start", "trainable")  # of the contract, without a default


@cache
def method_types() -> dict[str, type[Method]]:
    """Every method, ours and third parties', from the entry-point group `fedsb.methods`."""
    found: dict[str, type[Method]] = {}
    for point in entry_points(group=GROUP):
        what = f"entry point {point.name!r} ({point.value})"
        try:
            loaded = point.load()
        except (ImportError, AttributeError) as error:
            raise UserError(f"{what} cannot be loaded: {error}") from error
        if not (isinstance(loaded, type) and issubclass(loaded, Method) and hasattr(loaded, "spec")):
            raise UserError(f"{what} is no fedsb.methods.base.Method with a spec")
        if missing := [part for part in NEEDED if getattr(loaded, part) is getattr(Method, part)]:
            raise UserError(
                f"{what} does not define {', '.join(missing)}, which every method must (methods/contract.py)"
            )
        if "__dataclass_params__" not in vars(loaded) or not vars(loaded)["__dataclass_params__"].frozen:
            raise UserError(f"{what} is no frozen dataclass; write @dataclass(frozen=True, kw_only=True) above it")
        if loaded.spec.id != point.name:
            raise UserError(f"{what} names a method whose id is {loaded.spec.id!r}: the two must be the same")
        if found.setdefault(point.name, loaded) is not loaded:
            raise UserError(f"{what} takes the name of another method, {found[point.name].__module__}: uninstall one")
    return found


def method_type(name: str) -> type[Method]:
    """Raises UserError, with the nearest name, for a method that there is not."""
    methods = method_types()
    if name in methods:
        return methods[name]
    if (meant := KNOWN_ELSEWHERE.get(name.lower().replace("_", "-"))) is not None:
        raise UserError(f"unknown method {name!r}; did you mean {meant}? There are: {', '.join(sorted(methods))}")
    raise UserError(f"unknown method {name!r}; {did_you_mean(name, methods)}")


def build_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of a checked configuration."""
    return method_type(name)(**options)
