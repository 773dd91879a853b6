"""An accelerator that does not exist: tensors on the device `pretend:0`, whose values are on the CPU.

It behaves as a GPU does where the difference matters: a tensor of the CPU and one of the device cannot meet in an
operation (a number, that is a tensor without axes, may), and reading a value makes the host wait. Operations that
launch a kernel and those that wait are counted, with the line of fedsb that asked for them. It runs on any machine:
torch lets Python stand for a backend (`torch.utils.backend_registration`).

    with accelerator() as device:
        federate(load_config({**config, "model": {..., "device": "pretend"}}))
    device.waits, device.kernels
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"

# Operations that change the view of a tensor or its metadata, and launch nothing.
NO_KERNEL = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "diagonal", "empty", "empty_like",
    "empty_strided", "expand", "is_pinned", "is_same_size", "lift_fresh", "movedim", "narrow", "new_empty",
    "new_empty_strided", "permute", "reshape", "resize_", "select", "set_", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
}  # fmt: skip
# Operations whose result, or the shape of it, the host must wait for.
WAITS = {
    "_linalg_svd", "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "linalg_qr", "masked_select",
    "nonzero", "repeat_interleave", "unique_dim",
}  # fmt: skip
INDEXING = {"_index_put_impl_", "_unsafe_index", "index", "index_put", "index_put_"}


class MixedDevicesError(RuntimeError):
    """Raised where a tensor of the CPU meets one of the device, as torch does on a GPU."""


@dataclass
class Record:
    """What the device was asked to do, by the line of code that asked: "training/joint.py:120 mm"."""

    waits: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        self.waits.clear()
        self.kernels.clear()


RECORD = Record()


class _Backend:
    """The module `torch.pretend`. Tests of other things run in the same process, and to them it is not available."""

    active = False

    def is_available(self) -> bool:
        return self.active

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


# When this module is imported, and tests are collected: autograd counts the devices once, in the first backward pass.
_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())


class PretendTensor(Tensor):
    """A tensor on the device: its values are in `values`, on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, requires_grad: bool = False) -> PretendTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=torch.device(NAME, 0),
            requires_grad=requires_grad,
        )
        made.values = values
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"pretend({self.values!r})"

    @property
    def data(self) -> PretendTensor:
        return PretendTensor(self.values)

    @data.setter
    def data(self, other: Tensor) -> None:
        assert isinstance(other, PretendTensor)
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.values = other.values

    def tolist(self) -> Any:
        _wait("tolist")
        return self.values.detach().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def __deepcopy__(self, _: Any) -> PretendTensor:
        return PretendTensor(self.values.clone(), self.requires_grad)


class _Factories(TorchDispatchMode):
    """Catches operations whose arguments are not on the device, such as torch.zeros(..., device="pretend")."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.split("::")[1]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    device = kwargs.get("device")
    here = any(isinstance(x, PretendTensor) for x in tensors)
    if not here and (device is None or torch.device(device).type != NAME):
        return func(*args, **kwargs)
    if name in ("_to_copy", "copy_"):
        return _copy(func, name, args, kwargs)
    if here:
        _refuse_mixed(name, args, tensors)
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    _count(name, args)
    out = func(*tree_map(_values, args), **tree_map(_values, {k: v for k, v in kwargs.items() if k != "pin_memory"}))
    if here and device is not None and torch.device(device).type != NAME:  # new_empty(..., device="cpu")
        return out
    return _wrapped(func, args, kwargs, out)


def _copy(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs a copy, which may cross between the devices. From memory that is not pinned, the host waits for it."""
    if name == "copy_":
        target, source = args[:2]
        crossing = isinstance(target, PretendTensor) != isinstance(source, PretendTensor)
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        _values(target).copy_(_values(source))
        out, there = target, isinstance(target, PretendTensor)
    else:
        source, device = args[0], kwargs.get("device")
        there = isinstance(source, PretendTensor) if device is None else torch.device(device).type == NAME
        crossing, non_blocking = there != isinstance(source, PretendTensor), kwargs.get("non_blocking", False)
        left = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
        made = func(_values(source), **left)
        if made.data_ptr() == _values(source).data_ptr() and made.numel():
            made = made.clone()
        out = PretendTensor(made) if there else made
    if crossing and source.numel() and not (non_blocking and there and getattr(source, "pretends_pinned", False)):
        _wait(name)
    if crossing or there:
        RECORD.kernels[f"{_where()} {name}"] += 1
    return out


def _refuse_mixed(name: str, args: Any, tensors: list[Tensor]) -> None:
    others = [x for x in tensors if not isinstance(x, PretendTensor) and x.dim()]
    if others and name in INDEXING and isinstance(args[0], PretendTensor):
        _wait(f"{name}(index on the CPU)")
        others = [x for x in args[2:3] if isinstance(x, Tensor) and not isinstance(x, PretendTensor) and x.dim()]
    if others:
        raise MixedDevicesError(f"Expected all tensors on one device, found {NAME}:0 and cpu: {name} at {_where()}.")


def _count(name: str, args: Any) -> None:
    if name in WAITS or (name in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])):
        _wait(name)
    if name not in NO_KERNEL:
        RECORD.kernels[f"{_where()} {name}"] += 1


def _wrapped(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
    """Returns the results as tensors of the device; an argument that was changed in place as itself."""
    written = {}
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written |= dict.fromkeys(argument.alias_info.before_set, value)

    def one(made: Any, returned: Any) -> Any:
        alias = returned.alias_info
        if alias is not None and alias.is_write:
            return next(written[name] for name in alias.before_set)
        return tree_map(lambda x: PretendTensor(x) if type(x) is Tensor else x, made)

    returns = func._schema.returns
    if len(returns) == 1:
        return one(out, returns[0])
    return tuple(map(one, out, returns)) if isinstance(out, tuple) else out


def _values(x: Any) -> Any:
    return x.values if isinstance(x, PretendTensor) else x


def _wait(what: str) -> None:
    RECORD.waits[f"{_where()} {what}"] += 1


def _where() -> str:
    """Returns the innermost line of fedsb, transformers or peft that is being run, such as "training/joint.py:120"."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/src/fedsb/" in file:
            return f"{file.split('/src/fedsb/')[1]}:{frame.f_lineno}"
        if "/transformers/" in file or "/peft/" in file:
            return f"{file.split('site-packages/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "torch"


def _pinned(tensor: Tensor, *_: Any) -> Tensor:
    """Returns the tensor as if it were in pinned memory, from which copies do not wait."""
    copy = tensor.clone()
    copy.pretends_pinned = True  # type: ignore[attr-defined]
    return copy


@contextmanager
def accelerator() -> Iterator[Record]:
    """Makes the device `pretend` usable inside. Yields what it was asked to do, from zero."""
    replaced = {name: getattr(torch, name) for name in ("tensor", "as_tensor")}
    pin = Tensor.pin_memory

    def made(name: str) -> Any:
        def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
            found = replaced[name](data, *args, **kwargs)
            return found if device is None else found.to(device)

        return make

    _device_constructors()  # a list that torch makes once, with the functions that are replaced here
    RECORD.clear()
    _Backend.active = True
    try:
        for name in replaced:
            setattr(torch, name, made(name))
        Tensor.pin_memory = _pinned  # type: ignore[method-assign, assignment]
        with _Factories():
            yield RECORD
    finally:
        _Backend.active = False
        Tensor.pin_memory = pin  # type: ignore[method-assign]
        for name, function in replaced.items():
            setattr(torch, name, function)
