"""LoRA-SB as a PEFT tuner: the core adapter on one machine, with the ordinary Trainer.

    model = get_peft_model(model, LoraSBConfig(r=64, basis="weights"))
    W = W0 + s * sum_i B_i R_i A_i          only R trains: h r^2 values per layer

Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
Fine-Tuning", arXiv 2411.19557. The layer runs `core_forward`, as federated rounds do. A checkpoint contains A, B and R,
so loading one needs no linear algebra. Import this module before `PeftModel.from_pretrained`: it registers the method
with PEFT. To load without fedsb, see `peft_export.save_as_lora`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

from peft import PeftType
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import (
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
    register_peft_method,
    resolve_quantization_backend,
)
from torch import Tensor, nn

from fedsb.adapters.basis import check_rank
from fedsb.adapters.peft_config import LoraSBConfig
from fedsb.adapters.peft_layer import LoraSBLinear
from fedsb.models.layers import find_targets, is_linear, linear_shape, reads_weight
from fedsb.utils.errors import UserError

__all__ = ["LoraSBConfig", "LoraSBLinear", "LoraSBModel"]


class LoraSBModel(BaseTuner):  # type: ignore[misc]
    """Replaces the target layers by `LoraSBLinear`. Everything else is inherited from PEFT."""

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
        """Returns the names of the linear layers in the blocks, or in those of layers_to_transform if it is set."""
        try:
            found = find_targets(self.model)
        except UserError as error:
            raise UserError(
                "Please specify `target_modules`. By default every linear layer inside a list of blocks is adapted, "
                f"and this {type(self.model).__name__} has none."
            ) from error
        names = {name.removesuffix(".base_layer") for name in found}  # if another adapter wraps the layer
        if config.layers_to_transform is not None:  # PEFT checks indices only for names that are matched by endings
            names = {
                name
                for name in names
                if check_target_module_exists(replace(config, target_modules=[name.rpartition(".")[2]]), name)
            }
        return names

    def _prepare_model(self, config: LoraSBConfig, model: nn.Module) -> None:
        """Raises UserError for layers that cannot be adapted, before anything is changed."""
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
        check_rank(shapes, config.total_rank, "r x blocks", "exclude_modules")

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replaces the module only. `add` moves the adapter, and a head of several layers has no `weight`."""
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
        """Passes `adapter_names`, one per row of the batch ("__base__": no adapter), to the layers of this forward."""
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


def register() -> None:
    """Registers LORASB with PEFT, once. PeftType is a closed enum, so its member is added by hand."""
    if "LORASB" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "LORASB")
    member._name_ = member._value_ = "LORASB"
    member.__objclass__, member._sort_order_ = PeftType, len(PeftType)
    PeftType._member_names_.append("LORASB")
    PeftType._member_map_["LORASB"] = PeftType._value2member_map_["LORASB"] = member
    type.__setattr__(PeftType, "LORASB", member)
    register_peft_method(name="lorasb", prefix="lorasb_", config_cls=LoraSBConfig, model_cls=LoraSBModel)


register()
