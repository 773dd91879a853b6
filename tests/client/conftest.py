"""What the tests of hostile coordinators have in common."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from support.hostile import Settings, run_settings


@pytest.fixture
def settings(tiny_config: dict[str, Any]) -> Settings:
    """A run's settings as they travel, with changes."""
    return partial(run_settings, tiny_config)
