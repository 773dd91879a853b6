"""Keys of the last version, which still work in this one, and the names that other libraries use for a setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "model.max_tokens": "model.max_seq_length",
    "model.targets": "model.target_modules",
    "model.attention": "model.attn_implementation",
    "model.matmul": "model.float32_matmul_precision",
    "data.tune_share": "data.validation_fraction",
    "data.drop": "data.exclude",
    "clients.split": "clients.partition",
    "clients.alpha": "clients.dirichlet_alpha",
    "clients.held_out": "clients.holdout_fraction",
    "clients.unseen": "clients.holdout_clients",
    "clients.ranks": "clients.total_ranks",
    "train.steps": "train.local_steps",
    "train.epochs": "train.local_epochs",
    "train.accumulate": "train.gradient_accumulation_steps",
    "train.clip_norm": "train.max_grad_norm",
    "train.warmup": "train.warmup_ratio",
    "train.keep_optimizer": "train.persist_optimizer_state",
    "server.secure_sum": "server.secure_aggregation",
    "server.sum_limit": "server.secagg_clip",
    "server.secagg_fraction": "server.fraction",
    "server.norm_factor": "server.max_norm_ratio",
    "privacy.clip": "privacy.clip_norm",
    "engine.cohort_size": "engine.clients_per_forward",
    "compare.tune_share": "compare.validation_fraction",
}
RENAMED_VALUES = {("engine.name", "embedded"): "in_process"}
KNOWN_ELSEWHERE = {
    "learning_rate": "train.lr",
    "per_device_train_batch_size": "train.batch_size",
    "train_batch_size": "train.batch_size",
    "num_train_epochs": "train.local_epochs",
    "num_epochs": "train.local_epochs",
    "max_steps": "train.local_steps",
    "lr_scheduler_type": "train.schedule",
    "optim": "train.optimizer",
    "lora_dropout": "train.dropout",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "r": "method.rank",
    "lora_alpha": "method.alpha",
    "max_length": "model.max_seq_length",
    "model_name_or_path": "model.name",
    "base_model": "model.name",
    "torch_dtype": "model.dtype",
    "gradient_checkpointing": "model.activation_checkpointing",
    "load_in_4bit": "model.quantize",
    "load_in_8bit": "model.quantize",
    "max_new_tokens": "task.new_tokens",
    "num_labels": "data.classes",
    "num_clients": "clients.count",
    "n_clients": "clients.count",
    "num_rounds": "rounds",
    "output_dir": "out",
    "dataset": "data.train",
    "train_file": "data.train",
}


def notice_of(old: str, new: str) -> str:
    """Returns the notice for a key or value that still works under its old name."""
    return f"{old} was renamed to {new}. The old name works in this version only"


def both_set(old: str, new: str) -> str:
    """Returns the fault of a key that is given under its old name and its new name."""
    return f"{old}: it was renamed to {new}, and both are set. Remove {old}"


def with_new_names(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Returns the settings with renamed keys and values under their new names, the notices, and the faults.

    A key given under both its old and its new name is a fault. The dotted keys of [compare] are renamed too.
    """
    now, notices, faults = dict(raw), list[str](), list[str]()
    for old, new in RENAMED.items():
        section, _, old_key = old.partition(".")
        table, new_key = now.get(section), new.partition(".")[2]
        if not isinstance(table, Mapping) or old_key not in table:
            continue
        if new_key in table:
            faults.append(both_set(old, new))
            now[section] = {key: value for key, value in table.items() if key != old_key}
        else:
            now[section] = {new_key if key == old_key else key: value for key, value in table.items()}
            notices.append(notice_of(old, new))
    for (place, old_value), new_value in RENAMED_VALUES.items():
        section, _, key = place.partition(".")
        table = now.get(section)
        if isinstance(table, Mapping) and table.get(key) == old_value:
            now[section] = {**table, key: new_value}
            notices.append(notice_of(f"{place} = {old_value!r}", repr(new_value)))
    if "compare" in now:
        now["compare"] = _with_new_dotted_keys(now["compare"], notices, faults)
    return now, notices, faults


def _with_new_dotted_keys(value: Any, notices: list[str], faults: list[str]) -> Any:
    """Returns `value` with renamed dotted keys, as in `grid = { "train.steps" = [5, 10] }`, at any depth."""
    if isinstance(value, list):
        return [_with_new_dotted_keys(each, notices, faults) for each in value]
    if not isinstance(value, Mapping):
        return value
    for old in sorted(RENAMED.keys() & value.keys()):
        if RENAMED[old] in value:
            faults.append(both_set(old, RENAMED[old]))
        else:
            notices.append(notice_of(old, RENAMED[old]))
    return {RENAMED.get(key, key): _with_new_dotted_keys(each, notices, faults) for key, each in value.items()}
