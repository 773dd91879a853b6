"""LoRA-SB as a PEFT tuner: the core adapter on one machine, with the ordinary Trainer.

    model = get_peft_model(model, LoraSBConfig(r=64, basis="weights"))
    W = W0 + s * sum_i B_i R_i A_i          only R trains: h r^2 values a layer

Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
Fine-Tuning", arXiv 2411.19557. The layer is `core_forward`, the one that federated rounds run. A checkpoint holds A,
B and R, so that loading one needs no linear algebra; before `PeftModel.from_pretrained`, import this module, which
makes the method known to PEFT. To load without fedsb, see `save_as_lora`.

Shapes: m out, n in, r rank, h blocks. A (h r, n) and B (m, h r) are frozen parameters, R is (1, h, r, r). All three are
stored in float32; A and B are cast to the input's dtype in the forward (to bfloat16 costs them about 0.4% an entry,
not re-orthonormalised), R stays float32 through `model.to(torch.bfloat16)`, loading and moving.

A and B are parameters and not buffers, because DistributedDataParallel broadcasts buffers in every forward pass.
Parameter names read "<layer>.lorasb_R.<adapter>.weight", as with LoRA, because TRL copies an adapter by that pattern.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    AuxiliaryTrainingWrapper,
    get_peft_model_state_dict,
    get_quantization_kwargs,
    register_peft_method,
    resolve_quantization_backend,
)
from peft.utils.quantization_utils import quantization_extra_repr
from safetensors.torch import save_file
from torch import Tensor, nn

from fedsb.adapters.basis import check_rank, random_pair, weight_pair
from fedsb.adapters.core import core_delta, core_forward, core_left
from fedsb.adapters.export import lora_targets
from fedsb.models.layers import find_targets, is_conv1d, is_linear, linear_shape, reads_weight
from fedsb.utils.errors import RunError, UserError, did_you_mean

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
        layers_to_transform, layers_pattern: indices of the blocks to adapt, and the name of the list that contains the
            blocks. They work with a list of target_modules and with the default.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        # Only a config file names the type. Its tensors are probably about to be loaded: the basis can wait.
        self.from_file = getattr(self, "peft_type", None) is not None
        self.peft_type = PeftType.LORASB
        if self.r < 1 or self.blocks < 1:
            raise UserError(f"r = {self.r} and blocks = {self.blocks}: both must be at least 1")
        if self.basis not in BASES:
            raise UserError(f"there is no basis {self.basis!r}; {did_you_mean(self.basis, BASES)}")
        if self.weights_side not in ("leading", "trailing"):
            raise UserError(f"weights_side = {self.weights_side!r}: choose 'leading' or 'trailing'")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise UserError(
                "`layers_to_transform` cannot be used when `target_modules` is a str. "
                f"Write target_modules = {self.target_modules!r} as a list of names, such as ['q_proj', 'v_proj']."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified. "
                f"Add the indices of the blocks in {self.layers_pattern!r} that should be adapted."
            )
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
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}


class Weight(nn.Module):
    """One tensor of one adapter, as a module, so that its name ends with ".<adapter>.weight"."""

    weight: nn.Parameter

    def __init__(self, value: Tensor, requires_grad: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(value, requires_grad=requires_grad)

    def extra_repr(self) -> str:
        return "x".join(str(size) for size in self.weight.shape)


class CoreWeight(Weight):
    """R (1, h, r, r) of one adapter. It is read in `forward`, so that FSDP can wrap it as a unit of its own."""

    def forward(self, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        return core_forward(x, A, B, self.weight, scale)


class LoraSBLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with core adapters by name; the active ones add up."""

    adapter_layer_names = ("lorasb_R",)
    other_param_names = ("lorasb_A", "lorasb_B", "lorasb_scale", "lorasb_pending")

    in_features: int
    out_features: int
    lorasb_R: Any  # ModuleDict of CoreWeight: (1, h, r, r)
    lorasb_A: Any  # ModuleDict of Weight: (h r, n)
    lorasb_B: Any  # ModuleDict of Weight: (m, h r)

    if TYPE_CHECKING:  # PEFT is untyped, and torch says that every attribute is a tensor or a module

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
        """Adds an adapter with R = 0, which leaves the model as it is. `key`, the layer's name, keys the random draw.

        The basis of a config that comes from a file is computed at the first use, unless A and B were loaded by then.
        """
        m, n = self.out_features, self.in_features
        self.lorasb_scale[adapter] = config.scale
        self.lorasb_A[adapter] = Weight(torch.full((config.rank, n), torch.nan))
        self.lorasb_B[adapter] = Weight(torch.full((m, config.rank), torch.nan))
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
        """Computes the bases that are pending, except those that were loaded or copied in the meantime."""
        for adapter, (config, key) in list(self.lorasb_pending.items()):
            A, B = self.lorasb_A[adapter].weight, self.lorasb_B[adapter].weight
            if A.is_meta:
                continue
            del self.lorasb_pending[adapter]
            if not A.isnan().all():
                continue
            if config.basis == "random":
                pair = random_pair(self.out_features, self.in_features, config.rank, config.seed, key)
            else:
                pair = weight_pair(self._oriented(self.get_base_weight()), config.rank, config.weights_side)
            A.copy_(pair[0])
            B.copy_(pair[1])

    @torch.no_grad()
    def set_basis(self, adapter: str, A: Tensor, B: Tensor, R0: Tensor | None = None) -> None:
        """Sets A (h r, n) and B (m, h r), and R to R0 (h, r, r), zero if not given."""
        slots = self.lorasb_A[adapter].weight, self.lorasb_B[adapter].weight
        if (A.shape, B.shape) != (slots[0].shape, slots[1].shape):
            given = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
            raise UserError(f"{given} do not fit: expected {tuple(slots[0].shape)} and {tuple(slots[1].shape)}")
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
        """Returns s x A' R' B', what the adapter adds to the layer's output, in the dtype of x."""
        if self.lorasb_pending:
            self.complete()
        A, B = self.lorasb_A[adapter].weight.to(x.dtype), self.lorasb_B[adapter].weight.to(x.dtype)
        output: Tensor = self.lorasb_R[adapter](x, A, B, self.lorasb_scale[adapter])
        return output

    def _add_by_row(self, x: Tensor, y: Tensor, names: list[str]) -> Tensor:
        """Adds to each row of the batch the output of the adapter named for it; other names mean the base alone."""
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
        """(m, n) <-> what the base stores; GPT-2's Conv1D stores the transpose."""
        return weight.T if is_conv1d(self.get_base_layer()) else weight

    def _shift_base(self, adapter: str, sign: float, check: bool = False) -> None:
        """W0 += sign * delta, in float32. A quantised base is quantised again, or PEFT raises where it cannot be."""
        W0 = self.get_base_weight()
        weight = (W0.float() + sign * self.get_delta_weight(adapter).to(W0.device)).to(W0.dtype)
        if check and not torch.isfinite(weight).all():
            raise UserError(  # the first sentence is PEFT's
                f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken. "
                "With basis = 'update' or 'given', set its basis before merging. Otherwise train it again."
            )
        self.set_base_weight(weight)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's own would also cast R to the base's dtype."""
        if adapter_name not in self.lorasb_R:
            return
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        tensors = [part[adapter_name].weight for part in (self.lorasb_A, self.lorasb_B, self.lorasb_R)]
        if device is not None and not any(tensor.is_meta for tensor in tensors):
            for tensor in tensors:
                tensor.data = tensor.data.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraSBLinear:
        """Moves what there is to move, but R keeps its float32 values through a cast of the whole model."""
        before = {adapter: R.weight.data for adapter, R in self.lorasb_R.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for adapter, R in self.lorasb_R.items():
            if R.weight.dtype != torch.float32:
                R.weight.data = before[adapter].to(R.weight.device)
        return self


class LoraSBModel(BaseTuner):  # type: ignore[misc]
    """Puts `LoraSBLinear` where the config says; all else is PEFT's."""

    prefix = "lorasb_"
    tuner_layer_cls = LoraSBLinear
    target_module_mapping: Mapping[str, list[str]] = {}

    def _prepare_adapter_config(self, config: LoraSBConfig, model_config: dict[str, Any]) -> LoraSBConfig:
        if config.target_modules is None:
            config.target_modules = self._default_targets(config)
        elif config.target_modules == "all-linear":
            names = _maybe_include_all_linear_layers(config, self.model).target_modules
            config.target_modules = {name for name in names if not reads_weight(self.model, name)}
        return config

    def _default_targets(self, config: LoraSBConfig) -> set[str]:
        """Returns the names of the linear layers of the blocks, of those in layers_to_transform where it is given."""
        try:
            found = find_targets(self.model)
        except UserError as error:
            raise UserError(
                "Please specify `target_modules`. By default every linear layer inside a list of blocks is adapted, "
                f"and this {type(self.model).__name__} has none."
            ) from error
        names = {name.removesuffix(".base_layer") for name in found}  # a layer that another adapter wraps
        if config.layers_to_transform is not None:  # PEFT looks at indices only where a name is matched by its ending
            names = {
                name
                for name in names
                if check_target_module_exists(replace(config, target_modules=[name.rpartition(".")[2]]), name)
            }
        return names

    def _prepare_model(self, config: LoraSBConfig, model: nn.Module) -> None:
        """Refuses what cannot be adapted before anything is changed."""
        inside = tuple(f"{key}." for key, module in model.named_modules() if isinstance(module, LoraSBLinear))
        shapes = {}
        for key, module in model.named_modules():
            if not key or key.startswith(inside) or not self._check_target_module_exists(config, key):
                continue
            base = module.get_base_layer() if isinstance(module, LoraSBLinear) else module
            if not is_linear(base) and resolve_quantization_backend(base, **get_quantization_kwargs(model)) is None:
                raise UserError(
                    f"target_modules matches {key!r}, a {type(base).__name__}: not a linear layer. "
                    "Only linear layers can be adapted: name them in target_modules, or the others in exclude_modules."
                )
            if reads_weight(model, key):
                raise UserError(
                    f"target_modules matches {key!r}. The model reads the weight of this layer without calling the "
                    "layer, so an adapter would not be trained. Leave it out of target_modules."
                )
            shapes[key] = linear_shape(base)
        check_rank(shapes, config.rank, "r x blocks", "exclude_modules")

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replaces the module and no more: `add` moves the adapter, and a head of several layers has no `weight`."""
        setattr(parent, child_name, new_module)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Completes pending bases in place before they are saved."""
        for module in model.modules():
            if isinstance(module, LoraSBLinear):
                module.complete()
        return cast("dict[str, Tensor]", super()._get_adapter_state_dict(model, *args, **kwargs))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Gives `adapter_names`, one per row of the batch ("__base__": no adapter), to the layers of this forward."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise UserError(
                "Cannot pass `adapter_names` when the model is in training mode. Call `model.eval()` before."
            )
        layers = [module for module in self.modules() if isinstance(module, (LoraSBLinear, AuxiliaryTrainingWrapper))]
        known = {"__base__", *self.peft_config}
        if unknown := sorted(set(names) - known):
            raise UserError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. "
                f"Known names: {', '.join(sorted(known))}."
            )
        encoder = getattr(self.model, "get_encoder", lambda: None)()
        in_encoder = set() if encoder is None or encoder is self.model else set(encoder.modules())
        beams = [name for name in names for _ in range(kwargs.get("num_beams") or 1)]  # the rows of a decoder's layers
        handles = [
            layer.register_forward_pre_hook(
                partial(_pass_adapter_names, names=names if layer in in_encoder else beams), with_kwargs=True
            )
            for layer in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"adapter_names": names}


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
    model_type = getattr(getattr(model.get_base_model(), "config", None), "model_type", "")
    target_modules, target_parameters = lora_targets(list(layers), model_type)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=target_modules,
        target_parameters=target_parameters,
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
        A, B, R = layer.factors(adapter_name)
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = core_left(B, R)
    return lora, tensors


def save_as_lora(model: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Writes the adapter as a plain LoRA folder that `PeftModel.from_pretrained` loads without fedsb.

    The folder is loaded again, onto a copy of the base that has no weights. Raises RunError if PEFT then adapts other
    layers, or adapts them differently.
    """
    config, tensors = to_lora(model, adapter_name)
    config.save_pretrained(str(folder))
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(tensors, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    loaded = PeftModel.from_pretrained(_without_weights(model), str(folder)).get_base_model()
    found = {name: module for name, module in loaded.named_modules() if isinstance(module, LoraLayer)}
    scale = model.peft_config[adapter_name].scale
    wrong = found.keys() ^ adapter_layers(model, adapter_name).keys()
    for name in found.keys() - wrong:
        A, B = found[name].lora_A["default"].weight, found[name].lora_B["default"].weight
        same = torch.equal(A.cpu(), tensors[f"base_model.model.{name}.lora_A.weight"])
        same &= torch.equal(B.cpu(), tensors[f"base_model.model.{name}.lora_B.weight"])
        if not same or not math.isclose(found[name].scaling["default"], scale):
            wrong.add(name)
    if wrong:
        raise RunError(
            f"PEFT does not load the adapter in {folder} as it was trained. {len(wrong)} layers differ, the first is "
            f"{min(wrong)!r}. Do not use this folder; this is a defect of fedsb, please report it with `fedsb env`."
        )


def _without_weights(model: Any) -> nn.Module:
    """Returns a copy of the base model whose parameters are zeros that take no memory.

    Quantised parameters and those of modules_to_save are copied as they are: PEFT reads or overwrites them.
    """
    saved = {id(p) for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper) for p in m.parameters()}
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
        for parameter in model.parameters()
        if type(parameter) is nn.Parameter and id(parameter) not in saved
    }
    base: nn.Module = copy.deepcopy(model, memo).unload()
    return base


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
