"""Times rounds of one version of fedsb, old or new: python measure.py CASE REPEATS. Prints seconds as JSON.

Settings are written with the old names, which the new version accepts for one release.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROWS = 40  # of each client


def llama(folder: Path) -> str:
    """Returns the folder of a Llama of 14M parameters with MiniLM's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    sizes = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 688}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def minilm() -> str:
    try:
        from fedsb.models.names import resolve_name
    except ImportError:
        from fedsb.models.find import resolve_name  # type: ignore[no-redef]
    return resolve_name("minilm")[0]


def settings(case: str, folder: Path) -> dict[str, Any]:
    model, clients = case.split("-")[0], int(case.split("-")[1])
    words = ["alpha", "beta", "gamma", "delta", "river", "stone", "cloud", "paper", "green", "yellow"]
    rows = [
        {"text": " ".join(words[(i * j) % 10] for j in range(1, 40)), "label": "ab"[i % 2]}
        for i in range(ROWS * clients)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    language = model == "llama"
    found = {
        "name": "timed",
        "out": str(folder),
        "rounds": 100,
        "model": {"name": llama(folder / "llama") if language else "minilm", "max_tokens": 64},
        "task": {"kind": "text" if language else "classification"},
        "data": {"train": str(folder / "rows.jsonl")},
        "clients": {"split": "iid", "count": clients},
        "method": {"name": "fed-sb", "rank": 32},
        "basis": {"kind": "random", "share_samples": 0},
        "train": {"steps": 5, "batch_size": 8},
    }
    if case.endswith("private"):
        found["privacy"] = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-3}
    if case.endswith("lora"):
        found["method"] = {"name": "fedit", "rank": 8}
    return found


def rounds(config: dict[str, Any], folder: Path) -> Callable[[], Any]:
    """Returns a function that runs the next round."""
    try:
        return new_rounds(config, folder)
    except ImportError:
        return old_rounds(config, folder)


def new_rounds(config: dict[str, Any], folder: Path) -> Callable[[], Any]:
    from fedsb.channels.in_process import open_in_process
    from fedsb.config.load import load_config
    from fedsb.server.server import Server

    resolved = load_config(config).config
    method = resolved.method
    server = Server(resolved, method, "timed", open_in_process(resolved, method, "timed"))
    server.policy.open_ledgers(folder, "timed", new=True)
    server.opened.local_clients.start(server.policy, server.secure_sums, {})
    state, _, _ = server.start()

    def step() -> None:
        nonlocal state
        state = server.run_round(state).state

    return step


def old_rounds(config: dict[str, Any], folder: Path) -> Callable[[], Any]:
    from fedsb.engines.embedded import EmbeddedEngine
    from fedsb.engines.round import play
    from fedsb.settings import method_of

    from fedsb.config import load_config
    from fedsb.methods.averaging import ServerOptimizer

    resolved = load_config(config).config
    method = method_of(resolved)
    engine = EmbeddedEngine(resolved, method, "timed")
    engine.promise.open_ledgers(folder, "timed", new=True)
    basis, _ = engine.build_basis(method)
    state = method.start(engine.shapes, basis, engine.head, resolved.seed)
    kept: dict[str, Any] = {}

    def step() -> None:
        nonlocal state
        played = play(engine, state, [site.name for site in engine.sites], set(), kept, ServerOptimizer())
        kept.update(played.kept)
        state = played.state

    return step


def server_step(folder: Path) -> Callable[[], Any]:
    """Returns a function that validates and aggregates 40 updates of MiniLM, rank 64."""
    config = settings("minilm-1", folder) | {"method": {"name": "fed-sb", "rank": 64}}
    try:
        return new_server_step(config)
    except ImportError:
        return old_server_step(config)


CLIENTS = 40


def new_server_step(config: dict[str, Any]) -> Callable[[], Any]:
    from dataclasses import replace

    from fedsb.adapters.basis import basis_hash
    from fedsb.channels.in_process import open_in_process
    from fedsb.config.load import load_config
    from fedsb.methods.averaging import ServerOptimizer
    from fedsb.protocol.payload import Payload, pack
    from fedsb.server.server import Server
    from fedsb.server.validation import update_rules, validate_updates

    resolved = load_config(config).config
    method = resolved.method
    server = Server(resolved, method, "timed", open_in_process(resolved, method, "timed"))
    server.opened.local_clients.start(server.policy, None, {})
    state, _, _ = server.start()
    rules = update_rules(method, state, resolved.server, "timed", basis_hash(state.shared))
    draw = torch.Generator().manual_seed(0)
    payloads = []
    for k in range(CLIENTS):
        tensors = {key: x + 0.01 * torch.randn(x.shape, generator=draw) for key, x in state.tensors.items()}
        one = Payload.of(tensors, kind="update", run="timed", round=0)
        payloads.append((f"c{k:02d}", pack(replace(one, client=f"c{k:02d}", samples=5, basis=rules.basis))))
    return lambda: method.aggregate(state, validate_updates(payloads, rules)[0], ServerOptimizer())


def old_server_step(config: dict[str, Any]) -> Callable[[], Any]:
    from fedsb.engines.embedded import EmbeddedEngine
    from fedsb.federation.payload import Payload, pack
    from fedsb.federation.server import admit, rules
    from fedsb.federation.tensors import to_arrays
    from fedsb.settings import method_of

    from fedsb.config import load_config
    from fedsb.methods.averaging import ServerOptimizer

    resolved = load_config(config).config
    method = method_of(resolved)
    engine = EmbeddedEngine(resolved, method, "timed")
    basis, _ = engine.build_basis(method)
    state = method.start(engine.shapes, basis, engine.head, resolved.seed)
    wanted = rules(method, state, resolved.server, "timed", {})
    draw = torch.Generator().manual_seed(0)
    envelopes = []
    for k in range(CLIENTS):
        tensors = {key: x + 0.01 * torch.randn(x.shape, generator=draw) for key, x in state.tensors.items()}
        payload = Payload(
            kind="update", run="timed", round=0, client=f"c{k:02d}", samples=5, basis=wanted.basis,
            tensors=to_arrays(tensors),
        )  # fmt: skip
        envelopes.append((f"c{k:02d}", pack(payload)))
    return lambda: method.aggregate(state, admit(envelopes, wanted)[0], ServerOptimizer())


def main() -> None:
    case, repeats = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        step = server_step(folder) if case == "server-40" else rounds(settings(case, folder), folder)
        step()
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
