"""Naive twins: each method as its paper writes it, on dense matrices with torch's own autograd and optimisers.

Nothing here comes from fedsb. A twin gets the same start, the same basis and the same batches, and must end where the
fast version ends.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

Tensors = dict[str, Tensor]
Batches = dict[str, list[list[dict[str, Tensor]]]]  # client -> round -> batches, each a model input with labels


def train_client(
    model: nn.Module,
    weights: dict[str, Tensor],  # parameter name -> its frozen value W0, as (out, in)
    delta,  # (layer name, the client's trained tensors) -> dense change of its weight, or None
    trained: dict[str, Tensor],
    batches: list[dict[str, Tensor]],
    lr: float,
    head_lr: float,
    clip: float,
    head: list[str],
) -> dict[str, Tensor]:
    """Local AdamW from `trained`, over the batches; gives back the client's trained tensors."""
    own = {key: value.clone().requires_grad_() for key, value in trained.items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for key, p in own.items() if key not in head], "lr": lr},
            {"params": [p for key, p in own.items() if key in head], "lr": head_lr},
        ],
        weight_decay=0.0,
    )
    for batch in batches:
        replaced = {f"{layer}.weight": W0 + delta(layer, own) for layer, W0 in weights.items()}
        replaced |= {key: own[key] for key in head}
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = functional_call(model, replaced, kwargs=inputs).logits
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(own.values()), clip)
        optimizer.step()
    return {key: value.detach() for key, value in own.items()}


def mean_of(clients: list[dict[str, Tensor]], p: list[float]) -> dict[str, Tensor]:
    return {key: sum(p_k * client[key] for p_k, client in zip(p, clients, strict=True)) for key in clients[0]}


def fed_sb(model, weights, A, B, R, mask, head, scale, batches: Batches, p, rounds, lr, head_lr, clip):
    """Algorithm of Fed-SB: R <- sum p_k R_k. A, B, R by layer; returns the dense change of every layer, and the head.

    `mask` makes R block-diagonal, for several blocks; of ones, it is the paper's.
    """

    def delta(layer, own):
        return scale * B[layer] @ (own[layer] * mask) @ A[layer]

    state = {**R, **head}
    for round in range(rounds):
        sent = [
            train_client(model, weights, delta, state, batches[client][round], lr, head_lr, clip, list(head))
            for client in batches
        ]
        state = mean_of(sent, p)
    return {layer: delta(layer, state) for layer in weights}, {key: state[key] for key in head}


def fedit(model, weights, A, B, head, scale, batches: Batches, p, rounds, lr, head_lr, clip):
    """Algorithm of FedIT: A <- sum p_k A_k and B <- sum p_k B_k, apart."""

    def delta(layer, own):
        return scale * own["B " + layer] @ own["A " + layer]

    state = {**{"A " + layer: A[layer] for layer in A}, **{"B " + layer: B[layer] for layer in B}, **head}
    for round in range(rounds):
        sent = [
            train_client(model, weights, delta, state, batches[client][round], lr, head_lr, clip, list(head))
            for client in batches
        ]
        state = mean_of(sent, p)
    return {layer: delta(layer, state) for layer in weights}, {key: state[key] for key in head}
