"""The live state of a coordinator or a site, from what is on its disk: for the terminal, a page, Prometheus, a probe.

`state_of` only reads. Every view (show.py, web.py, metrics.py) is a function of what it gives back.
"""

from __future__ import annotations

import time
from pathlib import Path

from fedsb.deployment.federation import FEDERATION
from fedsb.deployment.join_file import KEPT
from fedsb.deployment.monitoring.coordinator import coordinator_state
from fedsb.deployment.monitoring.health import health_of
from fedsb.deployment.monitoring.site import site_state
from fedsb.utils.errors import UserError
from fedsb.utils.formatting import Json

__all__ = ["state_of"]


def state_of(folder: Path, now: float | None = None) -> Json:
    """The state of a coordinator's or a site's folder, as plain JSON; nothing is changed, and no key is in it.

    Times are seconds since 1970, "..._seconds" are durations. Raises UserError for any other folder, and for one that
    cannot be read.
    """
    now = time.time() if now is None else now
    if (folder / FEDERATION).exists():
        state = coordinator_state(folder, now)
    elif (folder / KEPT).exists():
        state = site_state(folder, now)
    elif (folder / "manifest.json").exists():
        raise UserError(f"{folder} is a run's folder: `fedsb report {folder}` tells of it")
    else:
        raise UserError(
            f"{folder} is neither a coordinator's folder (no {FEDERATION}) nor a site's (no {KEPT}); a site's is named "
            "after its join file, unless --folder said otherwise"
        )
    return {**state, "health": health_of(state)}
