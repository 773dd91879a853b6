"""Naive twins: each method as its paper writes it, on dense matrices with torch's own autograd and optimisers.

Nothing here comes from fedsb. A twin gets the same start, the same basis and the same batches, computes in the start's
own dtype (float64 in the laws), and must end every round where the fast version ends.

Legend: A (r, n), B (m, r), W (m, n), all by layer; p: client -> n_k / sum n; s: the scale alpha / r; t: round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

Tensors = dict[str, Tensor]
Parts = dict[str, Tensors]  # "A", "B", ... -> layer -> tensor; "head" -> parameter -> tensor
Batches = dict[str, list[list[dict[str, Tensor]]]]  # client -> round -> batches, each a model input with labels
Change = Callable[[Parts, str], Tensor]  # (a client's parts, layer) -> the dense change of its weight


@dataclass(frozen=True, kw_only=True)
class Lab:
    """What every method meets alike: the frozen model, the clients and the local optimiser."""

    model: nn.Module
    W0: Tensors  # layer -> frozen weight, as (out, in)
    batches: Batches
    p: dict[str, float]
    lr: float
    head_lr: float
    clip: float

    @property
    def rounds(self) -> range:
        return range(len(next(iter(self.batches.values()))))

    def alone(self, client: str) -> Lab:
        return replace(self, p={client: 1.0}, batches={client: self.batches[client]})


@dataclass(frozen=True, kw_only=True)
class Round:
    """What a round ends with. Changes are dense, by layer, counted from W0."""

    models: dict[str, tuple[Tensors, Tensors]]  # client -> (change, head) of the model it now has
    trained: dict[str, Tensors]  # client -> the change that its own training ended with
    gap: float = 1.0  # how well an SVD was determined, see `cut`
    ranks: Mapping[str, int] | None = None  # client -> its rank in the next round, where ranks change


def train(
    lab: Lab,
    client: str,
    t: int,
    start: Parts,
    change: Change,
    moving: str,  # the parts that train, as "A B head"
    penalty: Callable[[Parts], Tensor] | None = None,
) -> Parts:
    """AdamW from `start` over the client's batches of round t; returns its parts."""
    own = {part: {key: x.clone() for key, x in tensors.items()} for part, tensors in start.items()}
    head = [x.requires_grad_() for x in own["head"].values()]
    adapter = [x.requires_grad_() for part in moving.split() if part != "head" for x in own[part].values()]
    optimizer = torch.optim.AdamW(
        [{"params": adapter, "lr": lab.lr}, {"params": head, "lr": lab.head_lr}], weight_decay=0.0
    )
    for batch in lab.batches[client][t]:
        weights = {f"{layer}.weight": W0 + change(own, layer) for layer, W0 in lab.W0.items()} | own["head"]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        loss = nn.functional.cross_entropy(functional_call(lab.model, weights, kwargs=inputs).logits, batch["labels"])
        if penalty is not None:
            loss = loss + penalty(own)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*adapter, *head], lab.clip)
        optimizer.step()
    return {part: {key: x.detach() for key, x in tensors.items()} for part, tensors in own.items()}


def mean(p: Mapping[str, float], clients: Mapping[str, Parts], part: str) -> Tensors:
    """sum_k p_k x_k."""
    names = next(iter(clients.values()))[part]
    return {key: sum(p[k] * own[part][key] for k, own in clients.items()) for key in names}


def dense(change: Change, lab: Lab, own: Parts) -> Tensors:
    return {layer: change(own, layer) for layer in lab.W0}


def ideal(lab: Lab, trained: Mapping[str, Tensors]) -> Tensors:
    """sum_k p_k dW_k."""
    return {layer: sum(lab.p[k] * dW[layer] for k, dW in trained.items()) for layer in lab.W0}


def ended(lab: Lab, change: Change, state: Parts, clients: Mapping[str, Parts], gap: float = 1.0) -> Round:
    """The round of a method whose clients all continue from `state`."""
    model = (dense(change, lab, state), state["head"])
    return Round(
        models=dict.fromkeys(lab.p, model), trained={k: dense(change, lab, own) for k, own in clients.items()}, gap=gap
    )


# --- a core between frozen bases ---


def fed_sb(
    lab: Lab, A: Tensors, B: Tensors, R: Tensors, core_of: Mapping[str, str], mask: Tensor, head: Tensors
) -> Iterator[Round]:
    """Fed-SB: R <- sum p_k R_k.  `mask` makes R block-diagonal, for several blocks; of ones, it is the paper's.

    `core_of`: layer -> its core in R, the layer's own in the paper.
    """

    def change(own: Parts, layer: str) -> Tensor:
        return B[layer] @ (own["R"][core_of[layer]] * mask) @ A[layer]

    state = {"R": R, "head": head}
    for t in lab.rounds:
        clients = {k: train(lab, k, t, state, change, "R head") for k in lab.p}
        state = {part: mean(lab.p, clients, part) for part in state}
        yield ended(lab, change, state, clients)


def fed_sb_personal(lab: Lab, A: Tensors, B: Tensors, R: Tensors, head: Tensors, a: float) -> Iterator[Round]:
    """Fed-SB with a personal core: R <- R + (1 - a) sum p_k u_k,  P_k <- P_k + a u_k,  u_k the change of R + P_k."""

    def change(own: Parts, layer: str) -> Tensor:
        return B[layer] @ (own["R"][layer] + own["P"][layer]) @ A[layer]

    state = {"R": R, "head": head}
    P = {k: {layer: torch.zeros_like(x) for layer, x in R.items()} for k in lab.p}
    for t in lab.rounds:
        clients = {k: train(lab, k, t, {**state, "P": P[k]}, change, "R head") for k in lab.p}
        u = {k: {layer: own["R"][layer] - state["R"][layer] for layer in R} for k, own in clients.items()}
        P = {k: {layer: P[k][layer] + a * u[k][layer] for layer in R} for k in lab.p}
        shared = {layer: state["R"][layer] + (1 - a) * sum(lab.p[k] * u[k][layer] for k in lab.p) for layer in R}
        state = {"R": shared, "head": mean(lab.p, clients, "head")}
        yield Round(
            models={k: (dense(change, lab, {**state, "P": P[k]}), state["head"]) for k in lab.p},
            trained={k: dense(change, lab, own) for k, own in clients.items()},
        )


def ravan(
    lab: Lab, A: Tensors, B: Tensors, H: Tensors, head: Tensors, moving: str = "H scalars head"
) -> Iterator[Round]:
    """RAVAN: dW = sum_i s_i B_i H_i A_i;  clients send s_i H_i,  H_i <- sum p_k s_i H_i,  s_i <- 1."""

    def change(own: Parts, layer: str) -> Tensor:
        h, r, _ = own["H"][layer].shape
        total = torch.zeros_like(lab.W0[layer])
        for i in range(h):
            B_i, A_i = B[layer][:, i * r : (i + 1) * r], A[layer][i * r : (i + 1) * r]
            total = total + own["scalars"][layer][i] * B_i @ own["H"][layer][i] @ A_i
        return total

    ones = {layer: torch.ones(len(x), dtype=x.dtype) for layer, x in H.items()}
    state = {"H": H, "scalars": ones, "head": head}
    for t in lab.rounds:
        clients = {k: train(lab, k, t, state, change, moving) for k in lab.p}
        sent = {
            k: {
                "H": {layer: own["scalars"][layer][:, None, None] * own["H"][layer] for layer in lab.W0},
                "head": own["head"],
            }
            for k, own in clients.items()
        }
        state = {"H": mean(lab.p, sent, "H"), "scalars": ones, "head": mean(lab.p, sent, "head")}
        yield ended(lab, change, state, clients)


# --- two factors ---


def lora(s: float) -> Change:
    return lambda own, layer: s * own["B"][layer] @ own["A"][layer]


def fedit(lab: Lab, A: Tensors, B: Tensors, head: Tensors, s: float) -> Iterator[Round]:
    """FedIT: A <- sum p_k A_k and B <- sum p_k B_k, apart."""
    state = {"A": A, "B": B, "head": head}
    for t in lab.rounds:
        clients = {k: train(lab, k, t, state, lora(s), "A B head") for k in lab.p}
        state = {part: mean(lab.p, clients, part) for part in state}
        yield ended(lab, lora(s), state, clients)


def ffa_lora(lab: Lab, A: Tensors, B: Tensors, head: Tensors, s: float) -> Iterator[Round]:
    """FFA-LoRA: A never moves;  B <- sum p_k B_k."""
    state = {"A": A, "B": B, "head": head}
    for t in lab.rounds:
        clients = {k: train(lab, k, t, state, lora(s), "B head") for k in lab.p}
        state = {"A": A, "B": mean(lab.p, clients, "B"), "head": mean(lab.p, clients, "head")}
        yield ended(lab, lora(s), state, clients)


def rolora(lab: Lab, A: Tensors, B: Tensors, head: Tensors, s: float) -> Iterator[Round]:
    """RoLoRA: B <- sum p_k B_k in rounds 0, 2, ...;  A <- sum p_k A_k in rounds 1, 3, ...; the other one is frozen."""
    state = {"A": A, "B": B, "head": head}
    for t in lab.rounds:
        turn = "B" if t % 2 == 0 else "A"
        clients = {k: train(lab, k, t, state, lora(s), f"{turn} head") for k in lab.p}
        state = {**state, turn: mean(lab.p, clients, turn), "head": mean(lab.p, clients, "head")}
        yield ended(lab, lora(s), state, clients)


def fedsa_lora(lab: Lab, A: Tensors, B: Tensors, head: Tensors, s: float) -> Iterator[Round]:
    """FedSA-LoRA: A <- sum p_k A_k;  client k goes on with its own B_k and head."""
    states = {k: {"A": A, "B": B, "head": head} for k in lab.p}
    for t in lab.rounds:
        clients = {k: train(lab, k, t, states[k], lora(s), "A B head") for k in lab.p}
        A = mean(lab.p, clients, "A")
        states = {k: {"A": A, "B": own["B"], "head": own["head"]} for k, own in clients.items()}
        yield Round(
            models={k: (dense(lora(s), lab, own), own["head"]) for k, own in states.items()},
            trained={k: dense(lora(s), lab, own) for k, own in clients.items()},
        )


def fedrot_lora(lab: Lab, A: Tensors, B: Tensors, head: Tensors, s: float) -> Iterator[Round]:
    """FedRot-LoRA: O_k = argmax tr(O' (B_k' B + A_k A')), orthogonal;  B <- sum p_k B_k O_k,  A <- sum p_k O_k' A_k."""
    state = {"A": A, "B": B, "head": head}
    for t in lab.rounds:
        clients = {k: train(lab, k, t, state, lora(s), "A B head") for k in lab.p}
        turned = {}
        for k, own in clients.items():
            turned[k] = {"A": {}, "B": {}, "head": own["head"]}
            for layer in lab.W0:
                A_k, B_k = own["A"][layer], own["B"][layer]
                U, _, Vt = torch.linalg.svd(B_k.T @ state["B"][layer] + A_k @ state["A"][layer].T)
                O_k = U @ Vt
                turned[k]["B"][layer], turned[k]["A"][layer] = B_k @ O_k, O_k.T @ A_k
        state = {part: mean(lab.p, turned, part) for part in state}
        yield ended(lab, lora(s), state, clients)


# --- two factors, with a server that forms the dense update ---


def fedex_lora(lab: Lab, A: Tensors, B: Tensors, head: Tensors, s: float) -> Iterator[Round]:
    """FedEx-LoRA: fedit, and W0 <- W0 + sum p_k s B_k A_k - s Bbar Abar."""
    E = {layer: torch.zeros_like(W0) for layer, W0 in lab.W0.items()}  # all that was added to W0
    state = {"A": A, "B": B, "head": head}

    def change(own: Parts, layer: str) -> Tensor:
        return E[layer] + s * own["B"][layer] @ own["A"][layer]

    for t in lab.rounds:
        clients = {k: train(lab, k, t, state, change, "A B head") for k in lab.p}
        trained = {k: dense(change, lab, own) for k, own in clients.items()}
        state = {part: mean(lab.p, clients, part) for part in state}
        for layer in lab.W0:
            M = sum(lab.p[k] * s * own["B"][layer] @ own["A"][layer] for k, own in clients.items())
            E[layer] = E[layer] + M - s * state["B"][layer] @ state["A"][layer]
        yield Round(models=dict.fromkeys(lab.p, (dense(change, lab, state), state["head"])), trained=trained)


def flora(lab: Lab, fresh: Callable[[int], Tensors], B: Tensors, head: Tensors, s: float) -> Iterator[Round]:
    """FLoRA: W0 <- W0 + sum p_k s B_k A_k;  then A is drawn afresh, `fresh(t)`, and B = 0 (as at the start)."""
    E = {layer: torch.zeros_like(W0) for layer, W0 in lab.W0.items()}  # all that was added to W0
    state = {"A": fresh(0), "B": B, "head": head}

    def change(own: Parts, layer: str) -> Tensor:
        return E[layer] + s * own["B"][layer] @ own["A"][layer]

    for t in lab.rounds:
        clients = {k: train(lab, k, t, state, change, "A B head") for k in lab.p}
        trained = {k: dense(change, lab, own) for k, own in clients.items()}
        for layer in lab.W0:
            E[layer] = E[layer] + sum(lab.p[k] * s * own["B"][layer] @ own["A"][layer] for k, own in clients.items())
        state = {"A": fresh(t + 1), "B": B, "head": mean(lab.p, clients, "head")}
        yield Round(models=dict.fromkeys(lab.p, (dense(change, lab, state), state["head"])), trained=trained)


def cut(M: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """(U, S, V', gap) of the best rank-r approximation of M.

    The gap is the least distance of a kept singular value to the next one, by the largest: where it is well above the
    rounding of M, the kept vectors are determined up to the sign of a pair (u_i, v_i).
    """
    U, S, Vt = torch.linalg.svd(M, full_matrices=False)
    after = torch.cat([S, S.new_zeros(1)])
    gap = ((after[:r] - after[1 : r + 1]).min() / S[0]).item()
    return U[:, :r], S[:r], Vt[:r], gap


def flexlora(lab: Lab, A: Tensors, B: Tensors, head: Tensors, s: float) -> Iterator[Round]:
    """FlexLoRA: M = sum p_k s B_k A_k = U S V', cut at rank r;  B <- U sqrt(S / s),  A <- sqrt(S / s) V'."""
    state = {"A": A, "B": B, "head": head}
    for t in lab.rounds:
        clients = {k: train(lab, k, t, state, lora(s), "A B head") for k in lab.p}
        state, gaps = {"A": {}, "B": {}, "head": mean(lab.p, clients, "head")}, []
        for layer in lab.W0:
            M = sum(lab.p[k] * s * own["B"][layer] @ own["A"][layer] for k, own in clients.items())
            U, S, Vt, gap = cut(M, len(A[layer]))
            state["B"][layer], state["A"][layer] = U * (S / s).sqrt(), (S / s).sqrt()[:, None] * Vt
            gaps.append(gap)
        yield ended(lab, lora(s), state, clients, min(gaps))


def fedsvd(lab: Lab, A: Tensors, B: Tensors, head: Tensors, s: float) -> Iterator[Round]:
    """FedSVD: clients train B;  Bbar A = U S V';  A <- V',  B <- U S."""
    state = {"A": A, "B": B, "head": head}
    for t in lab.rounds:
        clients = {k: train(lab, k, t, state, lora(s), "B head") for k in lab.p}
        Bbar = mean(lab.p, clients, "B")
        new, gaps = {"A": {}, "B": {}, "head": mean(lab.p, clients, "head")}, []
        for layer in lab.W0:
            U, S, Vt, gap = cut(Bbar[layer] @ state["A"][layer], len(A[layer]))
            new["B"][layer], new["A"][layer] = U * S, Vt
            gaps.append(gap)
        state = new
        yield ended(lab, lora(s), state, clients, min(gaps))


def hetlora(
    lab: Lab, A: Tensors, B: Tensors, head: Tensors, s: float, gamma: float, penalty_weight: float
) -> Iterator[Round]:
    """HetLoRA: ranks r_k, cut to on the way down, zero-padded on the way up;  weights ||B_k A_k||_F, a layer.

    A client's loss has penalty_weight * sum over layers of ||B[:, g:]|| ||A[g:]||, g = gamma r_k; where that sum shrank
    while it trained, the tail is cut off before it is sent, and its rank is g from then on.
    """
    r = len(next(iter(A.values())))
    state, ranks = {"A": A, "B": B, "head": head}, dict.fromkeys(lab.p, r)

    def tail(own: Parts) -> Tensor:
        """||B[:, g:]|| ||A[g:]||, over all layers; the small number keeps the root's gradient finite at zero."""

        def norm(X: Tensor) -> Tensor:
            return (X.square().sum() + 1e-12).sqrt()

        g = max(int(gamma * len(next(iter(own["A"].values())))), 1)
        return sum(norm(own["B"][layer][:, g:]) * norm(own["A"][layer][g:]) for layer in lab.W0)

    for t in lab.rounds:
        clients, pruned = {}, {}
        for k, r_k in ranks.items():
            start = {
                "A": {layer: x[:r_k] for layer, x in state["A"].items()},
                "B": {layer: x[:, :r_k] for layer, x in state["B"].items()},
                "head": state["head"],
            }
            clients[k] = train(lab, k, t, start, lora(s), "A B head", lambda own: penalty_weight * tail(own))
            pruned[k] = max(int(gamma * r_k), 1) if tail(clients[k]) < tail(start) else r_k
            for layer in lab.W0:
                clients[k]["A"][layer][pruned[k] :] = 0
                clients[k]["B"][layer][:, pruned[k] :] = 0
        new: Parts = {"A": {}, "B": {}, "head": mean(lab.p, clients, "head")}
        for layer in lab.W0:
            norms = {k: (own["B"][layer] @ own["A"][layer]).norm() for k, own in clients.items()}
            total = sum(norms.values())
            w = {k: norms[k] / total if total > 0 else lab.p[k] for k in lab.p}
            new["A"][layer], new["B"][layer] = torch.zeros_like(A[layer]), torch.zeros_like(B[layer])
            for k, own in clients.items():
                new["A"][layer][: ranks[k]] += w[k] * own["A"][layer]
                new["B"][layer][:, : ranks[k]] += w[k] * own["B"][layer]
        state, ranks = new, pruned
        yield replace(ended(lab, lora(s), state, clients), ranks=ranks)


def flora_na(lab: Lab, A: Tensors, B: Tensors, head: Tensors, s: float) -> Iterator[Round]:
    """FLoRA-NA: A <- sum P_k A_k and B <- sum Q_k B_k, a pair P, Q a layer, nearest to the ideal update."""
    state = {"A": A, "B": B, "head": head}
    for t in lab.rounds:
        clients = {k: train(lab, k, t, state, lora(s), "A B head") for k in lab.p}
        state = {"A": {}, "B": {}, "head": mean(lab.p, clients, "head")}
        for layer in lab.W0:
            A_k, B_k = ([own[part][layer] for own in clients.values()] for part in "AB")
            state["A"][layer], state["B"][layer] = nearly_accurate(A_k, B_k, list(lab.p.values()), s)
        yield ended(lab, lora(s), state, clients)


def nearly_accurate(A: list[Tensor], B: list[Tensor], p: list[float], s: float) -> tuple[Tensor, Tensor]:
    """(sum P_u A_u, sum Q_u B_u) that minimise || sum p_u s B_u A_u - s (sum Q_u B_u)(sum P_u A_u) ||_F.

    Least squares in Q and in P in turn, on explicit m x n matrices, from P = Q = p until nothing is gained. The free
    factor between the two is set by ||sum P_u A_u|| = ||sum p_u A_u||.
    """
    M = sum(p_u * s * B_u @ A_u for p_u, A_u, B_u in zip(p, A, B, strict=True)).reshape(-1, 1)
    P = Q = torch.tensor(p, dtype=M.dtype)

    def mix(weights: Tensor, X: list[Tensor]) -> Tensor:
        return sum(w * X_u for w, X_u in zip(weights, X, strict=True))

    error = torch.inf
    for _ in range(10_000):
        Ahat = mix(P, A)
        Q = torch.linalg.lstsq(torch.stack([(s * B_u @ Ahat).flatten() for B_u in B], dim=1), M).solution[:, 0]
        Bhat = mix(Q, B)
        P = torch.linalg.lstsq(torch.stack([(s * Bhat @ A_u).flatten() for A_u in A], dim=1), M).solution[:, 0]
        before, error = error, (M[:, 0] - s * (Bhat @ mix(P, A)).flatten()).norm().item()
        if before - error <= 1e-12 * error:
            break
    c = mix(torch.tensor(p, dtype=M.dtype), A).norm() / mix(P, A).norm()
    return c * mix(P, A), mix(Q, B) / c
