"""The docs name tests that exist, and their configurations load."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from fedsb.client.policy import SiteConfig
from fedsb.config.load import load_config
from fedsb.runs.find import recipe_path

HERE = Path(__file__).parent


def test_the_tests_that_show_each_pitfall_exist() -> None:
    text = (HERE.parent / "docs" / "privacy-pitfalls.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) > 20
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (HERE.parent / file).read_text()]
    assert not missing
    rows = [line for line in text.splitlines() if line.startswith("| **")]
    assert len(rows) == 12 and all("::" in row for row in rows)


def test_the_tutorial_is_the_recipe_and_its_rules_are_those_of_a_site() -> None:
    text = (HERE.parent / "docs" / "tutorial-private-chat.md").read_text()
    run, rules = map(tomllib.loads, re.findall(r"```toml\n(.*?)```", text, re.DOTALL))
    mine, recipe = load_config(run).config, load_config(recipe_path("medquad-private")).config
    for section in ("model", "task", "method", "server", "privacy"):
        assert getattr(mine, section) == getattr(recipe, section), section
    assert (mine.rounds, mine.train.lr) == (recipe.rounds, recipe.train.lr)
    site = SiteConfig.model_validate(rules)
    assert site.allow.epsilon_shared == mine.privacy.epsilon
