"""The settings of a run: their schema, loading them from a TOML, and the recipes."""

from __future__ import annotations

from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"
