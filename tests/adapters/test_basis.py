"""The linear algebra of bases, against dense matrices whose singular vectors are known."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedsb.adapters.basis import (
    BASES,
    Basis,
    Pair,
    basis_hash,
    basis_sketch,
    captured_energy,
    check_rank,
    core_pair,
    make_basis,
    random_pair,
    same_sketch,
    svd,
    truncated_svd,
    update_pair,
    weight_pair,
)
from fedsb.utils.errors import UserError

M, N, RANK, K = 24, 30, 4, 12


def matrix(m: int = M, n: int = N, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def spectrum(m: int, n: int, S: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """M = U diag(S) V' with random orthonormal U, V; float64."""
    U = torch.linalg.qr(matrix(m, len(S), seed).double())[0]
    V = torch.linalg.qr(matrix(n, len(S), seed + 1).double())[0]
    return U @ S.double().diag() @ V.T, U, V


def core(G: Tensor, outer: Pair, rank: int = RANK) -> tuple[Tensor, Tensor, Tensor]:
    A, B = outer
    return core_pair(B.T @ G @ A.T, outer, rank)


MADE: dict[str, Callable[[Tensor], Pair]] = {
    "random": lambda G: random_pair(*G.shape, RANK, 0, "layer"),
    "weights": lambda G: weight_pair(G, RANK),
    "weights, trailing": lambda G: weight_pair(G, RANK, "trailing"),
    "update": lambda G: update_pair(G, RANK, 0.1, sign=True)[:2],
    "update, of an SGD step": lambda G: update_pair(G, RANK, 0.1, sign=False)[:2],
    "core": lambda G: core(G, weight_pair(matrix(*G.shape, seed=9), K))[:2],
}


def projector(rows: Tensor) -> Tensor:
    return rows.T @ rows


@pytest.mark.parametrize("shape", [(M, N), (N, M), (60, 8)], ids=str)
@pytest.mark.parametrize("kind", MADE)
def test_orthonormal_float32_and_reproducible(kind: str, shape: tuple[int, int]) -> None:
    m, n = shape
    if kind == "core" and min(shape) < K:
        pytest.skip("the outer basis is wider than this layer")
    G = matrix(m, n)
    A, B = MADE[kind](G)
    assert A.shape == (RANK, n) and B.shape == (m, RANK)
    assert A.dtype == B.dtype == torch.float32
    assert A.is_contiguous() and B.is_contiguous()
    assert float((A @ A.T - torch.eye(RANK)).abs().max()) < 1e-5
    assert float((B.T @ B - torch.eye(RANK)).abs().max()) < 1e-5
    again = MADE[kind](G.clone())
    assert torch.equal(A, again[0]) and torch.equal(B, again[1])


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind != "core"])
def test_signs_are_canonical(kind: str) -> None:
    """The largest entry of each column of B is positive."""
    _, B = MADE[kind](matrix())
    assert (B.gather(0, B.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind != "update"])
def test_rounding_errors_do_not_turn_the_basis(kind: str) -> None:
    """A sign matrix is left out: an entry near zero may change its sign."""
    G = matrix()
    A, B = MADE[kind](G)
    A2, B2 = MADE[kind](G * (1 + 1e-7 * matrix(seed=5)))
    torch.testing.assert_close(A2, A, rtol=0, atol=1e-4)
    torch.testing.assert_close(B2, B, rtol=0, atol=1e-4)


def test_another_process_makes_the_same_basis() -> None:
    script = (
        "import torch, sys; sys.path.insert(0, 'tests/adapters')\n"
        "from test_basis import MADE, matrix; from fedsb.adapters.basis import basis_hash, make_basis\n"
        "for kind, make in MADE.items():\n"
        "    print(kind, basis_hash(make_basis('x', [('layer', make(matrix()))]).tensors))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    here = [f"{kind} {basis_hash(make_basis('x', [('layer', make(matrix()))]).tensors)}" for kind, make in MADE.items()]
    assert ran.stdout.splitlines() == here


def test_random_differs_by_layer_and_seed() -> None:
    first = random_pair(M, N, RANK, 0, "a")
    for other in (random_pair(M, N, RANK, 0, "b"), random_pair(M, N, RANK, 1, "a")):
        assert float((projector(first[0]) - projector(other[0])).norm()) > 1
        assert float((first[1] - other[1]).norm()) > 1
    square = random_pair(M, M, RANK, 0, "a")
    assert float((square[0].T - square[1]).norm()) > 1  # A and B are two draws


def test_weights_spans_the_true_singular_subspaces() -> None:
    """W0 = U diag(10, 9, ..., 1) V': leading is the first columns, trailing the last."""
    W0, U, V = spectrum(10, 10, torch.arange(10, 0, -1))
    for side, columns in (("leading", slice(0, 3)), ("trailing", slice(7, 10))):
        A, B = weight_pair(W0.float(), 3, side)  # type: ignore[arg-type]
        torch.testing.assert_close(projector(B.T).double(), projector(U[:, columns].T), rtol=0, atol=1e-5)
        torch.testing.assert_close(projector(A).double(), projector(V[:, columns].T), rtol=0, atol=1e-5)
        inner = B.T.double() @ W0 @ A.T.double()  # pairs fit: diag(10, 9, 8) or diag(3, 2, 1)
        expected = torch.arange(10, 0, -1).double()[columns].diag()
        torch.testing.assert_close(inner, expected, rtol=0, atol=1e-5)


def test_weights_of_a_large_layer_are_near_the_leading_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a sketch: orthonormal, the same again, and with nearly all of the energy that the best subspaces have."""
    from fedsb.adapters import basis

    W0, _, _ = spectrum(300, 400, 0.97 ** torch.arange(300))
    best_A, best_B = weight_pair(W0.float(), 16)
    monkeypatch.setattr(basis, "EXACT_SIZE", 256)
    A, B = weight_pair(W0.float(), 16)
    again = weight_pair(W0.float(), 16)
    assert torch.equal(A, again[0]) and torch.equal(B, again[1])
    assert not torch.equal(A, best_A)  # it is the other way
    torch.testing.assert_close(B.T @ B, torch.eye(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(A @ A.T, torch.eye(16), rtol=0, atol=1e-5)
    energy = [float((b.T.double() @ W0 @ a.T.double()).square().sum()) for a, b in ((A, B), (best_A, best_B))]
    assert energy[0] > 0.999 * energy[1]
    trailing = weight_pair(W0.float(), 16, "trailing")  # the small end has no sketch
    assert float((trailing[1].T.double() @ W0 @ trailing[0].T.double()).norm()) < 0.01


@pytest.mark.parametrize("sign", [True, False])
def test_update_is_the_truncated_svd_of_the_first_step(sign: bool) -> None:
    G = matrix()
    A, B, S = update_pair(G, RANK, eta=0.1, sign=sign)
    D = (-0.1 * (G.sign() if sign else G)).double()
    U, s, Vh = torch.linalg.svd(D, full_matrices=False)
    best = U[:, :RANK] @ s[:RANK].diag() @ Vh[:RANK]
    torch.testing.assert_close((B @ S.diag() @ A).double(), best, rtol=0, atol=1e-5)
    torch.testing.assert_close(S.double(), s[:RANK], rtol=1e-5, atol=0)
    assert float(((B @ S.diag() @ A) * G).sum()) < 0  # against the gradient: the loss falls


def test_update_of_full_rank_is_the_step_itself() -> None:
    G = matrix(6, 9)
    A, B, S = update_pair(G, 6, eta=0.5, sign=True)
    torch.testing.assert_close(B @ S.diag() @ A, -0.5 * G.sign(), rtol=0, atol=1e-5)


def test_randomised_svd_on_a_decaying_spectrum() -> None:
    """300 x 400, singular values 0.9^i, rank 8: sketched (8 + 16 columns of 300), and as good as exact."""
    S = 0.9 ** torch.arange(300)
    X, U, V = spectrum(300, 400, S)
    got_U, got_S, got_V = truncated_svd(X.float(), 8)
    torch.testing.assert_close(got_S.double(), S[:8].double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(projector(got_U.T).double(), projector(U[:, :8].T), rtol=0, atol=1e-3)
    torch.testing.assert_close(projector(got_V.T).double(), projector(V[:, :8].T), rtol=0, atol=1e-3)
    exact = svd(X.float())
    torch.testing.assert_close(got_U, exact[0][:, :8], rtol=0, atol=1e-3)  # signs too
    torch.testing.assert_close(got_V, exact[2][:, :8], rtol=0, atol=1e-3)


def test_randomised_svd_on_a_sign_matrix_captures_almost_the_best_energy() -> None:
    """The tail of a sign matrix is flat, so its directions are nearly arbitrary; their energy is not."""
    D = matrix(300, 400).sign()
    U, _, V = truncated_svd(D, 8)
    best = float(torch.linalg.svdvals(D)[:8].square().sum())
    assert float((U.T @ D @ V).square().sum()) > 0.95 * best
    assert torch.equal(truncated_svd(D, 8)[0], U)  # the sketch is drawn by key


def test_core_is_diagonal_and_decreasing_in_its_own_basis() -> None:
    """B' G A' = diag(D_r), D positive and falling: the r leading singular values of S."""
    G = matrix()
    outer = weight_pair(matrix(seed=9), K)
    A, B, D = core(G, outer)
    inner = B.T @ G @ A.T
    torch.testing.assert_close(inner, D.diag(), rtol=0, atol=1e-4)
    assert (D[:-1] > D[1:]).all() and D[-1] > 0
    torch.testing.assert_close(D, torch.linalg.svdvals(outer[1].T @ G @ outer[0].T)[:RANK], rtol=1e-5, atol=0)


def test_core_stays_inside_the_outer_basis_and_is_the_best_there() -> None:
    G = matrix()
    outer = random_pair(M, N, K, 0, "layer")
    A, B, D = core(G, outer)
    torch.testing.assert_close(A @ projector(outer[0]), A, rtol=0, atol=1e-5)
    torch.testing.assert_close(projector(outer[1].T) @ B, B, rtol=0, atol=1e-5)
    best = captured_energy(G, A, B)[0]
    assert best == pytest.approx(float(D.square().sum()), rel=1e-5)
    for seed in range(200):
        P = torch.linalg.qr(matrix(K, RANK, seed))[0]
        Q = torch.linalg.qr(matrix(K, RANK, seed + 1000))[0]
        assert captured_energy(G, Q.T @ outer[0], outer[1] @ P)[0] < best


def test_core_in_the_whole_space_is_the_svd_of_the_gradient() -> None:
    G = matrix(12, 12)
    A, B, D = core(G, weight_pair(matrix(12, 12, seed=9), 12))
    U, S, V = svd(G.double())
    torch.testing.assert_close(D.double(), S[:RANK], rtol=1e-5, atol=0)
    best = U[:, :RANK] @ S[:RANK].diag() @ V[:, :RANK].T
    torch.testing.assert_close((B @ D.diag() @ A).double(), best, rtol=0, atol=1e-5)


def test_core_of_a_sum_differs_from_a_mean_of_cores() -> None:
    """Two clients whose gradients cancel leave nothing; the server must sum S before its SVD."""
    outer = random_pair(M, N, K, 0, "layer")
    S = outer[1].T @ matrix() @ outer[0].T
    assert not core_pair(S - S, outer, RANK)[2].any()


def test_captured_energy_by_hand() -> None:
    """G = diag(3, 4): the first direction holds 9 of 25, the second 16, both all."""
    G, eye = torch.diag(torch.tensor([3.0, 4.0])), torch.eye(2)
    assert captured_energy(G, eye[:1], eye[:, :1]) == (9, 25)
    assert captured_energy(G, eye[1:], eye[:, 1:]) == (16, 25)
    assert captured_energy(G, eye[1:], eye[:, :1]) == (0, 25)
    assert captured_energy(G, eye, eye) == (25, 25)


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (12, 8)])
def test_update_of_full_rank_captures_all_of_its_gradient(shape: tuple[int, int]) -> None:
    G = matrix(*shape)
    inside, total = captured_energy(G, *update_pair(G, 8, 0.1, sign=False)[:2])
    assert inside == pytest.approx(total, rel=1e-5)


def test_start_of_R_by_blocks() -> None:
    """Rank 2, two blocks: the four singular values lie on the diagonals of R_1 and R_2."""
    pair = random_pair(M, N, 4, 0, "a")
    basis = Basis(kind="x", A={"a": pair[0]}, B={"a": pair[1]}, R0={"a": torch.tensor([4.0, 3.0, 2.0, 1.0])})
    assert basis.start(2, 2)["a.R"].tolist() == [[[4, 0], [0, 3]], [[2, 0], [0, 1]]]
    assert not make_basis("x", [("a", pair)]).start(2, 2)["a.R"].any()


def test_the_hash_names_the_bytes_and_the_layer() -> None:
    one = make_basis("x", [("a", random_pair(M, N, 4, 0, "a"))]).tensors
    moved = {**one, "a.A": one["a.A"] + 1e-7}
    renamed = {key.replace("a.", "b."): value for key, value in one.items()}
    turned = dict(reversed(one.items()))
    assert basis_hash(one) == basis_hash(turned)
    assert len({basis_hash(one), basis_hash(moved), basis_hash(renamed)}) == 3


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda A, B: (A * (1 + 1e-7), B), True),
        (lambda A, B: (A, B.clone().index_fill_(1, torch.tensor([RANK - 1]), 0.0)), False),
        (lambda A, B: (A.flip(0), B), False),
        (lambda A, B: (A[:, :-1], B), False),
        (lambda A, B: (A[:-1], B), False),
        (lambda A, B: (A * float("nan"), B), False),
    ],
)
def test_a_sketch_sees_every_vector_and_not_the_last_bits(change: Callable[[Tensor, Tensor], Pair], same: bool) -> None:
    A, B = weight_pair(matrix(), RANK)
    sketches = [basis_sketch({"layer.A": a, "layer.B": b}) for a, b in ((A, B), change(A, B))]
    assert sketches[0]["layer.A.sketch"].shape == (RANK,)
    assert same_sketch(*sketches) == same
    assert same_sketch(*reversed(sketches)) == same


def test_a_rank_above_a_layer_is_refused_with_the_highest_that_fits() -> None:
    shapes = {"big": (64, 64), "low": (8, 64), "lower": (64, 6)}
    check_rank(shapes, 6)
    with pytest.raises(UserError, match=r"rank x blocks = 9 is above min\(m, n\) in 2 of 3 layers.*'low'.*at most 6"):
        check_rank(shapes, 9)


def test_the_facts_are_of_the_bases_that_can_be_asked_for() -> None:
    from typing import get_args

    from fedsb.config.training import BasisConfig

    assert set(BASES) == set(get_args(BasisConfig.model_fields["kind"].annotation))
    assert all(facts.id == kind for kind, facts in BASES.items())
    private = {kind for kind, facts in BASES.items() if facts.looks_at == "private data"}
    assert private == {"update-pooled", "core"}
    assert {kind for kind, facts in BASES.items() if facts.simulation_only} == {"update-pooled"}
