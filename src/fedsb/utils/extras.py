"""What to say where the extra `privacy` is not installed."""

from __future__ import annotations

from fedsb.utils.errors import UserError


def needs_extra(package: str) -> UserError:
    """To be raised where a package of the extra is missing."""
    return UserError(f'{package} is not installed, and privacy needs it: pip install "fedsb[privacy]"')
