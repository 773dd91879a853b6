"""`state_of`: which kind of folder it is, and its state."""

from __future__ import annotations

import time
from pathlib import Path

from fedsb.deployment.federation import FEDERATION
from fedsb.deployment.join_file import KEPT
from fedsb.errors import UserError
from fedsb.status.files import Json


def state_of(folder: Path, now: float | None = None) -> Json:
    """The state of a coordinator's or a site's folder, as plain JSON; nothing is changed, and no key is in it.

    Times are seconds since 1970, "..._seconds" are durations. Raises UserError for any other folder, and for one that
    cannot be read.
    """
    now = time.time() if now is None else now
    if (folder / FEDERATION).exists():
        from fedsb.status.coordinator import coordinator_state

        return coordinator_state(folder, now)
    if (folder / KEPT).exists():
        from fedsb.status.site import site_state

        return site_state(folder, now)
    if (folder / "manifest.json").exists():
        raise UserError(f"{folder} is a run's folder: `fedsb report {folder}` tells of it")
    raise UserError(
        f"{folder} is neither a coordinator's folder (no {FEDERATION}) nor a site's (no {KEPT}); a site's is named "
        "after its join file, unless --folder said otherwise"
    )
