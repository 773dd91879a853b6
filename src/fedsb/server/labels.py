"""The labels of a federation: a run's classes are the union over all sites, which do not see each other's data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsb.config.resolved import ResolvedSetting
from fedsb.data.names import refuse_same_names
from fedsb.protocol.messages import DescribeReply
from fedsb.utils.errors import UserError

SHOWN = 5


def labels_of(described: Mapping[str, DescribeReply]) -> list[Any]:
    """Returns all labels, sorted. Raises UserError if their types differ, with the sites that have each type."""
    kinds: dict[str, list[str]] = {}
    for name, site in described.items():
        for kind in sorted({type(label).__name__ for label in site.labels}):
            kinds.setdefault(kind, []).append(name)
    if len(kinds) > 1:
        said = "; ".join(f"{kind}: {', '.join(sites)}" for kind, sites in sorted(kinds.items()))
        raise UserError(f"the sites' labels are of different types ({said}): write them alike everywhere")
    labels = sorted({label for site in described.values() for label in site.labels})
    try:
        refuse_same_names([str(label) for label in labels], "the sites' labels")
    except UserError as error:
        has = {name: sorted(map(str, site.labels)) for name, site in described.items()}
        raise UserError(f"{error} They have: {'; '.join(f'{name}: {of}' for name, of in has.items())}") from error
    return labels


def label_choices(described: Mapping[str, DescribeReply]) -> list[ResolvedSetting]:
    """Returns a note on labels that only one site has. A misspelt label adds a class, which no score reveals."""
    sites: dict[Any, list[str]] = {}
    for name, site in described.items():
        for label in site.labels:
            sites.setdefault(label, []).append(name)
    alone = [f"{label!r} ({has[0]})" for label, has in sorted(sites.items()) if len(has) == 1 < len(described)]
    if not alone:
        return []
    more = f" and {len(alone) - SHOWN} more" if len(alone) > SHOWN else ""
    said = ", ".join(alone[:SHOWN]) + more
    reason = f"those of all sites; one site alone has {said}: meant so, or misspelt?"
    return [ResolvedSetting(key="data.labels", value=len(sites), reason=reason)]
