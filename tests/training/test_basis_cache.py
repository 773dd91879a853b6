"""The cache of singular vectors of large base models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import set_all
from fedsb.adapters.basis import basis_hash
from fedsb.training import basis_cache
from fedsb.training.basis_cache import basis_folder, cached_pairs
from support.server import open_server

MADE = {"a.b": (torch.arange(6.0).reshape(2, 3), torch.ones(4, 2)), "c": (torch.ones(2, 5), torch.zeros(3, 2))}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def never() -> Any:
    raise AssertionError("it is in the cache")


def test_vectors_are_computed_once_for_a_key() -> None:
    assert cached_pairs("one", lambda: MADE) == MADE
    found = cached_pairs("one", never)
    assert found.keys() == MADE.keys()
    assert all(torch.equal(x, y) for layer in MADE for x, y in zip(MADE[layer], found[layer], strict=True))
    with pytest.raises(AssertionError, match="in the cache"):
        cached_pairs("another", never)


def test_a_damaged_file_is_replaced() -> None:
    cached_pairs("one", lambda: MADE)
    (path,) = basis_folder().iterdir()
    path.write_bytes(path.read_bytes()[:50])
    assert cached_pairs("one", lambda: MADE) is MADE
    assert cached_pairs("one", never).keys() == MADE.keys()


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in place of the folder")
    assert cached_pairs("one", lambda: MADE) is MADE


def test_the_files_used_longest_ago_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    cached_pairs("old", lambda: MADE)
    (old,) = basis_folder().iterdir()
    os.utime(old, (0, 0))
    monkeypatch.setattr(basis_cache, "CACHE_BYTES", int(1.5 * old.stat().st_size))
    cached_pairs("new", lambda: MADE)
    assert len([*basis_folder().iterdir()]) == 1
    assert not old.exists()


@pytest.mark.parametrize("cache", [True, False])
def test_a_run_uses_the_cache_for_a_large_model_only(
    cache: bool, tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = set_all(tiny_config, basis={"kind": "weights", "cache": cache})
    small = open_server(config).trainer.data_free_basis(0)
    assert not basis_folder().exists()
    monkeypatch.setattr(basis_cache, "SMALL", 0)
    first, second = (open_server(config).trainer.data_free_basis(0) for _ in range(2))
    assert basis_folder().exists() == cache
    assert basis_hash(first.tensors) == basis_hash(second.tensors) == basis_hash(small.tensors)
