"""A setting as it was resolved, with the reason, as a terminal and the report show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ResolvedSetting:
    """A setting as it was resolved, and why it is what it is."""

    key: str
    value: Any
    reason: str
