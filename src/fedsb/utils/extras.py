"""The error for a missing package of the extra `privacy`."""

from __future__ import annotations

from fedsb.utils.errors import UserError


def needs_extra(package: str) -> UserError:
    """Returns the error to raise if a package of the extra is not installed."""
    return UserError(f'{package} is not installed, and privacy needs it. Install it: pip install "fedsb[privacy]"')
