"""Bases for the core adapter: how B and A are made, what they cost, and which data they depend on.

    random         orthonormal: QR of a Gaussian, drawn from the seed
    weights        the leading (or trailing) singular vectors of W0, which every client has
    update         the leading singular vectors of the first full step D = -eta sign(G), on public data; B and A
                   are sent to the clients once (LoRA-SB, Ponkshe et al., arXiv 2411.19557)
    update-pooled  the same over all clients' raw data, as in the authors' code; simulation only
    core           the leading singular directions of S = sum_k U' G_k V inside a data-free basis U, V of rank
                   k > r: each client sends k^2 values and receives 2 k r

G = dL/dW (m, n) is the gradient of the summed loss, where each sample counts once. `core` never computes it: U' G V is
the gradient of the core of a rank-k adapter at R = 0.

Shapes: A is (h r, n) with orthonormal rows, B is (m, h r) with orthonormal columns; the h blocks lie in orthogonal
subspaces. Signs are canonical: the largest entry of each column of B is positive (also of each row of A, if A is drawn
independently).
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
EXACT_SIZE = 512  # min(m, n) up to which the full SVD of W0 is computed: a small model's takes a few seconds
SKETCH_TOLERANCE = 1e-5  # relative; of the same float64 computation on different hardware


@dataclass(frozen=True, kw_only=True)
class BasisSpec:
    """The properties of a kind of basis. Values are per client and layer."""

    id: str
    looks_at: Literal["nothing", "the weights", "public data", "private data"]
    up: str = "0"
    down: str = "0"
    passes: str = "none"  # over which data, in words
    simulation_only: bool = False


BASES = {
    spec.id: spec
    for spec in (
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
    """A and B of every layer, with the initial R and the costs."""

    kind: str
    A: Mapping[str, Tensor]  # layer -> (h r, n)
    B: Mapping[str, Tensor]  # layer -> (m, h r)
    R0: Mapping[str, Tensor] = field(default_factory=dict)  # layer -> (h r,), the diagonal of the initial R; empty: 0
    up: int = 0  # values that each client sent
    down: int = 0  # values that each client received
    captured: Mapping[str, float] = field(default_factory=dict)  # layer -> share of ||G||^2 inside the basis
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The shared tensors "<layer>.A" and "<layer>.B"."""
        pairs = {f"{layer}.A": self.A[layer] for layer in self.A}
        return pairs | {f"{layer}.B": self.B[layer] for layer in self.B}

    def start(self, blocks: int, rank: int) -> dict[str, Tensor]:
        """Returns the initial "<layer>.R" (h, r, r): diagonal, and zero unless the basis sets it."""
        return {
            f"{layer}.R": torch.diag_embed(self.R0[layer].reshape(blocks, rank))
            if layer in self.R0
            else torch.zeros(blocks, rank, rank)
            for layer in self.A
        }


def basis_hash(tensors: Mapping[str, Tensor]) -> str:
    """Returns a hash of the shared tensors. An average of R over different bases has no meaning.

    The residual adapter is left out: every client computes it by itself, and its last bits may differ.
    """
    digest = hashlib.sha256()
    for key in sorted(key for key in tensors if not is_residual(key)):
        digest.update(key.encode())
        digest.update(tensors[key].contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def basis_sketch(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns "<key>.sketch" of each shared tensor: its product with a random vector along its longest axis.

    A x (h r,) and B'y (h r,) are small, and they differ if a basis vector differs. The residual adapter is left out.
    """
    found = {}
    for key in sorted(key for key in tensors if not is_residual(key)):
        M = tensors[key].cpu().double()
        axis = max(range(M.dim()), key=lambda i: M.shape[i])
        x = torch.from_numpy(keyed_generator(0, "basis sketch", key).standard_normal(M.shape[axis]))
        found[f"{key}.sketch"] = torch.tensordot(M, x, dims=([axis], [0])).float()
    return found


def same_sketch(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Returns whether two sketches are of the same tensors, up to the rounding of different hardware."""
    if {key: x.shape for key, x in one.items()} != {key: x.shape for key, x in other.items()}:
        return False
    return all(float((x - other[key]).norm()) <= SKETCH_TOLERANCE * float(other[key].norm()) for key, x in one.items())


def check_rank(
    shapes: Mapping[str, tuple[int, int]],
    total_rank: int,
    what: str = "rank x blocks",
    targets: str = "model.target_modules",
) -> None:
    """Raises UserError if a layer is too small for an orthonormal basis of this total rank."""
    small = {name: shape for name, shape in shapes.items() if total_rank > min(shape)}
    if small:
        name, (m, n) = next(iter(small.items()))
        raise UserError(
            f"{what} = {total_rank} is above min(m, n) in {len(small)} of {len(shapes)} layers; the first is {name!r}, "
            f"{m} x {n}. Choose at most {min(min(shape) for shape in small.values())}, or leave those layers out "
            f"with {targets}."
        )


# --- one function per kind, for one layer ---


def random_pair(m: int, n: int, total_rank: int, seed: int, layer: str, round: int = 0) -> Pair:
    """Returns A and B of `random`, from a Gaussian keyed by (seed, layer, round), in float64 on the CPU."""
    draw = keyed_generator(seed, "random basis", layer, *([round] if round else []))
    B = np.linalg.qr(draw.standard_normal((m, total_rank)))[0]
    A = np.linalg.qr(draw.standard_normal((n, total_rank)))[0].T
    B *= _signs(B, axis=0)
    A *= _signs(A, axis=1)
    return torch.from_numpy(A).float().contiguous(), torch.from_numpy(B).float().contiguous()


def weight_pair(W0: Tensor, total_rank: int, side: Literal["leading", "trailing"] = "leading") -> Pair:
    """Returns A and B of `weights`: singular vectors of W0 (m, n), with the largest or smallest values, on the CPU.

    Above EXACT_SIZE, the leading ones are computed by subspace iteration from a fixed sketch: a full SVD of
    4096 x 14336 takes minutes, and an approximation is sufficient if all clients have the same one. All is computed in
    float64 on the device of W0 (on the CPU for MPS, which has no float64), so that devices agree to float32 rounding.
    """
    W0 = W0.cpu() if W0.device.type == "mps" else W0
    if side == "leading" and min(W0.shape) > EXACT_SIZE:
        U, _, V = truncated_svd(W0.double(), total_rank)
        return V.T.float().cpu().contiguous(), U.float().cpu().contiguous()
    U, _, V = svd(W0.double())
    columns = slice(0, total_rank) if side == "leading" else slice(-total_rank, None)
    return V[:, columns].T.float().cpu().contiguous(), U[:, columns].float().cpu().contiguous()


def update_pair(G: Tensor, total_rank: int, eta: float, sign: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns A, B and diag(R0) of `update`, from the gradient G (m, n).

    The first full step D is -eta sign(G), or -eta G. Its truncated SVD is B diag(S) A, so that training starts one
    approximate full step from W0.
    """
    D = -eta * (G.sign() if sign else G)
    U, S, V = truncated_svd(D, total_rank)
    return V.T.contiguous(), U.contiguous(), S


def core_pair(S: Tensor, outer: Pair, total_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns A, B and the singular values of S = sum_k U' G_k V (k, k): the server's part of `core`.

    U (m, k) is B and V' (k, n) is A of `outer`. For the summed gradient G, B' G A' = diag(D_r).
    """
    A, B = outer
    P, D, Q = svd(S.double())
    P, Q = P[:, :total_rank].to(B.dtype), Q[:, :total_rank].to(A.dtype)
    return (Q.T @ A).contiguous(), (B @ P).contiguous(), D[:total_rank].float()


def orthonormal(M: Tensor) -> Tensor:
    """Returns orthonormal columns (m, q) with the span of M. They correct a basis that a lossy codec has changed."""
    Q, T = torch.linalg.qr(M.double())
    result: Tensor = Q * torch.where(T.diagonal() < 0, -1.0, 1.0)
    return result.float()


def captured_energy(G: Tensor, A: Tensor, B: Tensor, blocks: int = 1) -> tuple[float, float]:
    """Returns sum_i ||B_i' G A_i'||^2, the part of a gradient G (m, n) that the basis captures, and ||G||^2."""
    inside = sum(
        float((B_i.T @ G @ A_i.T).square().sum())
        for A_i, B_i in zip(A.chunk(blocks, dim=0), B.chunk(blocks, dim=1), strict=True)
    )
    return inside, float(G.square().sum())


# --- singular vectors with canonical signs ---


def svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U (m, q), S (q,), V (n, q) with M = U diag(S) V' and q = min(m, n)."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    signs = torch.from_numpy(_signs(U.detach().cpu().numpy(), axis=0)).to(U)
    return U * signs, S, Vh.mT * signs


def sketch_width(m: int, n: int, rank: int) -> int | None:
    """Returns the width of the sketch of `truncated_svd`; None if an exact SVD of m x n is cheaper."""
    width = rank + max(16, rank // 2)
    return width if width * 4 < min(m, n) else None


def truncated_svd(M: Tensor, rank: int, iterations: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the leading `rank` singular triplets, by randomised subspace iteration if that is cheaper.

    Halko, Martinsson, Tropp, "Finding Structure with Randomness", SIAM Review 2011, algorithm 4.4.
    """
    m, n = M.shape
    width = sketch_width(m, n, rank)
    if width is None:
        U, S, V = svd(M)
        return U[:, :rank], S[:rank], V[:, :rank]
    sketch = torch.from_numpy(keyed_generator(0, "sketch", m, n).standard_normal((n, width))).to(M)
    Q = torch.linalg.qr(M @ sketch)[0]
    for _ in range(iterations):
        Z = M.mT @ Q
        if M.dtype != torch.float64:  # which keeps the directions apart through two products
            Z = torch.linalg.qr(Z)[0]
        Q = torch.linalg.qr(M @ Z)[0]
    U, S, V = svd(Q.mT @ M)
    U = Q @ U
    signs = torch.from_numpy(_signs(U.cpu().numpy(), axis=0)).to(U)
    return (U * signs)[:, :rank], S[:rank], (V * signs)[:, :rank]


def _signs(M: np.ndarray, axis: int) -> np.ndarray:
    """Returns +1 or -1 for each vector along `axis`, such that its largest entry becomes positive."""
    largest = np.take_along_axis(M, np.abs(M).argmax(axis=axis, keepdims=True), axis=axis)
    return np.where(largest < 0, -1.0, 1.0).astype(M.dtype)


def make_basis(kind: str, pairs: Iterable[tuple[str, Pair]]) -> Basis:
    """Returns a basis from its layers, with R = 0 and without costs."""
    built = dict(pairs)
    return Basis(
        kind=kind, A={name: A for name, (A, _) in built.items()}, B={name: B for name, (_, B) in built.items()}
    )
