"""The layer of LoRA-SB as a PEFT tuner.

Shapes: m out, n in, r rank, h blocks. A (h r, n) and B (m, h r) are frozen parameters, R is (1, h, r, r). All three are
stored in float32. A and B are cast to the input's dtype in the forward; casting to bfloat16 costs about 0.4% per entry,
without orthonormalising again. R stays float32 through `model.to(torch.bfloat16)`, loading and moving.

A and B are parameters and not buffers, because DistributedDataParallel broadcasts buffers in every forward pass.
Parameter names read "<layer>.lorasb_R.<adapter>.weight", as with LoRA, because TRL copies an adapter by that pattern.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import quantization_extra_repr
from torch import Tensor, nn

from fedsb.adapters.basis import random_pair, weight_pair
from fedsb.adapters.core import core_delta, core_forward
from fedsb.adapters.peft_config import LoraSBConfig
from fedsb.models.layers import is_conv1d, linear_shape
from fedsb.utils.errors import UserError


class Weight(nn.Module):
    """One tensor of one adapter. It is a module, so that its name ends with ".<adapter>.weight"."""

    weight: nn.Parameter

    def __init__(self, value: Tensor, requires_grad: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(value, requires_grad=requires_grad)

    def extra_repr(self) -> str:
        return "x".join(str(size) for size in self.weight.shape)


class CoreWeight(Weight):
    """R (1, h, r, r) of one adapter. It is read in `forward`, so that FSDP can wrap it as its own unit."""

    def forward(self, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        return core_forward(x, A, B, self.weight, scale)


class LoraSBLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with core adapters by name. The outputs of the active adapters add up."""

    adapter_layer_names = ("lorasb_R",)
    other_param_names = ("lorasb_A", "lorasb_B", "lorasb_scale", "lorasb_pending")

    in_features: int
    out_features: int
    lorasb_R: Any  # ModuleDict of CoreWeight: (1, h, r, r)
    lorasb_A: Any  # ModuleDict of Weight: (h r, n)
    lorasb_B: Any  # ModuleDict of Weight: (m, h r)

    if TYPE_CHECKING:  # PEFT is untyped, and torch types every attribute as a tensor or a module

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = linear_shape(self.get_base_layer())
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.lorasb_R, self.lorasb_A, self.lorasb_B = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.lorasb_scale: dict[str, float] = {}
        self.lorasb_pending: dict[str, tuple[LoraSBConfig, str]] = {}  # (config, key) where A and B may still be NaN
        self.merged_adapters: list[str] = []

    def add(self, adapter: str, config: LoraSBConfig, key: str) -> None:
        """Adds an adapter with R = 0, which does not change the model. `key`, the layer's name, keys the random draw.

        The basis of a config that was read from a file is computed at first use, unless A and B are loaded before.
        """
        m, n = self.out_features, self.in_features
        self.lorasb_scale[adapter] = config.scale
        self.lorasb_A[adapter] = Weight(torch.full((config.total_rank, n), torch.nan))
        self.lorasb_B[adapter] = Weight(torch.full((m, config.total_rank), torch.nan))
        self.lorasb_R[adapter] = CoreWeight(torch.zeros(1, config.blocks, config.r, config.r), requires_grad=True)
        self._move_adapter_to_device_of_base_layer(adapter)
        if config.basis in ("random", "weights"):
            self.lorasb_pending[adapter] = copy.copy(config), key
            if not config.from_file:
                self.complete()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def complete(self) -> None:
        """Computes the pending bases, except those that were loaded or copied in the meantime."""
        for adapter, (config, key) in list(self.lorasb_pending.items()):
            A, B = self.lorasb_A[adapter].weight, self.lorasb_B[adapter].weight
            if A.is_meta:
                continue
            del self.lorasb_pending[adapter]
            if not A.isnan().all():
                continue
            if config.basis == "random":
                pair = random_pair(self.out_features, self.in_features, config.total_rank, config.seed, key)
            else:
                pair = weight_pair(self._oriented(self.get_base_weight()), config.total_rank, config.weights_side)
            A.copy_(pair[0])
            B.copy_(pair[1])

    @torch.no_grad()
    def set_basis(self, adapter: str, A: Tensor, B: Tensor, R0: Tensor | None = None) -> None:
        """Sets A (h r, n), B (m, h r) and R = R0 (h, r, r). Without R0, R is zero."""
        slots = self.lorasb_A[adapter].weight, self.lorasb_B[adapter].weight
        if (A.shape, B.shape) != (slots[0].shape, slots[1].shape):
            given = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
            raise UserError(f"{given} have wrong shapes. Expected {tuple(slots[0].shape)} and {tuple(slots[1].shape)}.")
        self.lorasb_pending.pop(adapter, None)
        slots[0].copy_(A)
        slots[1].copy_(B)
        self.lorasb_R[adapter].weight.copy_(torch.zeros(()) if R0 is None else R0)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        """Returns A (h r, n), B (m, h r) and R (h, r, r), detached."""
        self.complete()
        A, B, R = (part[adapter].weight.detach() for part in (self.lorasb_A, self.lorasb_B, self.lorasb_R))
        return A, B, R[0]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Returns s B R A in float32, shaped as the base stores its weight: (m, n), Conv1D (n, m)."""
        A, B, R = self.factors(adapter)
        return self._oriented(core_delta(A, B, R, self.lorasb_scale[adapter]))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.lorasb_R:
                self._shift_base(adapter, 1.0, safe_merge)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self._shift_base(self.merged_adapters.pop(), -1.0)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def forward(  # (b, ..., n) -> (b, ..., m)
        self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        if adapter_names is not None:
            return self._add_by_row(x, y, adapter_names)
        if self.merged:
            return y
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        for adapter in self.active_adapters:
            if adapter in self.lorasb_R:
                y = y + self._output(adapter, x).to(y.dtype)
        return y

    def _output(self, adapter: str, x: Tensor) -> Tensor:
        """Returns s x A' R' B', which is added to the layer's output, in the dtype of x."""
        if self.lorasb_pending:
            self.complete()
        A, B = self.lorasb_A[adapter].weight.to(x.dtype), self.lorasb_B[adapter].weight.to(x.dtype)
        output: Tensor = self.lorasb_R[adapter](x, A, B, self.lorasb_scale[adapter])
        return output

    def _add_by_row(self, x: Tensor, y: Tensor, names: list[str]) -> Tensor:
        """Adds to each row of the batch the output of its adapter. Other names stand for the base model alone."""
        if len(x) != len(names):
            raise UserError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)} respectively. Pass one name per row of the batch."
            )
        if self.merged:
            raise UserError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        for adapter in sorted(self.lorasb_R.keys() & set(names)):
            rows = torch.tensor([row for row, name in enumerate(names) if name == adapter], device=x.device)
            y = y.index_add(0, rows, self._output(adapter, x[rows]).to(y.dtype))
        return y

    def extra_repr(self) -> str:
        return str(quantization_extra_repr(self))

    def _oriented(self, weight: Tensor) -> Tensor:
        """Converts between (m, n) and the layout of the base layer. GPT-2's Conv1D stores the transpose."""
        return weight.T if is_conv1d(self.get_base_layer()) else weight

    def _shift_base(self, adapter: str, sign: float, check: bool = False) -> None:
        """Adds sign * delta to W0, in float32. A quantised base is quantised again, or PEFT raises."""
        W0 = self.get_base_weight()
        weight = (W0.float() + sign * self.get_delta_weight(adapter).to(W0.device)).to(W0.dtype)
        if check and not torch.isfinite(weight).all():
            raise UserError(  # the first sentence is PEFT's
                f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken. "
                "With basis = 'update' or 'given', set its basis before merging. Otherwise train it again."
            )
        self.set_base_weight(weight)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves the adapter. PEFT's own method would also cast R to the base's dtype."""
        if adapter_name not in self.lorasb_R:
            return
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        tensors = [part[adapter_name].weight for part in (self.lorasb_A, self.lorasb_B, self.lorasb_R)]
        if device is not None and not any(tensor.is_meta for tensor in tensors):
            for tensor in tensors:
                tensor.data = tensor.data.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraSBLinear:
        """Applies `fn` to all tensors. R keeps its float32 values if the whole model is cast."""
        before = {adapter: R.weight.data for adapter, R in self.lorasb_R.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for adapter, R in self.lorasb_R.items():
            if R.weight.dtype != torch.float32:
                R.weight.data = before[adapter].to(R.weight.device)
        return self


def adapter_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, LoraSBLinear]:
    """Returns the layers with the adapter, by their names in the base model, in its order."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraSBLinear) and adapter_name in module.lorasb_R
    }
