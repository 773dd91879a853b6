"""An anonymous file that stores a round's updates until all have arrived.

A method may need all clients' updates of a layer at once, and a bad update is only recognised in comparison with the
others. A server therefore has one payload and one layer in memory, whatever the number of clients. The rest is on
disk, or in the system's file cache.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch

from fedsb.adapters.layout import Layout
from fedsb.protocol.payload import Vector
from fedsb.utils.files import disk_errors
from fedsb.utils.tensors import Tensors


class Spool:
    """The vectors of many updates, written once, then read as views. The file is deleted with the last of them.

    Args:
        folder: where there is room for all of them; None: where the system keeps temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path()
        self._layouts: list[Layout] = []
        with disk_errors(self._folder):
            self._file = TemporaryFile(dir=folder)  # noqa: SIM115

    def add(self, layout: Layout, vector: Vector) -> None:  # (P,)
        """Appends a vector. Raises RunError if the disk is full."""
        self._layouts.append(layout)
        with disk_errors(self._folder):
            self._file.write(np.ascontiguousarray(vector, np.float32).data)
            self._file.flush()

    def read(self) -> Iterator[Tensors]:
        """Yields what was added, in order, as tensors: views, which may be written to without changing the file."""
        size = self._file.tell()
        mapped = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY) if size else bytearray()
        values, at = np.frombuffer(mapped, np.float32), 0
        for layout in self._layouts:
            yield layout.views(torch.from_numpy(values[at : at + layout.size]))
            at += layout.size
