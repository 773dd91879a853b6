"""Central: all data in one place. The control that shows what federation costs; for simulation only.

    one client holds every client's rows and takes as many steps in a round as a cohort does (or the same epochs).

Shapes as in fed-sb or ravan (`adapter = "core"`, with `blocks` and `scalars`) or fedit (`adapter = "factors"`, with
`alpha`). Nothing travels but the data themselves, which is what federation is there to avoid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedsb.methods.base import MethodSpec
from fedsb.methods.control import Control


@dataclass(frozen=True, kw_only=True)
class Central(Control):
    spec: ClassVar[MethodSpec] = MethodSpec(
        id="central",
        paper="a control: no federation, all data in one place",
        travels="every row of every client",
        adapter=None,
        exact=True,
        secagg_compatible=True,
        dp_noise="linear",
        pools_data=True,
    )
