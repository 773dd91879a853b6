"""What a run says of itself: the manifest, a round's row, the exported adapter, the result."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedsb.adapters.adapted import Tensors
from fedsb.adapters.basis import BASES, Basis, basis_hash
from fedsb.adapters.export import BaseFacts, check_adapter, has_conv1d, load_lines, lora_config, lora_files, model_card
from fedsb.adapters.serving import serving
from fedsb.data.tasks.base import Example
from fedsb.disk import safe_name, write_atomic
from fedsb.engines import Score
from fedsb.engines.bench import Bench
from fedsb.engines.embedded import EmbeddedEngine
from fedsb.engines.remote import RemoteEngine
from fedsb.engines.round import Played
from fedsb.environment import git_hash, versions
from fedsb.federation.basis_round import peak_memory_bytes
from fedsb.federation.prices import price_list
from fedsb.federation.schedule import refreshes, whole_broadcasts
from fedsb.methods.contract import Method, State
from fedsb.privacy.setup import Promise
from fedsb.privacy.statement import promised, spent, why_not_private
from fedsb.record import Record, read_result
from fedsb.report import summary, write_report
from fedsb.settings import Choice, Config

RunEngine = EmbeddedEngine | RemoteEngine


def describe_start(
    config: Config,
    method: Method,
    engine: RunEngine,
    basis: Basis | None,
    state: State,
    choices: Sequence[Choice],
    before: Score | None,
) -> dict[str, Any]:
    """The manifest's part that is known before the first round."""
    task, data = engine.task, engine.data
    head = sum(tensor.numel() for tensor in engine.head.values())
    tensors = method.model(state)
    trained = method.trainable(tensors, 0)
    return {
        "settings": [asdict(choice) for choice in choices],
        "versions": versions(),
        "git": git_hash(),
        "seed": config.seed,
        "rounds": config.rounds,
        "model": {
            "name": config.model.name,
            "path": engine.base.name,
            "parameters": engine.base.parameters,
            "pad_token": engine.base.pad_token,
            "fingerprint": engine.base.fingerprint,
            "quantization": dict(engine.base.quantization),
            "revision": config.model.revision,
            "adapted_layers": len(engine.shapes),
            "trained_values": sum(tensors[key].numel() for key in trained),
        },
        "test": data.test_is if data.test else None,
        "task": {
            "kind": config.task.kind,
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "label_names": task.label_names or None,
            "auto_class": task.auto_class,
            "peft_task_type": task.peft_task_type,
            "problem_type": task.problem_type,
        },
        "clients": [
            {
                "name": site.name,
                "rows": site.rows,
                "held_out_rows": len(site.held_out),
                "labels": None if engine.promise else site.labels,
                "unseen": site.unseen,
            }
            for site in data.sites
        ],
        "method": {"id": method.facts.id, "paper": method.facts.paper, "travels": method.facts.travels},
        "basis": _basis_facts(basis, private=bool(engine.promise)),
        "basis_hash": basis_hash(state.common),
        "prices": [
            price.as_dict()
            for price in price_list(
                method,
                engine.shapes,
                head=head,
                clients=min(config.server.clients_per_round or len(engine.sites), len(engine.sites)),
                rounds=config.rounds,
                basis={"up": basis.up, "down": basis.down} if basis else None,
                sites=len(engine.sites),
                refreshes=len(refreshes(config, method)),
                codec=config.server.codec,
                whole=whole_broadcasts([site.name for site in engine.sites], config, method, engine.ranks),
            )
        ],
        "before": {"score": before.value if before else None, "majority": data.baseline},
        "privacy": promised(engine.promise, config, sum(tensors[key].numel() for key in trained)),
        "not_private": why_not_private(engine.promise),
    }


def round_row(
    played: Played,
    cohort: Sequence[str],
    score: Score | None,
    sites: Mapping[str, Score],
    seconds: float,
    promise: Promise,
) -> dict[str, Any]:
    """A row of rounds.jsonl. The loss is the plain mean over the clients whose updates were good.

    With `sites`, also the plain means over the cohort of the clients' own scores and of the global model's on the same
    rows: "local_score" and "global_score", whose difference is the local-to-global gap.
    """
    state, replies = played.state, played.replies
    both = [name for name in replies.own if name in sites]
    gap = (
        {
            "local_score": sum(replies.own[name] for name in both) / len(both),
            "global_score": sum(sites[name].value for name in both) / len(both),
        }
        if both
        else {}
    )
    out = {drop.client for drop in played.dropped}
    losses = [loss for client, loss in replies.losses.items() if client not in out]
    return {
        "round": state.round,
        "loss": sum(losses) / len(losses) if losses else None,
        "score": score.value if score else None,
        "beside": dict(score.beside) if score else {},
        "cohort": list(cohort),
        "dropped": [asdict(drop) for drop in played.dropped],
        "up_bytes": sum(sent.bytes for sent in replies.sent if sent.direction == "up"),
        "down_bytes": sum(sent.bytes for sent in replies.sent if sent.direction == "down"),
        **state.metrics,
        **gap,
        **({"epsilon": spent(promise)} if promise else {}),
        "seconds": round(seconds, 3),
    }


def export(
    config: Config, method: Method, engine: RunEngine, state: State, kept: Mapping[str, Tensors], record: Record
) -> Path:
    """Writes the adapter as plain LoRA below the run directory, loads it again with PEFT, and compares.

    A method without a global model writes one adapter for each client. Files are written one by one, each whole or
    not at all, the config last: a folder with an adapter_config.json is complete.
    """
    folder = record.folder / "adapter"
    models = (
        {folder: method.model(state)}
        if method.facts.global_model
        else {folder / safe_name(site.name): engine.tensors_of(method, state, kept, site.name) for site in engine.sites}
    )
    write_adapters(engine, models, _card_facts(config, method, record), engine.probes)
    return folder


def write_adapters(
    bench: Bench, models: Mapping[Path, Tensors], facts: Mapping[str, str], probes: Sequence[Example]
) -> None:
    """Each model as a plain LoRA adapter in its folder, loaded again with PEFT and compared on the probes.

    Without probes (a coordinator without test rows) nothing is compared; sites compare on their own.
    """
    base = base_facts(bench)
    logits = {path: bench.logits(tensors, probes) for path, tensors in models.items() if probes}
    model = bench.adapted.unwrap()
    for path, tensors in models.items():
        head = {key: tensors[key] for key in bench.head}
        factors = bench.method.export(tensors)
        card = model_card(base, facts, "path/to/this/adapter", serving(lora_config(factors, base), base.model_type))
        files = lora_files(factors, head, base, card)
        for name in sorted(files, key=lambda name: name == "adapter_config.json"):
            write_atomic(path / name, files[name])
        if path in logits:
            check_adapter(path, model, *logits[path], factors, base)


def finish(record: Record, engine: RunEngine, sites: Mapping[str, Score], adapter: Path) -> float | None:
    """Writes result.json and the report; gives back the last score."""
    rounds = record.rows("rounds.jsonl")
    took_part = [name for row in rounds for name in row["cohort"]]
    last = rounds[-1]
    before = read_result(record.folder)  # of a finished run that is taken up again
    one = adapter if engine.method.facts.global_model else adapter / safe_name(engine.sites[0].name)
    base = base_facts(engine)
    written = json.loads((one / "adapter_config.json").read_bytes())
    result = {
        "score": last["score"],
        "beside": last.get("beside", {}),
        "loss": last["loss"],
        "clients": [
            {
                "name": site.name,
                "score": sites[site.name].value if site.name in sites else None,
                "rows": sites[site.name].count if site.name in sites else 0,
                "rounds": took_part.count(site.name),
                "unseen": site.unseen,
            }
            for site in engine.data.sites
        ],
        "epsilon": spent(engine.promise) if engine.promise else None,
        # Of a private run it is not told: it depends on how many rows were drawn, and on how long they are.
        "peak_memory_bytes": None
        if engine.promise
        else (before or {}).get("peak_memory_bytes") or peak_memory_bytes(engine.adapted.device),
        "adapter": str(adapter),
        "load": load_lines(base, one),
        "serving": [asdict(server) for server in serving(written, base.model_type)],
    }
    write_atomic(record.folder / "result.json", json.dumps(result, indent=1).encode())
    write_report(record.folder)
    return last["score"] if last["score"] is None else float(last["score"])


def base_facts(bench: Bench) -> BaseFacts:
    return BaseFacts(
        name=bench.base.name,
        shared_name=bench.base.shared_name,
        revision=bench.config.model.revision,
        auto_class=bench.task.auto_class,
        task_type=bench.task.peft_task_type,
        head=bench.base.head,
        label_names=bench.task.label_names,
        problem_type=bench.task.problem_type,
        conv1d=has_conv1d(bench.adapted.layers),
        pad_token=bench.base.pad_token,
        quantization=bench.base.quantization,
        model_type=bench.base.model_type,
    )


def _basis_facts(basis: Basis | None, *, private: bool) -> dict[str, Any] | None:
    if basis is None:
        return None
    shares = [share for share in basis.captured.values() if math.isfinite(share)]
    return {
        "kind": basis.kind,
        "looks_at": BASES[basis.kind].looks_at,
        "up": basis.up,
        "down": basis.down,
        "captured_share": sum(shares) / len(shares) if shares else None,
        "captured_by_layer": dict(basis.captured),
        "seconds": round(basis.seconds, 3),
        "peak_memory_bytes": None if private else basis.peak_memory_bytes,
    }


def _table_text(table: Mapping[str, Any]) -> str:
    """Returns a table's name and its rows, where they are told."""
    name = Path(table["origin"]).name
    return name if table["rows"] is None else f"{name} ({table['rows']:,} rows)"


def _card_facts(config: Config, method: Method, record: Record) -> dict[str, str]:
    facts = summary(record.folder)
    tables = record.manifest["data"].values()
    score = facts["score"]
    return {
        "Method": f"{method.facts.id} ({method.facts.paper}), rank {method.rank}",
        "Data": ", ".join(map(_table_text, tables)),
        "Clients": f"{sum(not client['unseen'] for client in record.manifest['clients'])}, {config.clients.split}",
        "Rounds": str(facts["rounds"]) + (f" of {config.rounds} planned" if facts["rounds"] < config.rounds else ""),
        "Bytes sent": f"{facts['bytes']['federation']['with_head']['total']:,} by the whole federation",
        "Score": "not scored" if score is None else f"{record.manifest['task']['metric']} {score:.4f}",
        "Privacy": record.manifest["privacy"]["says"]
        if record.manifest["not_private"] is None
        else f"not private: {record.manifest['not_private']}",
    }
