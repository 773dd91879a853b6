"""The live state of a coordinator or a site, for the terminal, a web page, Prometheus and health checks.

`state_of` reads the state from the folder and changes nothing. Every view (show.py, web.py, metrics.py) is a function
of its result.
"""

from __future__ import annotations

import time
from pathlib import Path

from fedsb.deployment.join_file import JOIN_FILE
from fedsb.deployment.monitoring.coordinator import coordinator_state
from fedsb.deployment.monitoring.health import health_of
from fedsb.deployment.monitoring.site import site_state
from fedsb.deployment.registry import FEDERATION
from fedsb.utils.errors import UserError
from fedsb.utils.formatting import Json

__all__ = ["state_of"]


def state_of(folder: Path, now: float | None = None) -> Json:
    """Returns the state of a coordinator's or a site's folder as plain JSON, without any key.

    Times are seconds since 1970; "..._seconds" are durations. Raises UserError for a different folder, and for one that
    cannot be read.
    """
    now = time.time() if now is None else now
    if (folder / FEDERATION).exists():
        state = coordinator_state(folder, now)
    elif (folder / JOIN_FILE).exists():
        state = site_state(folder, now)
    elif (folder / "manifest.json").exists():
        raise UserError(f"{folder} is a run directory. Use `fedsb report {folder}` instead.")
    else:
        raise UserError(
            f"{folder} is neither the folder of a coordinator (no {FEDERATION}) nor that of a site (no {JOIN_FILE}). "
            "The folder of a site has the name of its join file, unless --folder named a different one."
        )
    return {**state, "health": health_of(state)}
