"""Central: all data in one place. A control that shows what federation costs, for simulation only.

    One client has the rows of all clients and takes as many steps per round as a whole cohort (or the same epochs).

Shapes as in Fed-SB or RAVAN (`adapter = "core"`, with `blocks` and `scalars`) or FedIT (`adapter = "factors"`, with
`alpha`).
What travels: nothing but the data themselves, which federation exists to avoid.
Limits: a simulation only; no site would send its rows.
"""

from __future__ import annotations

from typing import ClassVar

from fedsb.methods.base import MethodSpec
from fedsb.methods.control import Control


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
