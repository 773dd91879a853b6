"""A base model with its adapter: which layers are adapted, and the adapter's tensors by name.

Keys are "<layer>.<tensor>", as in "bert.encoder.layer.0.attention.self.query.R" or "classifier.weight". A tensor that
several layers share has their name with "*" for the number (core.py). The base is frozen and in memory once; `load`
sets the tensors of one client or of several, stacked along a leading axis.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedsb.adapters.core import CoreLinear, key_of, tied_name
from fedsb.adapters.factors import FactorLinear
from fedsb.adapters.layer import AdaptedLinear, HeadLinear, Routing
from fedsb.models.layers import base_weight, linear_shape
from fedsb.utils.errors import UserError
from fedsb.utils.tensors import Shapes, Tensors

LAYERS: dict[str, type[AdaptedLinear]] = {"core": CoreLinear, "factors": FactorLinear}


class AdaptedModel:
    """A model whose chosen layers have an adapter, and whose head, if it has one, is trained too.

    Args:
        model: any torch module; it is changed in place and frozen.
        kind: "core" or "factors".
        targets: names of linear layers, from `find_targets`.
        head: names of modules trained in full (all their parameters must be those of linear layers).
        scale: s in W = W0 + s * (adapter).
        fingerprint: of the model's weights; empty: not known.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: str,
        targets: Sequence[str],
        head: Sequence[str] = (),
        scale: float = 1.0,
        fingerprint: str = "",
    ) -> None:
        self.model = model
        self.fingerprint = fingerprint
        self.kind = kind
        self.scale = scale
        self.routing = Routing()
        model.requires_grad_(False)
        # Views of a matrix's rows are strided, of which autograd warns; they are written in place all the same.
        warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
        self._parameters: dict[str, nn.Parameter] = {}  # made once, whatever is loaded into them
        self._placed: dict[str, tuple[Tensor, Tensor]] = {}  # key -> (a tensor elsewhere, its copy on the device)
        self.layers: dict[str, AdaptedLinear] = {}
        for name in targets:
            layer = LAYERS[kind](model.get_submodule(name), scale=scale, routing=self.routing, key=name)
            _replace(model, name, layer)
            self.layers[name] = layer
        self.heads: dict[str, HeadLinear] = {}
        for name in head_linears(model, head):
            base = model.get_submodule(name)
            assert isinstance(base, nn.Linear)
            self.heads[name] = HeadLinear(base, routing=self.routing, key=name)
            _replace(model, name, self.heads[name])

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def shapes(self) -> Shapes:
        """(m, n) of every adapted layer."""
        return {name: linear_shape(layer.base) for name, layer in self.layers.items()}

    def base_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, W0 (m, n)) of every adapted layer, one at a time."""
        for name, layer in self.layers.items():
            yield name, base_weight(layer.base)

    def head_tensors(self) -> Tensors:
        """Returns client 0's current head: "<layer>.weight" (m, n) and "<layer>.bias" (m,)."""
        slots = ((key, getattr(self.heads[name], attribute)) for key, name, attribute in _slots(self.heads))
        return {key: parameter.detach()[0].clone() for key, parameter in slots}

    def load(
        self,
        tensors: Mapping[str, Tensor],
        *,
        trainable: frozenset[str] = frozenset(),
        gradients: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Sets the adapter's and the head's tensors; those in `trainable`, or in `gradients`, are trained.

        A core's A (h r, n) and B (m, h r) and the residual adapter are shared by all clients; every other tensor has
        the axis of clients first. All are replaced, so that nothing of the client before remains. Parameters keep their
        identity, their data become the given tensors themselves, and backward adds to the given `gradients`. Raises
        ValueError if a tensor is missing or unknown.
        """
        needed = list(_slots({**self.layers, **self.heads}, tensors))
        optional = list(_slots(self.layers, tensors, optional=True))
        missing = {key for key, _, _ in needed} - tensors.keys()
        unknown = tensors.keys() - {key for key, _, _ in (*needed, *optional)}
        odd = [f"{key!r} is missing" for key in sorted(missing)] + [f"{key!r} is unknown" for key in sorted(unknown)]
        if odd:
            raise ValueError(f"{len(odd)} tensors do not fit the adapted model: {', '.join(odd[:3])}")
        gradients = gradients or {}
        for key, name, attribute in (*needed, *optional):
            layer = self.layers.get(name) or self.heads[name]
            value = self._on_device(key, tensors[key]) if key in tensors else None
            if value is None or self.is_shared(key):
                setattr(layer, attribute, value)
                continue
            parameter = self._parameters.setdefault(key, nn.Parameter(value, requires_grad=False))
            parameter.grad = None
            parameter.data = value
            parameter.requires_grad_(key in trainable or key in gradients)
            parameter.grad = gradients.get(key)
            if getattr(layer, attribute) is not parameter:
                setattr(layer, attribute, parameter)

    def _on_device(self, key: str, value: Tensor) -> Tensor:
        """Returns the tensor on the model's device.

        A shared tensor is moved once, in the dtype in which its layer computes, and again only if its values change.
        """
        if not self.is_shared(key):
            return value.detach().to(self.device)
        layer = self.layers[key.rsplit(".", 1)[0]]
        weight, dtype = layer.weight, self._compute_dtype(layer)
        dtype = dtype if dtype.itemsize == 2 else value.dtype
        if value.device == weight.device and value.dtype == dtype:
            return value.detach()
        known = self._placed.get(key)
        if known is None or not _same(known[0], value):
            known = self._placed[key] = (value, value.detach().to(weight.device, dtype))
        return known[1]

    def compute_dtypes(self, keys: Iterable[str]) -> dict[str, torch.dtype]:
        """Returns the dtype in which the model computes with each tensor. Heads compute in float32."""
        named: dict[str, AdaptedLinear] = {tied_name(name): layer for name, layer in self.layers.items()} | self.layers
        return {key: self._compute_dtype(named.get(key.rsplit(".", 1)[0])) for key in keys}

    def _compute_dtype(self, layer: AdaptedLinear | None) -> torch.dtype:
        if layer is None:  # of the head
            return torch.float32
        dtype = layer.weight.dtype
        if dtype.is_floating_point and dtype.itemsize >= 2:
            return dtype
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point() and p.dtype.itemsize >= 2)

    def sizes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Returns the names and shapes that one client's tensors must have, without the axis of clients.

        The ranks are those of `tensors`. `load` does not detect every wrong shape: a head (b, m, n) in place of (m, n)
        is broadcast, and one example's gradient then contains all examples.
        """
        wanted: dict[str, tuple[int, ...]] = {}
        for name, layer in self.layers.items():
            keys = {attribute: key for key, _, attribute in _slots({name: layer}, tensors)}
            keys |= {a: key for key, _, a in _slots({name: layer}, tensors, optional=True) if key in tensors}
            own = {attribute: tensors[key] for attribute, key in keys.items() if key in tensors}
            sizes = layer.sizes(own, *linear_shape(layer.base))
            wanted |= {key: sizes[attribute] for attribute, key in keys.items()}
        for name, head in self.heads.items():
            wanted[f"{name}.weight"] = head.out_features, head.in_features
            if head.bias is not None:
                wanted[f"{name}.bias"] = (head.out_features,)
        return wanted

    def is_shared(self, key: str) -> bool:
        """Returns whether all clients share this tensor, such as a core's A and B, or a residual adapter."""
        name, attribute = key.rsplit(".", 1)
        return name in self.layers and attribute in self.layers[name].shared

    @property
    def head_keys(self) -> frozenset[str]:
        return frozenset(key for key, _, _ in _slots(self.heads))

    def unwrap(self) -> nn.Module:
        """Removes the adapter and returns the original base model. This object cannot be used afterwards."""
        for name, layer in {**self.layers, **self.heads}.items():
            _replace(self.model, name, layer.base)
        return self.model

    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns the trained tensors by the keys under which they were loaded, each with the axis of clients first."""
        layers: dict[str, AdaptedLinear | HeadLinear] = {**self.layers, **self.heads}
        slots = (*_slots(layers), *_slots(self.layers, optional=True))
        loaded = {id(parameter): key for key, parameter in self._parameters.items()}
        parameters = ((key, getattr(layers[name], attribute)) for key, name, attribute in slots)
        return {loaded.get(id(p), key): p for key, p in parameters if isinstance(p, nn.Parameter) and p.requires_grad}


def _slots(
    layers: Mapping[str, AdaptedLinear | HeadLinear], known: Container[str] = (), *, optional: bool = False
) -> Iterator[tuple[str, str, str]]:
    """Yields (key, layer, attribute) of all tensors of the layers, by the keys that are known of them."""
    for name, layer in layers.items():
        for attribute in layer.optional if optional and isinstance(layer, AdaptedLinear) else layer.names:
            if isinstance(layer, HeadLinear) and getattr(layer, attribute) is None:
                continue
            yield key_of(name, attribute, known), name, attribute


def head_linears(model: nn.Module, head: Sequence[str]) -> list[str]:
    """Returns the linear layers inside the head's modules. Raises UserError if the head has other parameters."""
    found: list[str] = []
    for part in head:
        module = model.get_submodule(part)
        names = [f"{part}.{name}".rstrip(".") for name, sub in module.named_modules() if isinstance(sub, nn.Linear)]
        inside = {f"{name}.{tensor}" for name in names for tensor in ("weight", "bias")}
        strange = [f"{part}.{name}" for name, _ in module.named_parameters() if f"{part}.{name}" not in inside]
        if strange:
            raise UserError(
                f"The task head {part!r} contains {strange[0]!r}, which is not a linear layer and cannot be trained. "
                "Use a checkpoint with a linear head."
            )
        found += names
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)


def _replace(model: nn.Module, name: str, layer: Any) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
