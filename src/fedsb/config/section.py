"""The base class of every section of a TOML, and the types that its fields share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from fedsb.config.schema import Config

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Auto = Literal["auto"]


class Section(BaseModel):
    """A frozen group of settings. Unknown keys are errors. The docstring of a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


@dataclass(frozen=True)
class UsedIf:
    """States when a setting has an effect. It is part of the setting's annotation."""

    condition: Callable[[Config], bool]
    otherwise: str  # the reason why the setting has no effect; {0} stands for the configuration


def used_if(path: str, *values: object) -> UsedIf:
    """Returns the condition that the setting at the dotted `path` has one of these values."""
    value_of = attrgetter(path)
    now = str(not values[0]).lower() if isinstance(values[0], bool) else f"{{0.{path}}}"
    return UsedIf(lambda config: value_of(config) in values, f"{path} is {now}")
