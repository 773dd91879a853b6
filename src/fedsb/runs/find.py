"""Finds a configuration by what a user types: a TOML file, a run directory, or the name of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedsb.config import RECIPES
from fedsb.utils.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from fedsb.config.load import ResolvedConfig


def recipe_path(name: str) -> Path:
    """Returns the TOML of a recipe. Raises UserError with the nearest name if there is no such recipe."""
    path = RECIPES / f"{name}.toml"
    if not path.is_file():
        names = [recipe.stem for recipe in RECIPES.glob("*.toml")]
        raise UserError(f"there is no file and no recipe {name!r}; {did_you_mean(name, names)}")
    return path


def load(config: str, overrides: Sequence[str]) -> ResolvedConfig:
    """Reads a TOML file, the settings of a run directory, or a recipe. Raises ConfigError with all faults."""
    from fedsb.config.load import load_config
    from fedsb.models.hub import stay_offline_without_network

    stay_offline_without_network()
    path = Path(config)
    if (path / "manifest.json").is_file():
        return _settings_of(path, overrides)
    if path.suffix == ".toml" or path.is_file():
        return load_config(path, overrides)
    if Path(f"{config}.toml").is_file() and not (RECIPES / f"{config}.toml").is_file():
        raise UserError(f"there is no recipe {config!r}. For the file, write {config}.toml")
    return load_config(recipe_path(config), overrides)


def _settings_of(run: Path, overrides: Sequence[str]) -> ResolvedConfig:
    from fedsb.config.load import load_config
    from fedsb.reporting.run_directory import read_manifest

    manifest = read_manifest(run)
    loaded = load_config(manifest["config"], overrides)
    asked = {key: where for key, where in loaded.origin.items() if where.startswith("--set ")}
    return replace(loaded, origin={**manifest["origin"], **asked})
