"""Finds methods by name among the installed packages, and builds the method that a `[method]` section describes.

Methods are announced in the entry-point group `fedsb.methods`, those of fedsb and those of third parties alike. They
are loaded by name, so that this package imports none of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from fedsb.config.renamed import KNOWN_ELSEWHERE
from fedsb.config.section import Section
from fedsb.utils.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from fedsb.methods.base import Method

GROUP = "fedsb.methods"
DEFAULT = "fed-sb"
OTHER_NAMES = {  # names in use elsewhere that are not similar to a name here
    "lora": "'fedit', which averages LoRA's factors",
    "fedavg": "'fedit', which averages LoRA's factors",
    "fedlora": "'fedit', which averages LoRA's factors",
    "fed-lora": "'fedit', which averages LoRA's factors",
    "lora-sb": "'fed-sb', which is LoRA-SB if there is one client",
}
OLD_MODULE = "fedsb.methods.contract"
OLD_MEMBERS = {  # members of a method in the last version
    "facts": "spec",
    "claims": "metadata_keys",
    "fold": "merge_into_residual",
    "follow": "update_shared",
    "receive": "init_client",
}
OLD_PARAMETERS = {"late": "missed_last_round", "rank": "total_rank"}  # of broadcast and at
OLD_TYPES = {OLD_MODULE: "fedsb.methods.base", "Facts": "MethodSpec", "State.common": "State.shared"}


@cache
def method_types() -> dict[str, type[Method]]:
    """Returns every installed method class by name. Raises UserError if a package announces one that is not usable."""
    found: dict[str, type[Method]] = {}
    for point in entry_points(group=GROUP):
        loaded = _load(point)
        if found.setdefault(point.name, loaded) is not loaded:
            raise UserError(
                f"{_named(point)} has the name of another method, in {found[point.name].__module__}. Uninstall one of "
                "the two packages."
            )
    return found


def method_type(name: str) -> type[Method]:
    """Returns the class of a method. Raises UserError, with the nearest name, if no such method is installed."""
    methods = method_types()
    if name in methods:
        return methods[name]
    if (meant := OTHER_NAMES.get(name.lower().replace("_", "-"))) is not None:
        raise UserError(f"unknown method {name!r}; did you mean {meant}? There are: {', '.join(sorted(methods))}")
    raise UserError(f"unknown method {name!r}; {did_you_mean(name, methods)}")


def build_method(name: str, options: Mapping[str, Any]) -> Method:
    """Returns the method with these options. Raises UserError for an unknown name, ValidationError for the options."""
    return method_type(name).model_validate(dict(options))


def read_method(value: object) -> object:
    """Returns the method that a `[method]` section describes; anything but a table is returned as it is.

    Raises ValidationError with every fault of the section, each at its own key.
    """
    if not isinstance(value, Mapping):
        return value
    name = value.get("name", DEFAULT)
    if not isinstance(name, str):
        raise _invalid([InitErrorDetails(type="string_type", loc=("name",), input=name)])
    try:
        fields = method_type(name).model_fields
    except UserError as error:
        raise _invalid([_fault("name", str(error))]) from error
    options = {key: given for key, given in value.items() if key != "name"}
    hints = {key: KNOWN_ELSEWHERE.get(key, "").removeprefix("method.") for key in options.keys() - fields.keys()}
    unknown = [
        _fault(key, f"{name} has no such option; {did_you_mean(hint if hint in fields else key, fields)}")
        for key, hint in sorted(hints.items())
    ]
    if unknown:
        raise _invalid(unknown)
    return build_method(name, options)


def _invalid(faults: list[InitErrorDetails]) -> ValidationError:
    return ValidationError.from_exception_data("method", faults)


def _fault(key: str, message: str) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("method", "{fault}", {"fault": message}), loc=(key,), input={})


# --- the contract with third parties ---


def _named(point: EntryPoint) -> str:
    return f"The entry point {point.name!r} ({point.value})"


def _load(point: EntryPoint) -> type[Method]:
    """Returns the class that an entry point names. Raises UserError if it does not satisfy the contract of methods."""
    try:
        loaded = point.load()
    except Exception as error:  # whatever the import of a third party's module raises
        if OLD_MODULE in str(error):
            raise _outdated(point, OLD_TYPES | OLD_MEMBERS | OLD_PARAMETERS) from error
        raise UserError(f"{_named(point)} cannot be loaded: {error}") from error
    if old := _old_names(loaded):
        raise _outdated(point, old)
    if not (isinstance(loaded, type) and issubclass(loaded, Section) and hasattr(loaded, "spec")):
        raise UserError(f"{_named(point)} is not a subclass of fedsb.methods.base.Method with a spec.")
    method = cast("type[Method]", loaded)
    if is_dataclass(method):
        raise UserError(f"{_named(point)} is a dataclass. A method is a pydantic model: remove the decorator.")
    if missing := sorted(getattr(method, "__abstractmethods__", ())):
        raise UserError(f"{_named(point)} does not define {', '.join(missing)}. Every method must define these.")
    if method.spec.id != point.name:
        raise UserError(f"{_named(point)} names a method whose id is {method.spec.id!r}. The two must be the same.")
    return method


def _old_names(loaded: object) -> dict[str, str]:
    """Returns the names of the last version's contract that a class uses, each with its new name."""
    found = {old: new for old, new in OLD_MEMBERS.items() if hasattr(loaded, old)}
    for function in (getattr(loaded, "broadcast", None), getattr(loaded, "at", None)):
        if inspect.isfunction(function):
            parameters = inspect.signature(function).parameters
            found |= {old: new for old, new in OLD_PARAMETERS.items() if old in parameters}
    return found


def _outdated(point: EntryPoint, old: Mapping[str, str]) -> UserError:
    names = ", ".join(f"{before} -> {after}" for before, after in old.items())
    return UserError(
        f"{_named(point)} was written for an older version of fedsb. These names are missing and have new ones: "
        f"{names}. A method is now a pydantic model whose fields are its options: remove @dataclass. The docstring of "
        "fedsb.methods.base contains a complete example."
    )
