"""FLoRA-NA: the server mixes the clients' factors with two vectors, so that the product approximates the exact update.

    Ahat = sum_u P_u A_u,   Bhat = sum_u Q_u B_u,   (P, Q) = argmin ||M - s Bhat Ahat||_F,   M = sum_u p_u s B_u A_u

Paper: "FLoRA-NA: Nearly Accurate Aggregation for Federated Low-Rank Adaptation", arXiv 2509.26399. The paper does not
describe its solver. Here it is alternating least squares on the Gram blocks GB[u,v] = B_u' B_v and GA[u,v] = A_u A_v',
in float64, starting from P = Q = p, which is FedIT. The error therefore never exceeds that of FedIT.

Shapes, per layer: A_u (r, n), B_u (m, r), c clients; P and Q (c,). s = alpha / r.
What travels: A and B, up and down: r (m + n) values, as in FedIT.
Limits: the server sees every client's factors. Not exact: Bhat Ahat is never closer than the best approximation of rank
r. Each round logs the errors of FedIT, of FLoRA-NA and, if `best_error` is set, of the best rank-r matrix (one SVD of
c r x c r per layer), relative to ||M||_F over all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedsb.adapters.low_rank import product_svd
from fedsb.config.section import Positive
from fedsb.methods.averaging import ServerOptimizer, average, weighted_stack
from fedsb.methods.base import MethodSpec, State, Update
from fedsb.methods.fedit import FedIT, layers_of


class FLoRANA(FedIT):
    spec: ClassVar[MethodSpec] = MethodSpec(
        id="flora-na",
        paper="FLoRA-NA, arXiv 2509.26399",
        travels="A and B up; their mixtures down",
        adapter="factors",
        exact=False,
        secagg_compatible=False,
        supports_server_optimizer=False,
        dp_noise="quadratic",
    )
    sweeps: Positive = 30
    """Maximum number of sweeps of alternating least squares."""
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6
    """Relative decrease of the error below which the sweeps stop."""
    best_error: bool = True
    """Whether to log the error of the best rank-r matrix."""

    def aggregate(self, state: State, updates: Sequence[Update], server: ServerOptimizer) -> State:
        ordered = sorted(updates, key=lambda update: update.client)
        tensors = {**state.tensors, **average(ordered, state.tensors)}
        p = torch.tensor([update.weight for update in ordered], dtype=torch.float64)
        p /= p.sum()
        squares = torch.zeros(4, dtype=torch.float64)  # ||M||^2, and the squared errors of fedit, flora-na, the best
        for layer in layers_of(tensors):
            A_urn, B_umr = (torch.stack([u.tensors[f"{layer}.{name}"].double() for u in ordered]) for name in "AB")
            GA, GB = torch.einsum("urn,vqn->uvrq", A_urn, A_urn), torch.einsum("umr,vmq->uvrq", B_umr, B_umr)
            P, Q, *errors = solve(GA, GB, p, self.sweeps, self.tolerance)
            tensors[f"{layer}.A"] = torch.einsum("u,urn->rn", P, A_urn).to(tensors[f"{layer}.A"])
            tensors[f"{layer}.B"] = torch.einsum("u,umr->mr", Q, B_umr).to(tensors[f"{layer}.B"])
            best = torch.zeros((), dtype=torch.float64)
            if self.best_error:
                best = product_svd(*weighted_stack(ordered, layer, 1.0))[1][self.rank :].square().sum()
            squares += torch.stack([*errors, best])
        relative = (squares[1:] / squares[0].clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0).sqrt()
        names = ["error_fedit", "error_flora_na", *(["error_best_rank_r"] if self.best_error else [])]
        metrics = dict(zip(names, relative.tolist(), strict=False))
        return replace(state, round=state.round + 1, tensors=tensors, metrics=metrics)


def solve(
    GA: Tensor,  # (c, c, r, r): GA[u, v] = A_u A_v'
    GB: Tensor,  # (c, c, r, r): GB[u, v] = B_u' B_v
    p: Tensor,  # (c,) weights that sum to 1
    sweeps: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns P, Q (c,), ||M||_F^2, and the squared error ||M - Bhat Ahat||_F^2 of FedIT (P = Q = p) and of the result.

    Given P, the error is quadratic in Q: Q' H Q - 2 b' Q + ||M||^2, with H_uv = <GB[u,v], S>, S = sum P_u P_v GA[u,v],
    b_u = sum_w p_w <GB[u,w], T_w> and T_w = sum_u P_u GA[u,w]. The same is true with P and Q exchanged. A ridge of
    1e-8 tr(H), centred on the last iterate, keeps H invertible and the error decreasing. At the end, the scale between
    P and Q is chosen such that ||Ahat|| = ||Abar||.
    """
    P, Q = p.clone(), p.clone()
    norm = torch.einsum("u,uv,v->", p, (GB * GA).sum((-2, -1)), p)
    fedit = before = _error(GA, GB, p, p, p, norm)
    for _ in range(sweeps):
        Q = _best(GB, GA, P, Q, p)
        P = _best(GA, GB, Q, P, p)
        now = _error(GA, GB, P, Q, p, norm)
        if before - now <= tolerance * before:
            break
        before = now
    scale = (_norm(GA, p) / _norm(GA, P)).sqrt()
    if not torch.isfinite(scale) or scale == 0:
        return p, p, norm, fedit, fedit
    P, Q = P * scale, Q / scale
    ours = _error(GA, GB, P, Q, p, norm)
    return (P, Q, norm, fedit, ours) if ours <= fedit else (p, p, norm, fedit, fedit)


def _best(G: Tensor, F: Tensor, fixed: Tensor, last: Tensor, p: Tensor) -> Tensor:
    """Returns the best mixture of the factors with Gram blocks G; those with F are mixed by `fixed`."""
    T_wrq = torch.einsum("v,vwrq->wrq", fixed, F)
    S = torch.einsum("w,wrq->rq", fixed, T_wrq)
    H = torch.einsum("uvrq,rq->uv", G, S)
    if not H.trace() > 0:
        return last
    b = torch.einsum("uwrq,wrq->u", G, p[:, None, None] * T_wrq)
    ridge = 1e-8 * H.trace() * torch.eye(len(p), dtype=H.dtype)
    best: Tensor = torch.linalg.solve(H + ridge, b + ridge @ last)
    return best


def _error(GA: Tensor, GB: Tensor, P: Tensor, Q: Tensor, p: Tensor, norm: Tensor) -> Tensor:
    """Returns ||M - Bhat Ahat||_F^2, computed from the Gram blocks."""
    T_wrq = torch.einsum("v,vwrq->wrq", P, GA)
    U_wrq = torch.einsum("u,uwrq->wrq", Q, GB)
    cross = (p[:, None, None] * T_wrq * U_wrq).sum()
    return (torch.einsum("w,wrq->rq", Q, U_wrq) * torch.einsum("w,wrq->rq", P, T_wrq)).sum() - 2 * cross + norm


def _norm(G: Tensor, mix: Tensor) -> Tensor:
    """Returns ||sum_u mix_u X_u||_F^2."""
    squares: Tensor = mix @ torch.einsum("uvrr->uv", G) @ mix
    return squares
