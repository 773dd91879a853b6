"""The server's step at 4096 x 4096: fedsb's factored way against the dense textbook way, time and peak memory.

    python benchmarks/aggregation/run.py            (about an hour on two cores; --quick: 1024 x 1024, two minutes)

One layer, r = 16 and 32, c = 10, 25, 100 clients with random factors in float32. Every measurement is a process of its
own; memory is what the peak adds to the inputs. The dense way forms every client's m x n update, averages, and takes
a full SVD where the method needs one; for FLoRA-NA it takes the same number of sweeps with explicit m x n products, and
is left out above 10 clients. A full SVD does not care for r and c: it is timed once a method, at the first cell.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RANKS, CLIENTS = (16, 32), (10, 25, 100)
METHODS = ("fed-sb", "ravan", "fedit", "hetlora", "fedex-lora", "flora", "flexlora", "flora-na", "fedsvd")
SVD = ("flexlora", "fedsvd")
SWEEPS = 3  # of FLoRA-NA, both ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cell", nargs=5, metavar=("METHOD", "WAY", "SIZE", "RANK", "CLIENTS"), help="one measurement")
    asked = parser.parse_args()
    if asked.cell:
        name, way, *numbers = asked.cell
        print(json.dumps(measure(name, way, *map(int, numbers))))
        return
    size = 1024 if asked.quick else 4096
    results = HERE / ("quick.json" if asked.quick else "results.json")
    done = json.loads(results.read_text())["cells"] if results.exists() else {}
    for rank in RANKS:
        for clients in CLIENTS:
            for name in METHODS:
                for way in ("fedsb", "dense"):
                    key = f"{name} {way} r{rank} c{clients}"
                    if key in done or (way == "dense" and not dense_is_run(name, rank, clients)):
                        continue
                    command = [sys.executable, __file__, "--cell", name, way, str(size), str(rank), str(clients)]
                    ran = subprocess.run(command, capture_output=True, text=True)
                    if ran.returncode:
                        raise SystemExit(f"{key}:\n{ran.stderr}")
                    done[key] = json.loads(ran.stdout)
                    print(key, done[key], flush=True)
                    about = {"size": size, "machine": f"{os.cpu_count()} cores, {platform.machine()}"}
                    results.write_text(json.dumps({**about, "cells": done}, indent=1) + "\n")
    text = table(done)
    print(text)
    if not asked.quick:
        (HERE / "table.md").write_text(text)


def dense_is_run(name: str, rank: int, clients: int) -> bool:
    if name == "fedit":
        return False  # its textbook way is the mean of the factors
    if name in SVD:
        return (rank, clients) == (RANKS[0], CLIENTS[0])
    return clients == CLIENTS[0] or name != "flora-na"


def measure(name: str, way: str, size: int, rank: int, clients: int) -> dict[str, Any]:
    import torch

    from fedsb.methods.averaging import ServerOptimizer

    method, state, updates = inputs(name, size, rank, clients)
    dense = DENSE.get(name)
    before = peak_mib()
    started = time.perf_counter()
    with torch.no_grad():
        if way == "fedsb":
            method.aggregate(state, updates, ServerOptimizer())
        else:
            assert dense is not None
            dense(method, state, updates)
    return {"seconds": round(time.perf_counter() - started, 4), "mib": round(peak_mib() - before)}


def inputs(name: str, size: int, rank: int, clients: int) -> Any:
    import torch

    from fedsb.adapters.basis import make_basis
    from fedsb.config.registry import build_method
    from fedsb.methods.base import Update

    options: dict[str, Any] = {"rank": rank}
    if name == "ravan":
        options = {"rank": rank // 4, "blocks": 4}
    if name == "flora-na":
        options |= {"best_error": False, "sweeps": SWEEPS, "tolerance": 0.0}  # the step itself, without what is logged
    method = build_method(name, options)
    draw = torch.Generator().manual_seed(0)
    pair = (torch.randn(rank, size, generator=draw), torch.randn(size, rank, generator=draw))
    state = method.start({"layer": (size, size)}, make_basis("random", [("layer", pair)]), {}, 0)
    received = method.init_client(state.shared, method.broadcast(state), {}, 0)
    updates = []
    for k in range(clients):
        trained = {key: x + 0.1 * torch.randn(x.shape, generator=draw) for key, x in received.items()}
        trained |= {key: x for key, x in received.items() if key not in method.trainable(received, 0)}
        updates.append(Update(client=f"{k:03d}", weight=1.0 + k, tensors=method.upload(received, trained, 0)[0]))
    return method, state, updates


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- the dense way ---


def shares(updates: Any) -> list[float]:
    total = sum(update.weight for update in updates)
    return [update.weight / total for update in updates]


def dense_mean(method: Any, state: Any, updates: Any) -> Any:
    """Computes sum_k p_k dW_k from every client's m x n update."""
    M = 0
    for p, update in zip(shares(updates), updates, strict=True):
        factors = method.export({**state.shared, **state.tensors, **update.tensors})["layer"]
        M = M + p * factors.scale * factors.B @ factors.A
    return M


def dense_residual(method: Any, state: Any, updates: Any) -> Any:
    A, B = (sum(p * u.tensors[f"layer.{x}"] for p, u in zip(shares(updates), updates, strict=True)) for x in "AB")
    return dense_mean(method, state, updates) - method.scale * B @ A


def dense_svd(method: Any, state: Any, updates: Any) -> Any:
    import torch

    return torch.linalg.svd(dense_mean(method, state, updates), full_matrices=False)


def dense_norms(method: Any, state: Any, updates: Any) -> Any:
    return [(u.tensors["layer.B"] @ u.tensors["layer.A"]).norm() for u in updates]


def dense_na(method: Any, state: Any, updates: Any) -> Any:
    """Computes the same sweeps, with H and b from explicit m x n products, in float64."""
    import torch

    p = torch.tensor(shares(updates), dtype=torch.float64)
    A, B = ([u.tensors[f"layer.{x}"].double() for u in updates] for x in "AB")
    M = sum(p_k * B_k @ A_k for p_k, B_k, A_k in zip(p, B, A, strict=True))

    def best(products: Callable[[int], Any]) -> Any:
        c = len(p)
        H, b = torch.zeros(c, c, dtype=torch.float64), torch.zeros(c, dtype=torch.float64)
        for u in range(c):
            X = products(u)
            b[u] = (X * M).sum()
            for v in range(u, c):
                H[u, v] = H[v, u] = (X * products(v)).sum()
        return torch.linalg.lstsq(H, b).solution

    P = p
    for _ in range(SWEEPS):
        A_hat = sum(P_u * A_u for P_u, A_u in zip(P, A, strict=True))
        Q = best(lambda u, A_hat=A_hat: B[u] @ A_hat)
        B_hat = sum(Q_u * B_u for Q_u, B_u in zip(Q, B, strict=True))
        P = best(lambda u, B_hat=B_hat: B_hat @ A[u])
    return P, Q


DENSE: dict[str, Callable[..., Any]] = {
    "fed-sb": dense_mean,
    "ravan": dense_mean,
    "hetlora": dense_norms,
    "fedex-lora": dense_residual,
    "flora": dense_mean,
    "flexlora": dense_svd,
    "flora-na": dense_na,
    "fedsvd": dense_svd,
}


def table(done: dict[str, Any]) -> str:
    lines = ["| method | r | c | fedsb | dense | times faster | fedsb, MiB | dense, MiB |", "|---" * 8 + "|"]
    for rank in RANKS:
        for clients in CLIENTS:
            for name in METHODS:
                ours = done.get(f"{name} fedsb r{rank} c{clients}")
                once = f"{name} dense r{RANKS[0]} c{CLIENTS[0]}" if name in SVD else f"{name} dense r{rank} c{clients}"
                dense = done.get(once)
                if ours is None:
                    continue
                shown = f"{dense['seconds']:.3g} s" if dense else "-"
                ratio = f"{dense['seconds'] / ours['seconds']:.0f}" if dense else "-"
                memory = str(dense["mib"]) if dense else "-"
                numbers = f"{ours['seconds']:.3g} s | {shown} | {ratio} | {ours['mib']} | {memory}"
                lines.append(f"| {name} | {rank} | {clients} | {numbers} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
