"""Bases that look at data, made by a round of clients, against dense gradients of the plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import set_all
from fedsb.adapters.basis import Basis, core_pair, random_pair, svd, truncated_svd, weight_pair
from fedsb.protocol.traffic import TrafficRecord
from fedsb.server.server import Server
from fedsb.training import gradients as federation_gradients
from fedsb.training.basis import draw_samples
from fedsb.training.gradients import captured_share, core_gradients
from fedsb.utils.errors import ConfigError, UserError
from fedsb.utils.rng import keyed_generator
from support.server import added, dense_gradients, open_server

SQUARE = "bert.encoder.layer.0.attention.self.query"  # 32 x 32
WIDE = "bert.encoder.layer.0.intermediate.dense"  # 48 x 32
EVERYTHING = 10**6  # samples: all rows of every client


def built(config: dict[str, Any], **basis: Any) -> tuple[Server, Basis, list[TrafficRecord]]:
    server = open_server(set_all(config, basis={"share_samples": 0, "samples": EVERYTHING, **basis}))
    made, traffic = start(server)
    return server, made, traffic


def start(server: Server) -> tuple[Basis, list[TrafficRecord]]:
    server.opened.local_clients.start(server.policy, server.secure_sums, {})
    _, basis, traffic = server.start()
    basis = server.with_captured_share(basis)
    assert basis is not None
    return basis, traffic


def total_gradient(server: Server) -> dict[str, Tensor]:
    return added([dense_gradients(server, site.train) for site in server.clients])


def close(a: Tensor, b: Tensor, atol: float = 1e-4) -> None:
    """To `atol` of the largest entry of b."""
    assert float((a - b).abs().max()) <= atol * float(b.abs().max())


def test_core_gradients_are_U_G_V(tiny_config: dict[str, Any]) -> None:
    """Whatever the micro-batches, and the scale of the adapter."""
    server = open_server(tiny_config)
    outer = {layer: random_pair(m, n, 9, 0, layer) for layer, (m, n) in server.trainer.shapes.items()}
    examples = server.clients[0].train[:7]
    dense = dense_gradients(server, examples)
    for scale, batch_size in ((1.0, 3), (4.0, 64)):
        server.trainer.adapted.scale = scale
        for layer in server.trainer.adapted.layers.values():
            layer.scale = scale
        sums = core_gradients(
            server.trainer.adapted, server.trainer.task, server.trainer.head, outer, examples, batch_size
        )
        for layer, (A, B) in outer.items():
            close(sums[f"{layer}.S"], B.T @ dense[layer] @ A.T)


@pytest.mark.parametrize("outer", ["weights", "random"])
def test_core_is_that_of_the_clients_pooled_samples(tiny_config: dict[str, Any], outer: str) -> None:
    """The sum of the clients' S is U' G V of all their rows: B' G A' = diag(D), falling, the best inside U and V."""
    server, basis, _ = built(tiny_config, kind="core", outer=outer, outer_rank=12)
    G = total_gradient(server)
    for layer, W0 in server.trainer.adapted.base_weights():
        A, B = basis.A[layer], basis.B[layer]
        pair = weight_pair(W0, 12) if outer == "weights" else random_pair(*W0.shape, 12, 0, layer)
        S = pair[1].T @ G[layer] @ pair[0].T
        D = torch.linalg.svdvals(S)[:4]
        inner = B.T @ G[layer] @ A.T
        close(inner, D.diag(), atol=1e-3)
        assert (inner.diag()[:-1] > inner.diag()[1:]).all()
        close(B @ inner @ A, _product(core_pair(S, pair, 4)), atol=1e-3)
    assert not basis.R0


def _product(made: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    A, B, D = made
    return B @ D.diag() @ A


def test_core_over_the_whole_space_is_the_svd_of_the_gradient(tiny_config: dict[str, Any]) -> None:
    server, basis, _ = built(tiny_config, kind="core", outer_rank=32)
    G = total_gradient(server)[SQUARE]
    U, S, V = svd(G.double())
    best = (U[:, :4] @ S[:4].diag() @ V[:, :4].T).float()
    close(basis.B[SQUARE] @ (basis.B[SQUARE].T @ G @ basis.A[SQUARE].T) @ basis.A[SQUARE], best, atol=1e-3)


def test_core_never_holds_a_gradient_of_a_whole_weight(tiny_config: dict[str, Any]) -> None:
    """No matrix product on the way has the shape of a weight, and the frozen base gets no gradient."""
    server = open_server(tiny_config)
    outer = {layer: random_pair(m, n, 9, 0, layer) for layer, (m, n) in server.trainer.shapes.items()}
    made: set[tuple[int, ...]] = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "matmul"):
                made.add(tuple(result.shape))
            return result

    examples = server.clients[0].train[:10]  # 5 rows of 8 or 16 tokens: 40 or 80, no side of a weight
    with Record():
        core_gradients(server.trainer.adapted, server.trainer.task, server.trainer.head, outer, examples, 5)
    assert made and (9, 9) in {shape[-2:] for shape in made}
    weights = {shape for m, n in server.trainer.shapes.values() for shape in ((m, n), (n, m))}
    assert not made & weights
    assert all(p.grad is None for p in server.trainer.base.model.parameters())
    assert not any(
        p.requires_grad for name, p in server.trainer.base.model.named_parameters() if not name.endswith(".R")
    )


def test_core_sends_k_squared_and_never_a_row(tiny_config: dict[str, Any]) -> None:
    server, basis, sent = built(tiny_config, kind="core", outer_rank=12)
    assert (basis.up, basis.down) == (12 * 12**2, 12 * 2 * 12 * 4)
    assert [each.values for each in sent if each.direction == "up"] == [basis.up] * len(server.clients)
    assert [each.values for each in sent if each.direction == "down"] == [basis.down] * len(server.clients)
    assert {each.round for each in sent} == {0}


def test_start_of_R(tiny_config: dict[str, Any]) -> None:
    """core: 0, or -eta D / N when asked; update: one step ahead, or 0 when asked; data-free bases: 0."""
    server, basis, _ = built(tiny_config, kind="core", R0="step", eta=0.5)
    G, N = total_gradient(server), sum(len(site.train) for site in server.clients)
    for layer in server.trainer.shapes:
        inner = basis.B[layer].T @ G[layer] @ basis.A[layer].T
        close(basis.R0[layer], -0.5 / N * inner.diag(), atol=1e-3)
    for kind in ("random", "weights", "core"):
        assert not built(tiny_config, kind=kind)[1].R0
    assert built(tiny_config, kind="update-pooled")[1].R0.keys() == server.trainer.shapes.keys()
    assert not built(tiny_config, kind="update-pooled", R0="zero")[1].R0


@pytest.mark.parametrize("kind", ["random", "weights"])
def test_a_step_without_a_gradient_is_refused(tiny_config: dict[str, Any], kind: str) -> None:
    with pytest.raises(ConfigError, match=f"kind = '{kind}' computes none"):
        built(tiny_config, kind=kind, R0="step")


@pytest.mark.parametrize("batch_size", [1, 64])
def test_update_pooled_weighs_every_sample_alike(tiny_config: dict[str, Any], batch_size: int) -> None:
    """D = -eta times the mean gradient over all rows, for an SGD-like step; its truncated SVD is B diag(R0) A."""
    config = set_all(
        tiny_config, eval={"batch_size": batch_size}, train={**tiny_config["train"], "optimizer": "sgd", "lr": 0.3}
    )
    server, basis, _ = built(config, kind="update-pooled")
    G, N = total_gradient(server), sum(len(site.train) for site in server.clients)
    for layer in server.trainer.shapes:
        U, S, V = truncated_svd(-0.3 * G[layer].double() / N, 4)
        close(basis.B[layer] @ basis.R0[layer].diag() @ basis.A[layer], (U * S @ V.T).float(), atol=1e-3)


def test_update_starts_one_signed_step_ahead(tiny_config: dict[str, Any]) -> None:
    """At full rank W0 + B R0 A is W0 - eta sign(G), eta being the first local step's rate: 0.02 in this run."""
    server, basis, _ = built(set_all(tiny_config, method={"name": "fed-sb", "rank": 32}), kind="update-pooled")
    G = total_gradient(server)[WIDE]
    step = basis.B[WIDE] @ basis.R0[WIDE].diag() @ basis.A[WIDE]
    clear = G.abs() > 1e-3 * G.abs().max()  # rounding may turn the sign of the smallest
    assert float(clear.float().mean()) > 0.98
    agree = (step + 0.02 * G.sign()).abs() < 1e-4
    assert float(agree[clear].float().mean()) > 0.98


def test_update_looks_at_the_public_rows_alone(tiny_config: dict[str, Any], tables: tuple[Path, Path]) -> None:
    public = {"kind": "update", "data": str(tables[1]), "samples": 5}
    server, basis, sent = built(
        set_all(tiny_config, train={**tiny_config["train"], "optimizer": "sgd"}), eta=1.0, **public
    )
    drawn = sorted(keyed_generator(0, "basis rows").permutation(40)[:5].tolist())
    G = dense_gradients(server, [server.data.test[i] for i in drawn])
    for layer in server.trainer.shapes:
        U, S, V = truncated_svd(-G[layer] / 5, 4)
        close(basis.B[layer] @ basis.R0[layer].diag() @ basis.A[layer], U * S @ V.T, atol=1e-3)
    assert {each.direction for each in sent} == {"down"}
    with pytest.raises(UserError, match=r"basis\.data = PATH"):
        built(tiny_config, kind="update")


def test_captured_share_is_that_of_the_clients_own_gradients(tiny_config: dict[str, Any]) -> None:
    """sum_k ||B' G_k A'||^2 / sum_k ||G_k||^2; all rows of every client here."""
    server, basis, _ = built(tiny_config, kind="random", share_samples=EVERYTHING)
    own = [dense_gradients(server, site.train) for site in server.clients]
    for layer in server.trainer.shapes:
        inside = sum((basis.B[layer].T @ G[layer] @ basis.A[layer].T).square().sum() for G in own)
        total = sum(G[layer].square().sum() for G in own)
        assert basis.captured[layer] == pytest.approx(float(inside / total), rel=1e-3)


def test_a_basis_of_the_whole_space_captures_everything(tiny_config: dict[str, Any]) -> None:
    config = set_all(tiny_config, method={"name": "fed-sb", "rank": 32})
    _, weights, _ = built(config, kind="weights", share_samples=12)
    assert weights.captured[SQUARE] == pytest.approx(1, abs=1e-5)
    assert 0.3 < weights.captured[WIDE] < 1  # 32 of 48 rows
    first = {"partition": "iid", "count": 1}
    alone = set_all(config, clients=first, train={**tiny_config["train"], "optimizer": "sgd"})
    _, update, _ = built(alone, kind="update-pooled", share_samples=EVERYTHING)
    assert all(share == pytest.approx(1, abs=1e-4) for share in update.captured.values())


def test_better_bases_capture_more(tiny_config: dict[str, Any]) -> None:
    shares = {}
    for kind in ("random", "core", "update-pooled"):
        config = set_all(tiny_config, train={**tiny_config["train"], "optimizer": "sgd"})
        captured = built(config, kind=kind, share_samples=EVERYTHING)[1].captured
        shares[kind] = sum(captured.values()) / len(captured)
    assert 0 < shares["random"] < shares["core"] <= shares["update-pooled"] < 1


def test_a_small_memory_budget_costs_passes_not_accuracy(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 layers a client: one pass a layer on one byte, one pass in all on a gibibyte, and the same shares."""
    server, basis, _ = built(tiny_config, kind="random")
    passes: list[int] = []
    real = federation_gradients.backward_sum
    monkeypatch.setattr(federation_gradients, "backward_sum", lambda *args: passes.append(1) or real(*args))
    samples = {site.name: site.train[:4] for site in server.clients}
    shares, counts = [], []
    for budget_bytes in (1, 1 << 30):
        passes.clear()
        shares.append(
            captured_share(
                server.trainer.adapted, server.trainer.task, server.trainer.head, basis, samples, 4, budget_bytes
            )
        )
        counts.append(len(passes))
    assert counts == [12 * len(samples), len(samples)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-5)


def test_samples_are_drawn_by_site_in_proportion(tiny_config: dict[str, Any]) -> None:
    server = open_server(tiny_config)
    sites = server.clients
    rows = sum(len(site.train) for site in sites)
    drawn = {site.name: draw_samples(site, rows, 12, 0) for site in sites}
    for site in sites:
        assert len(drawn[site.name]) == -(-12 * len(site.train) // rows)
        assert all(example in site.train for example in drawn[site.name])
        assert draw_samples(site, rows, 12, 0) == drawn[site.name]
        assert len(draw_samples(site, rows, 1, 0)) == 1
        assert len(draw_samples(site, rows, EVERYTHING, 0)) == len(site.train)
    assert any(draw_samples(site, rows, 12, 1) != drawn[site.name] for site in sites)


@pytest.mark.parametrize("kind", ["core", "update-pooled"])
def test_a_basis_in_a_codec_is_orthonormal_and_near_the_exact_one(tiny_config: dict[str, Any], kind: str) -> None:
    """All clients hold the basis that was sent, made orthonormal again. int8 rotates the span by little."""
    made = {}
    for codec in ("float32", "bfloat16", "int8", "int4", "int2"):
        server = open_server(set_all(tiny_config, basis={"kind": kind, "share_samples": 0}, server={"codec": codec}))
        made[codec], sent = start(server)
        factor = {"float32": 1.0, "bfloat16": 0.5, "int8": 0.27}.get(codec, 0.15)
        assert all(each.bytes <= 4 * each.values * factor for each in sent)
    for codec, basis in made.items():
        for layer in basis.B:
            for M, exact in (
                (basis.B[layer], made["float32"].B[layer]),
                (basis.A[layer].T, made["float32"].A[layer].T),
            ):
                assert torch.allclose(M.T @ M, torch.eye(M.shape[1]), atol=1e-5)
                cosines = torch.linalg.svdvals(M.T @ exact)
                least = {"float32": 0.9999, "bfloat16": 0.999, "int8": 0.9}.get(codec, 0.0)
                assert float(cosines.min()) > least, (codec, layer, cosines)
