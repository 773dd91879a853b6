"""The docs name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_the_tests_that_show_each_pitfall_exist() -> None:
    text = (HERE.parent / "docs" / "privacy-pitfalls.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) > 20
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (HERE.parent / file).read_text()]
    assert not missing
    rows = [line for line in text.splitlines() if line.startswith("| **")]
    assert len(rows) == 12 and all("::" in row for row in rows)
