"""Runs every example in the docstrings of the package."""

import doctest
import importlib
from pathlib import Path

import pytest

import fedsb

PACKAGE = Path(fedsb.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text()
)


def test_the_contract_of_a_method_has_an_example() -> None:
    assert "fedsb.methods.base" in MODULES


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_docstring_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted and not result.failed
