"""LoRA-SB as a PEFT tuner: the core adapter on one machine, with the ordinary Trainer.

    model = get_peft_model(model, LoraSBConfig(r=64, basis="weights"))
    W = W0 + s * sum_i B_i R_i A_i          only R trains: h r^2 values a layer

Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
Fine-Tuning", arXiv 2411.19557. The layer is `core_forward`, the one that federated rounds run. A checkpoint holds A,
B and R, so that loading one needs no linear algebra; before `PeftModel.from_pretrained`, import this module, which
makes the method known to PEFT. To load without fedsb, see `save_as_lora`.

Shapes: m out, n in, r rank, h blocks. A (h r, n) and B (m, h r) are frozen buffers, R is (1, h, r, r). All three are
stored in float32; A and B are cast to the input's dtype in the forward (to bfloat16 costs them about 0.4% an entry,
not re-orthonormalised), R stays float32 through `model.to(torch.bfloat16)`, loading and moving.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from peft import LoraConfig, PeftConfig, PeftType
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    get_peft_model_state_dict,
    get_quantization_kwargs,
    register_peft_method,
    resolve_quantization_backend,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from fedsb.adapters.adapted import find_targets
from fedsb.adapters.basis import check_rank, random_pair, weight_pair
from fedsb.adapters.core import core_delta, core_forward, core_left
from fedsb.adapters.layer import is_conv1d, is_linear, linear_shape
from fedsb.errors import UserError, did_you_mean

BASES = ("random", "weights", "update", "given")


@dataclass
class LoraSBConfig(PeftConfig):  # type: ignore[misc]
    """What to adapt, at which rank, in which basis.

    Args:
        r: rank of a block; a layer trains blocks * r^2 values and changes within rank blocks * r.
        basis: where A and B come from. "random": orthonormal, from `seed`. "weights": singular vectors of W0, from
            `weights_side`. "update": the first full step, by a call of `update_basis_` before training. "given": from
            you, by `LoraSBLinear.set_basis`. The last two are NaN until then, so that none is forgotten.
        blocks: h; R is block-diagonal.
        scale: s.
        target_modules: None for every linear layer of the transformer blocks; a regular expression that the whole
            name must match, a list of name endings, or "all-linear", as in PEFT.
        exclude_modules: names or a regular expression to leave out.
        modules_to_save: modules trained and saved in full, such as a task head.
        layers_to_transform, layers_pattern: indices of the blocks to adapt, beside a list of target_modules.
    """

    r: int = 64
    basis: str = "random"
    blocks: int = 1
    scale: float = 1.0
    seed: int = 0
    weights_side: Literal["leading", "trailing"] = "leading"
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    loaded: bool = field(default=False, init=False)  # from a checkpoint, which brings A, B and R: compute nothing

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORASB
        if self.r < 1 or self.blocks < 1:
            raise UserError(f"r = {self.r} and blocks = {self.blocks}: both must be at least 1")
        if self.basis not in BASES:
            raise UserError(f"there is no basis {self.basis!r}; {did_you_mean(self.basis, BASES)}")
        if self.weights_side not in ("leading", "trailing"):
            raise UserError(f"weights_side = {self.weights_side!r}: choose 'leading' or 'trailing'")
        if self.layers_to_transform is not None and not isinstance(self.target_modules, (list, set)):
            raise UserError("layers_to_transform needs a list of target_modules, such as ['q_proj', 'v_proj']")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    @property
    def rank(self) -> int:
        """h r, the rank of the change and of the plain LoRA it exports to."""
        return self.blocks * self.r

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["loaded"]
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> LoraSBConfig:
        config = super().from_pretrained(*args, **kwargs)
        config.loaded = True
        return cast(LoraSBConfig, config)


class LoraSBLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with core adapters by name; the active ones add up."""

    adapter_layer_names = ("lorasb_R",)
    other_param_names = ("lorasb_A", "lorasb_B", "lorasb_scale")

    if TYPE_CHECKING:  # PEFT is untyped, and torch says that every attribute is a tensor or a module

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.lorasb_R = nn.ParameterDict()  # (1, h, r, r)
        self.lorasb_A = BufferDict({}, persistent=True)  # (h r, n)
        self.lorasb_B = BufferDict({}, persistent=True)  # (m, h r)
        self.lorasb_scale: dict[str, float] = {}
        self.merged_adapters: list[str] = []

    def add(self, adapter: str, config: LoraSBConfig, key: str) -> None:
        """A new adapter with R = 0, which leaves the model as it is. `key`, the layer's name, keys the random draw."""
        m, n = linear_shape(self.get_base_layer())
        if config.loaded or config.basis in ("update", "given"):
            A, B = torch.full((config.rank, n), torch.nan), torch.full((m, config.rank), torch.nan)
        elif config.basis == "random":
            A, B = random_pair(m, n, config.rank, config.seed, key)
        else:
            A, B = weight_pair(self._oriented(self.get_base_weight()), config.rank, config.weights_side)
        self.lorasb_scale[adapter] = config.scale
        self.lorasb_A[adapter], self.lorasb_B[adapter] = A, B
        self.lorasb_R[adapter] = nn.Parameter(torch.zeros(1, config.blocks, config.r, config.r))
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def set_basis(self, adapter: str, A: Tensor, B: Tensor, R0: Tensor | None = None) -> None:
        """Put in A (h r, n) and B (m, h r), and R0 (h, r, r), zero if not given."""
        slots = self.lorasb_A[adapter].shape, self.lorasb_B[adapter].shape
        if (A.shape, B.shape) != slots:
            given = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
            raise UserError(f"{given} do not fit: expected {tuple(slots[0])} and {tuple(slots[1])}")
        self.lorasb_A[adapter].copy_(A)
        self.lorasb_B[adapter].copy_(B)
        self.lorasb_R[adapter].copy_(torch.zeros(()) if R0 is None else R0)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s B R A in float32, shaped as the base stores its weight: (m, n), Conv1D (n, m)."""
        A, B, R = self.lorasb_A[adapter], self.lorasb_B[adapter], self.lorasb_R[adapter].detach()
        return self._oriented(core_delta(A, B, R[0], self.lorasb_scale[adapter]))

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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # (b, ..., n) -> (b, ..., m)
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        for adapter in self.active_adapters:
            if adapter in self.lorasb_R:
                A, B = self.lorasb_A[adapter].to(x.dtype), self.lorasb_B[adapter].to(x.dtype)
                y = y + core_forward(x, A, B, self.lorasb_R[adapter], self.lorasb_scale[adapter]).to(y.dtype)
        return y

    def _oriented(self, weight: Tensor) -> Tensor:
        """(m, n) <-> what the base stores; GPT-2's Conv1D stores the transpose."""
        return weight.T if is_conv1d(self.get_base_layer()) else weight

    def _shift_base(self, adapter: str, sign: float, check: bool = False) -> None:
        """W0 += sign * delta, in float32. A quantised base is quantised again, or PEFT raises where it cannot be."""
        W0 = self.get_base_weight()
        weight = (W0.float() + sign * self.get_delta_weight(adapter).to(W0.device)).to(W0.dtype)
        if check and not torch.isfinite(weight).all():
            raise ValueError(f"adapter {adapter!r} would leave NaN or infinity in this weight: it is not merged")
        self.set_base_weight(weight)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's own would also cast R to the base's dtype."""
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        tensors = [self.lorasb_A[adapter_name], self.lorasb_B[adapter_name], self.lorasb_R[adapter_name]]
        if device is not None and not any(tensor.is_meta for tensor in tensors):
            for tensor in tensors:
                tensor.data = tensor.data.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraSBLinear:
        """Moves what there is to move, but R keeps its float32 values through a cast of the whole model."""
        before = {adapter: R.data for adapter, R in self.lorasb_R.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for adapter, R in self.lorasb_R.items():
            if R.dtype != torch.float32:
                R.data = before[adapter].to(R.device)
        return self


class LoraSBModel(BaseTuner):  # type: ignore[misc]
    """Puts `LoraSBLinear` where the config says; all else is PEFT's."""

    prefix = "lorasb_"
    tuner_layer_cls = LoraSBLinear
    target_module_mapping: Mapping[str, list[str]] = {}

    def _prepare_adapter_config(self, config: LoraSBConfig, model_config: dict[str, Any]) -> LoraSBConfig:
        if config.target_modules is None:  # a layer that another adapter wraps is called "<layer>.base_layer"
            config.target_modules = {name.removesuffix(".base_layer") for name in find_targets(self.model)}
        return cast(LoraSBConfig, _maybe_include_all_linear_layers(config, self.model))

    def _prepare_model(self, config: LoraSBConfig, model: nn.Module) -> None:
        """Refuses what cannot be adapted before anything is changed."""
        inside = tuple(f"{key}." for key, module in model.named_modules() if isinstance(module, LoraSBLinear))
        shapes = {}
        for key, module in model.named_modules():
            if not key or key.startswith(inside) or not self._check_target_module_exists(config, key):
                continue
            base = module.get_base_layer() if isinstance(module, LoraSBLinear) else module
            if not is_linear(base) and resolve_quantization_backend(base, **get_quantization_kwargs(model)) is None:
                raise UserError(f"target_modules matches {key!r}, a {type(base).__name__}: not a linear layer")
            shapes[key] = linear_shape(base)
        check_rank(shapes, config.rank, "r x blocks", "exclude_modules")

    def _create_and_replace(
        self,
        config: LoraSBConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(layer, LoraSBLinear):
            layer = LoraSBLinear(target, **get_quantization_kwargs(self.model))
            self._replace_module(parent, target_name, layer, target)
        layer.add(adapter_name, config, current_key)


def adapter_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, LoraSBLinear]:
    """The layers that carry the adapter, by their names in the base model, in its order."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraSBLinear) and adapter_name in module.lorasb_R
    }


def to_lora(model: Any, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter as a plain LoRA of rank h r, exactly: lora_B = B R (m, h r), lora_A = A (h r, n), alpha = h r s.

    PEFT's own `convert_to_lora` works too, through an SVD of each layer's (m, n) change.
    """
    layers = adapter_layers(model, adapter_name)
    if not layers:
        raise UserError(f"there is no adapter {adapter_name!r}; {did_you_mean(adapter_name, model.peft_config)}")
    config: LoraSBConfig = model.peft_config[adapter_name]
    alpha = config.rank * config.scale
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=list(layers),
        fan_in_fan_out=any(is_conv1d(layer.get_base_layer()) for layer in layers.values()),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = {key: value for key, value in state.items() if ".lorasb_" not in key}  # the modules to save
    for name, layer in layers.items():
        A, B, R = layer.lorasb_A[adapter_name], layer.lorasb_B[adapter_name], layer.lorasb_R[adapter_name].detach()
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = core_left(B, R[0])
    return lora, tensors


def save_as_lora(model: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Writes the adapter as a plain LoRA folder that `PeftModel.from_pretrained` loads without fedsb."""
    config, tensors = to_lora(model, adapter_name)
    config.save_pretrained(str(folder))
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(tensors, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _register() -> None:
    """Adds LORASB to PEFT, once. PeftType is a closed enum, so its member is put in by hand."""
    if "LORASB" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "LORASB")
    member._name_ = member._value_ = "LORASB"
    member.__objclass__, member._sort_order_ = PeftType, len(PeftType)
    PeftType._member_names_.append("LORASB")
    PeftType._member_map_["LORASB"] = PeftType._value2member_map_["LORASB"] = member
    type.__setattr__(PeftType, "LORASB", member)
    register_peft_method(name="lorasb", prefix="lorasb_", config_cls=LoraSBConfig, model_cls=LoraSBModel)


_register()
