"""Singular vectors of large base models, kept on this machine for the next run.

They depend on the base model and the rank alone, and take minutes at 7B on a CPU. A file is named by a hash of the
model's fingerprint, the rank and the side. The oldest files are removed above CACHE_BYTES in all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from fedsb.adapters.adapted import AdaptedModel
from fedsb.adapters.basis import Pair
from fedsb.models.placement import is_sharded
from fedsb.utils.errors import DiskError
from fedsb.utils.files import cache_folder, write_atomic

VERSION = 1  # of the computation in adapters/basis.py
CACHE_BYTES = 4 << 30
SMALL = 50_000_000  # weights of the adapted layers, below which the vectors are computed again


def is_worth_caching(adapted: AdaptedModel) -> bool:
    """Returns whether the model is known by a fingerprint, and too large to compute its vectors in each run.

    A sharded model is not cached: its ranks compute together, and one of them may not have the file.
    """
    sharded = any(is_sharded(parameter) for parameter in adapted.model.parameters())
    return (
        not sharded
        and bool(adapted.fingerprint)
        and sum(math.prod(shape) for shape in adapted.shapes.values()) >= SMALL
    )


def cached_pairs(key: str, build: Callable[[], dict[str, Pair]]) -> dict[str, Pair]:
    """Returns the (A, B) of every layer that are kept under this key, else those that `build` makes, which are kept.

    A file that cannot be read, or not be written, costs only time: the vectors are computed.
    """
    path = basis_folder() / f"{hashlib.sha256(f'{VERSION} {key}'.encode()).hexdigest()[:32]}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):
        tensors = load_file(path)
        path.touch()
        layers = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
        return {layer: (tensors[f"{layer}.A"], tensors[f"{layer}.B"]) for layer in layers}
    pairs = build()
    with suppress(OSError, DiskError):
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{layer}.A": A for layer, (A, _) in pairs.items()}
        write_atomic(path, save(tensors | {f"{layer}.B": B for layer, (_, B) in pairs.items()}))
        _remove_oldest(path.parent)
    return pairs


def basis_folder() -> Path:
    """Returns the folder of the cache."""
    return cache_folder() / "bases"


def _remove_oldest(folder: Path) -> None:
    """Removes the files that were not used for longest, until the newest ones fit CACHE_BYTES."""
    total = 0
    for path in sorted(folder.glob("*.safetensors"), key=lambda path: -path.stat().st_mtime):
        total += path.stat().st_size
        if total > CACHE_BYTES:
            path.unlink(missing_ok=True)
