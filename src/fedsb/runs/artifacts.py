"""The documents of a run: the manifest, the row of a round, the exported adapter, the result."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedsb.adapters.basis import BASES, Basis, basis_hash
from fedsb.adapters.card import load_lines
from fedsb.adapters.serving import serving
from fedsb.config.load import load_config
from fedsb.config.resolved import ResolvedSetting
from fedsb.methods.base import State
from fedsb.models.hub import quiet
from fedsb.privacy.policy import PrivacyPolicy
from fedsb.privacy.shared import noise_kind, sends_moments
from fedsb.privacy.statement import epsilon_at_most, epsilon_spent, privacy_statement, why_not_private
from fedsb.protocol.prices import PricedBasis, PricedRun, price_list
from fedsb.protocol.requirements import sum_bytes
from fedsb.protocol.schedule import broadcasts, refreshes
from fedsb.reporting.report import summary, write_report
from fedsb.reporting.run_directory import read_manifest, read_result, read_rows
from fedsb.reporting.warnings import counted_rounds, run_warnings
from fedsb.runs.record import Record
from fedsb.server.server import RoundResult, Server
from fedsb.training.export import write_adapters
from fedsb.training.score import Score
from fedsb.utils.environment import git_hash, versions
from fedsb.utils.errors import DiskError, RunError, UserError
from fedsb.utils.files import safe_name, write_atomic
from fedsb.utils.phases import Phases
from fedsb.utils.tensors import Tensors


def describe_start(
    server: Server,
    basis: Basis | None,
    state: State,
    settings: Sequence[ResolvedSetting],
    before: Score | None,
) -> dict[str, Any]:
    """Returns the part of the manifest that is known before the first round."""
    config, method, trainer = server.config, server.method, server.trainer
    task, data = trainer.task, server.data
    head = sum(tensor.numel() for tensor in trainer.head.values())
    tensors = method.model(state)
    trained = method.trainable(tensors, 0)
    return {
        "settings": [asdict(setting) for setting in settings],
        "versions": versions(),
        "git": git_hash(),
        "seed": config.seed,
        "rounds": config.rounds,
        "model": {
            "name": config.model.name,
            "path": trainer.base.name,
            "parameters": trainer.base.parameters,
            "pad_token": trainer.base.pad_token,
            "fingerprint": trainer.base.fingerprint,
            "quantization": dict(trainer.base.quantization),
            "revision": config.model.revision,
            "adapted_layers": len(trainer.shapes),
            "trained_values": sum(tensors[key].numel() for key in trained),
        },
        "data_card": data.card.as_dict(),
        "test": data.test_description if data.test else None,
        "task": {
            "kind": config.task.kind,
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "label_names": task.label_names or None,
            "class_names": task.class_names or None,
            "auto_class": task.auto_class,
            "peft_task_type": task.peft_task_type,
            "problem_type": task.problem_type,
        },
        "clients": [
            {
                "name": site.name,
                "rows": site.rows,
                "held_out_rows": len(site.held_out),
                "labels": None if server.policy else site.labels,
                "unseen": site.unseen,
            }
            for site in data.clients
        ],
        "method": {"id": method.spec.id, "paper": method.spec.paper, "travels": method.spec.travels},
        "basis": _basis_facts(basis, private=bool(server.policy)),
        "basis_hash": basis_hash(state.shared),
        "prices": [
            price.as_dict()
            for price in price_list(
                method,
                PricedRun(
                    shapes=trainer.shapes,
                    head=head,
                    clients=min(config.server.clients_per_round or len(server.clients), len(server.clients)),
                    rounds=config.rounds,
                    codec=config.server.codec,
                    fraction=config.server.fraction,
                    broadcasts=broadcasts([site.name for site in server.clients], config, method, server.ranks),
                    up_bytes=sum_bytes(config, server.policy),
                    is_step=noise_kind(config, method)[0] == "shared",
                    sends_moments=sends_moments(config, method),
                ),
                PricedBasis(
                    up=basis.up if basis else 0,
                    down=basis.down if basis else 0,
                    clients=len(server.clients),
                    refreshes=len(refreshes(config, method)),
                ),
            )
        ],
        "before": {
            "score": before.value if before else None,
            "majority": data.baseline,
            "majority_of_test": data.best_guess,
        },
        "privacy": privacy_statement(server.policy, config, sum(tensors[key].numel() for key in trained)),
        "not_private": why_not_private(server.policy),
    }


def round_row(
    result: RoundResult,
    score: Score | None,
    clients: Mapping[str, Score],
    seconds: float,
    policy: PrivacyPolicy,
) -> dict[str, Any]:
    """Returns a row of rounds.jsonl. The loss is the plain mean over the clients whose updates were good.

    With `clients`, it also has the plain means over the cohort of the clients' own scores and of the global model's on
    the same rows: "local_score" and "global_score", whose difference is the local-to-global gap.
    """
    state, replies = result.state, result.replies
    both = [name for name in replies.scores if name in clients]
    gap = (
        {
            "local_score": sum(replies.scores[name] for name in both) / len(both),
            "global_score": sum(clients[name].value for name in both) / len(both),
        }
        if both
        else {}
    )
    out = {drop.client for drop in result.dropped}
    losses = [loss for client, loss in replies.losses.items() if client not in out]
    return {
        "round": state.round,
        "loss": sum(losses) / len(losses) if losses else None,
        "score": score.value if score else None,
        "extra_metrics": dict(score.extra_metrics) if score else {},
        **({"confusion": score.confusion} if score and score.confusion else {}),
        "cohort": list(result.cohort),
        "dropped": [asdict(drop) for drop in result.dropped],
        "up_bytes": sum(sent.bytes for sent in replies.traffic if sent.direction == "up"),
        "down_bytes": sum(sent.bytes for sent in replies.traffic if sent.direction == "down"),
        **state.metrics,
        **gap,
        **({"epsilon": epsilon_at_most(policy)} if policy else {}),
        **({"own_epsilon": epsilon_at_most(policy, alone=True)} if policy.shared_noise else {}),
        "seconds": round(seconds, 3),
    }


def export(server: Server, state: State, record: Record) -> tuple[Path, UserError | RunError | None]:
    """Writes the adapter as plain LoRA below the run directory, loads it again with PEFT, and compares.

    Clients with models of their own have one adapter each: in adapter/NAME, or in clients/NAME if there is a global
    one too. Files are written one by one, each whole or not at all, the config last: a folder with an
    adapter_config.json is complete.

    Returns the folder, and the fault of an adapter that PEFT does not load as it was trained. The run still completes,
    and its trained tensors are on disk.
    """
    folder, method = record.folder / "adapter", server.method
    own, models = server.opened.local_clients.client_model, dict[Path, Tensors]()
    if method.spec.global_model:
        models[folder] = method.model(state)
    if method.spec.own_models and server.channel.spec.holds_rows:
        where = record.folder / "clients" if method.spec.global_model else folder
        models |= {where / safe_name(c.name): own(method, state, c.name) for c in server.clients}
    why = why_unchecked(server)
    facts = card_facts(record.folder) | ({} if why is None else {"Check": f"not checked: {why}"})
    try:
        with quiet():
            write_adapters(server.trainer, models, facts, server.probes)
    except DiskError:
        raise
    except (UserError, RunError) as fault:
        return folder, fault
    return folder, None


def why_unchecked(server: Server, run: Path | str = "RUN") -> str | None:
    """Returns why the exported adapter of `run` is not compared with the trained model; None if it is."""
    if server.trainer.shapes_only:
        why = "this coordinator has no base model"
    elif not server.probes:
        why = "this coordinator has no rows to compare it on"
    else:
        return None
    return f"{why}. Score it with `fedsb eval {run} --data FILE` on a machine that has the base model"


def finish(
    record: Record,
    server: Server,
    scores: Mapping[str, Score],
    phases: Phases,
    adapter: Path,
    fault: Exception | None = None,
) -> float | None:
    """Writes result.json and the report, and returns the last score. `fault` is the fault of the adapter, if any.

    `phases` are those of this process: a resumed run has no "basis".
    """
    rounds = record.rows("rounds.jsonl")
    last = rounds[-1]
    measured = phases.as_dict(memory=not server.policy)
    if (before := read_result(record.folder)) is not None:  # a finished run that is resumed
        measured = before.get("phases", measured)
    one = adapter if server.method.spec.global_model else adapter / safe_name(server.clients[0].name)
    base = server.trainer.base_model_info()
    written = json.loads((one / "adapter_config.json").read_bytes())
    result = {
        "score": last["score"],
        "extra_metrics": last.get("extra_metrics", {}),
        "loss": last["loss"],
        "warnings": run_warnings(record.manifest, rounds),
        "confusion": last.get("confusion"),
        "clients": [
            {
                "name": site.name,
                "score": scores[site.name].value if site.name in scores else None,
                "rows": scores[site.name].count if site.name in scores else 0,
                "rounds": sum(site.name in row["cohort"] for row in rounds),
                "counted": counted_rounds(rounds, site.name),
                "unseen": site.unseen,
            }
            for site in server.data.clients
        ],
        "epsilon": epsilon_spent(server.policy) if server.policy else None,
        "own_epsilon": epsilon_spent(server.policy, alone=True) if server.policy.shared_noise else None,
        # Left out of a private run, because it depends on how many rows were drawn, and on how long they are.
        "peak_memory_bytes": None
        if server.policy
        else max(phase.get("peak_memory_bytes", 0) for phase in measured.values()),
        "phases": measured,
        "adapter": str(adapter),
        "adapter_fault": None if fault is None else str(fault),
        "adapter_unchecked": why_unchecked(server, record.folder),
        "load": load_lines(base, one),
        "serving": [asdict(server) for server in serving(written, base.model_type)],
        "data_card": record.manifest.get("data_card"),
    }
    write_atomic(record.folder / "result.json", json.dumps(result, indent=1).encode())
    write_report(record.folder)
    return last["score"] if last["score"] is None else float(last["score"])


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
    """Returns a table's name and, if it is public, its number of rows."""
    name = Path(table["origin"]).name
    return name if table["rows"] is None else f"{name} ({table['rows']:,} rows)"


def card_facts(folder: Path) -> dict[str, str]:
    """Returns the rows of a model card's table: how the run in `folder` was made and what it scored."""
    manifest, facts = read_manifest(folder), summary(folder)
    config = load_config(manifest["config"]).config
    method = config.method
    warnings = run_warnings(manifest, read_rows(folder / "rounds.jsonl"))
    settings = {choice["key"]: choice for choice in manifest["settings"]}
    fixed = settings.get("model.template_date", {})
    dated = {"Date in the prompts": str(fixed["value"])} if "writes a date" in fixed.get("reason", "") else {}
    clients, score = manifest["clients"], facts["score"]
    return {
        "Method": f"{method.spec.id} ({method.spec.paper}), rank {method.rank}",
        "Data": ", ".join(map(_table_text, manifest["data"].values())),
        "Clients": f"{sum(not client['unseen'] for client in clients)}, {config.clients.partition}",
        "Rounds": str(facts["rounds"])
        + (f" of {manifest['rounds']} planned" if facts["rounds"] < manifest["rounds"] else ""),
        "Bytes sent": f"{facts['bytes']['federation']['with_head']['total']:,} by the whole federation",
        "Score": "not scored" if score is None else f"{manifest['task']['metric']} {score:.4f}",
        "Privacy": manifest["privacy"]["says"]
        if manifest["not_private"] is None
        else f"not private: {manifest['not_private']}",
        **dated,
        **{f"Warning {i}": found["text"] for i, found in enumerate(warnings, start=1)},
    }
