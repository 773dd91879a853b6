"""Counts what a computation reads from its device: on an accelerator each read waits for all that was queued there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SCALARS = {"aten::_local_scalar_dense", "aten::equal"}
SHAPES = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::index", "aten::index_put_"}  # that depend
PYTHON = ("tolist", "numpy", "cpu")  # on the CPU, where the tests run, these call no operator


class _Operators(TorchDispatchMode):
    def __init__(self, reads: Counter[str]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if name in SCALARS or (name in SHAPES and _depends_on_values(name, args)):
            self.reads[name] += 1
        if name == "aten::_to_copy" and kwargs.get("device") == torch.device("cpu"):
            self.reads[name] += 1
        return func(*args, **kwargs)


def _depends_on_values(name: str, args: Any) -> bool:
    if "index" not in name:
        return True
    return any(index is not None and index.dtype == torch.bool for index in args[1])


@contextmanager
def count_reads() -> Iterator[Counter[str]]:
    """Counts operators that the host waits for: values, shapes that depend on values, and copies to the CPU.

    A backward pass on the CPU runs in this thread, so it is counted too.
    """
    reads: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(Tensor, name)

        def method(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            reads[name] += 1
            return real(x, *args, **kwargs)

        return method

    with _Operators(reads), patch.multiple(Tensor, **{name: counted(name) for name in PYTHON}):
        yield reads
