"""Bases for the core adapter: where B and A come from, what they cost, and what they looked at.

    random         orthonormal: QR of a Gaussian; looks at nothing, a seed is all that sites share
    weights        the leading (or trailing) singular vectors of W0, which every site has
    update         the leading singular vectors of the first full step D = -eta sign(G), on public data; B and A
                   go down once (LoRA-SB, Ponkshe et al., arXiv 2411.19557)
    update-pooled  the same over all clients' raw data, as the authors' code does; simulation only
    core           the leading singular directions of S = sum_k U' G_k V inside a data-free basis U, V of rank
                   k > r: each client sends k^2 values, and gets 2 k r back

G = dL/dW (m, n) is the gradient of the summed loss, a sample counting once. `core` never forms it: U' G V is the
gradient of the core of a rank-k adapter at R = 0. A is (h r, n), B is (m, h r), with orthonormal rows and columns, so
h blocks lie in orthogonal subspaces. Signs are canonical: the largest entry of each column of B is positive (of A's
row, for bases in which A is drawn apart).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedsb.adapters.residual import is_residual
from fedsb.utils.errors import UserError
from fedsb.utils.rng import keyed_generator

Pair = tuple[Tensor, Tensor]  # A (k, n), B (m, k)
EXACT_SIZE = 1024  # min(m, n) up to which W0 is decomposed whole


@dataclass(frozen=True, kw_only=True)
class BasisSpec:
    """What `fedsb ls bases` and `fedsb check` know of a basis. Values are a client's, for one layer."""

    id: str
    looks_at: Literal["nothing", "the weights", "public data", "private data"]
    up: str = "0"
    down: str = "0"
    passes: str = "none"  # over which data
    simulation_only: bool = False


BASES = {
    facts.id: facts
    for facts in (
        BasisSpec(id="random", looks_at="nothing"),
        BasisSpec(id="weights", looks_at="the weights"),
        BasisSpec(id="update", looks_at="public data", down="h r (m + n)", passes="a pass over the public samples"),
        BasisSpec(
            id="update-pooled",
            looks_at="private data",
            down="h r (m + n)",
            passes="a pass over samples of all clients",
            simulation_only=True,
        ),
        BasisSpec(
            id="core", looks_at="private data", up="k^2", down="2 k h r", passes="a pass over each client's samples"
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Basis:
    """A and B of every layer, with the start of R and the bill."""

    kind: str
    A: Mapping[str, Tensor]  # layer -> (h r, n)
    B: Mapping[str, Tensor]  # layer -> (m, h r)
    R0: Mapping[str, Tensor] = field(default_factory=dict)  # layer -> (h r,), the diagonal of R at the start; empty: 0
    up: int = 0  # values each client sent
    down: int = 0  # values each client received
    captured: Mapping[str, float] = field(default_factory=dict)  # layer -> share of ||G||^2 inside the basis
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        pairs = {f"{layer}.A": self.A[layer] for layer in self.A}
        return pairs | {f"{layer}.B": self.B[layer] for layer in self.B}

    def start(self, blocks: int, rank: int) -> dict[str, Tensor]:
        """R before round 0, by layer: "<layer>.R" (h, r, r), diagonal, zero unless the basis gives a start."""
        return {
            f"{layer}.R": torch.diag_embed(self.R0[layer].reshape(blocks, rank))
            if layer in self.R0
            else torch.zeros(blocks, rank, rank)
            for layer in self.A
        }


def basis_hash(tensors: Mapping[str, Tensor]) -> str:
    """Names the exact bytes of what is common to all sites; an averaged R over different bases is meaningless.

    A carried adapter is left out: every site adds it up for itself, and their last bits may differ.
    """
    digest = hashlib.sha256()
    for key in sorted(key for key in tensors if not is_residual(key)):
        digest.update(key.encode())
        digest.update(tensors[key].contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def check_rank(
    shapes: Mapping[str, tuple[int, int]], rank: int, what: str = "rank x blocks", targets: str = "model.target_modules"
) -> None:
    """Raises UserError where a layer is too small for an orthonormal basis of this rank."""
    small = {name: shape for name, shape in shapes.items() if rank > min(shape)}
    if small:
        name, (m, n) = next(iter(small.items()))
        raise UserError(
            f"{what} = {rank} is above min(m, n) in {len(small)} of {len(shapes)} layers; the first is {name!r}, "
            f"{m} x {n}. Choose at most {min(min(shape) for shape in small.values())}, or leave those layers out "
            f"with {targets}"
        )


# --- one function a kind, layer by layer ---


def random_pair(m: int, n: int, rank: int, seed: int, layer: str, round: int = 0) -> Pair:
    """`random`: orthonormal A and B from a Gaussian keyed by (seed, layer, round), in float64 on the CPU."""
    draw = keyed_generator(seed, "random basis", layer, *([round] if round else []))
    B = np.linalg.qr(draw.standard_normal((m, rank)))[0]
    A = np.linalg.qr(draw.standard_normal((n, rank)))[0].T
    B *= _signs(B, axis=0)
    A *= _signs(A, axis=1)
    return torch.from_numpy(A).float().contiguous(), torch.from_numpy(B).float().contiguous()


def weight_pair(W0: Tensor, rank: int, side: Literal["leading", "trailing"] = "leading") -> Pair:
    """`weights`: `rank` singular vectors of W0 (m, n), from the large or the small end, in float64.

    The leading ones of a layer above EXACT_SIZE by subspace iteration from a fixed sketch: a full SVD of 4096 x 14336
    takes minutes, and any subspace near the leading one serves, if all sites have the same.
    """
    if side == "leading" and min(W0.shape) > EXACT_SIZE:
        U, _, V = truncated_svd(W0.double(), rank)
        return V.T.float().contiguous(), U.float().contiguous()
    U, _, V = svd(W0.double())
    columns = slice(0, rank) if side == "leading" else slice(-rank, None)
    return V[:, columns].T.float().contiguous(), U[:, columns].float().contiguous()


def update_pair(G: Tensor, rank: int, eta: float, sign: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`update`: A, B and diag(R0) of the first full step D from the gradient G (m, n): -eta sign(G), or -eta G.

    D ~ B diag(S) A, its truncated SVD, so that training starts one approximate full step from W0.
    """
    D = -eta * (G.sign() if sign else G)
    U, S, V = truncated_svd(D, rank)
    return V.T.contiguous(), U.contiguous(), S


def core_pair(S: Tensor, outer: Pair, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """`core`, the server's part: A, B and the singular values of S = sum_k U' G_k V (k, k).

    U (m, k) is the B and V' (k, n) the A of `outer`, so that B' G A' = diag(D_r) for the summed gradient G.
    """
    A, B = outer
    P, D, Q = svd(S.double())
    P, Q = P[:, :rank].to(B.dtype), Q[:, :rank].to(A.dtype)
    return (Q.T @ A).contiguous(), (B @ P).contiguous(), D[:rank].float()


def orthonormal(M: Tensor) -> Tensor:
    """Orthonormal columns with the span of M's, (m, q), and near them: what a codec makes of a basis, put right."""
    Q, T = torch.linalg.qr(M.double())
    turned: Tensor = Q * torch.where(T.diagonal() < 0, -1.0, 1.0)
    return turned.float()


def captured_energy(G: Tensor, A: Tensor, B: Tensor, blocks: int = 1) -> tuple[float, float]:
    """(sum_i ||B_i' G A_i'||^2, ||G||^2) of a gradient G (m, n): the basis captures the first of the second."""
    inside = sum(
        float((B_i.T @ G @ A_i.T).square().sum())
        for A_i, B_i in zip(A.chunk(blocks, dim=0), B.chunk(blocks, dim=1), strict=True)
    )
    return inside, float(G.square().sum())


# --- singular vectors with one sign ---


def svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, q), S (q,), V (n, q) with M = U diag(S) V' and q = min(m, n); canonical signs."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    signs = torch.from_numpy(_signs(U.detach().cpu().numpy(), axis=0)).to(U)
    return U * signs, S, Vh.mT * signs


def truncated_svd(M: Tensor, rank: int, oversample: int = 16, iterations: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` of `svd`, by randomised subspace iteration where that is cheaper.

    Halko, Martinsson, Tropp, "Finding Structure with Randomness", SIAM Review 2011, algorithm 4.4.
    """
    m, n = M.shape
    width = rank + max(oversample, rank // 2)
    if width * 4 >= min(m, n):
        U, S, V = svd(M)
        return U[:, :rank], S[:rank], V[:, :rank]
    sketch = torch.from_numpy(keyed_generator(0, "sketch", m, n).standard_normal((n, width))).to(M)
    Q = torch.linalg.qr(M @ sketch)[0]
    for _ in range(iterations):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.mT @ Q)[0])[0]
    U, S, V = svd(Q.mT @ M)
    U = Q @ U
    signs = torch.from_numpy(_signs(U.cpu().numpy(), axis=0)).to(U)
    return (U * signs)[:, :rank], S[:rank], (V * signs)[:, :rank]


def _signs(M: np.ndarray, axis: int) -> np.ndarray:
    """+1 or -1 for each vector along `axis`, so that its largest entry becomes positive; shaped to multiply."""
    largest = np.take_along_axis(M, np.abs(M).argmax(axis=axis, keepdims=True), axis=axis)
    return np.where(largest < 0, -1.0, 1.0).astype(M.dtype)


def make_basis(kind: str, pairs: Iterable[tuple[str, Pair]]) -> Basis:
    """A basis without a start for R and without a bill, from its layers."""
    built = dict(pairs)
    return Basis(
        kind=kind, A={name: A for name, (A, _) in built.items()}, B={name: B for name, (_, B) in built.items()}
    )
