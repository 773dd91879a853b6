"""The methods, by name. One short file each; `contract.py` says what a method is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from fedsb.errors import UserError, did_you_mean
from fedsb.methods.contract import Method
from fedsb.methods.priced import FedExLoRA, FFALoRA, FLoRA

GROUP = "fedsb.methods"


@cache
def method_types() -> dict[str, type[Method]]:
    """Every method that can be trained, ours and third parties', from the entry-point group `fedsb.methods`."""
    found: dict[str, type[Method]] = {}
    for point in entry_points(group=GROUP):
        what = f"entry point {point.name!r} ({point.value})"
        try:
            loaded = point.load()
        except (ImportError, AttributeError) as error:
            raise UserError(f"{what} cannot be loaded: {error}") from error
        if not (isinstance(loaded, type) and issubclass(loaded, Method) and hasattr(loaded, "facts")):
            raise UserError(f"{what} is no fedsb.methods.contract.Method with facts")
        if loaded.facts.id != point.name:
            raise UserError(f"{what} names a method whose id is {loaded.facts.id!r}: the two must be the same")
        if found.setdefault(point.name, loaded) is not loaded:
            raise UserError(f"{what} takes the name of another method, {found[point.name].__module__}: uninstall one")
    return found


def priced_types() -> dict[str, type[Method]]:
    """Every method whose traffic is known, those that cannot be trained here included."""
    known: dict[str, type[Method]] = {cls.facts.id: cls for cls in (FFALoRA, FedExLoRA, FLoRA)}
    return {**known, **method_types()}


def method_type(name: str) -> type[Method]:
    """Raises UserError, with the nearest name, for a method that there is not."""
    methods = method_types()
    if name in methods:
        return methods[name]
    if name in priced_types():
        raise UserError(f"method {name!r} can be priced but not trained in this version; {did_you_mean('', methods)}")
    raise UserError(f"unknown method {name!r}; {did_you_mean(name, methods)}")


def build_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of a checked configuration."""
    return method_type(name)(**options)
