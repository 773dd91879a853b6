"""A finished run's adapter, used as anyone would use it: scored on other rows, copied, merged, sent to the Hub."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from fedsb.adapters.export import BaseFacts, merge
from fedsb.config import Config, load_config
from fedsb.data.sites import load_rows, open_task_of
from fedsb.errors import UserError
from fedsb.federation.scoring import mean_score
from fedsb.model import load_base, load_tokenizer
from fedsb.record import read_manifest, read_result


def evaluate_adapter(folder: Path, data: str | None) -> dict[str, Any]:
    """Loads the base and the plain LoRA adapter with PEFT and scores them on `data`, or on the run's own test rows.

    Raises UserError for a run that is not finished, or one whose clients each have an adapter of their own.
    """
    from peft import PeftModel

    manifest, config, adapter = _finished(folder)
    tokenizer = load_tokenizer(config.model)
    task = open_task_of(config, tokenizer)
    task.label_names = list(manifest["task"]["label_names"] or [])
    table = load_rows(config, task, data)
    examples, cut = task.encode(table.rows)
    base = load_base(
        config.model, auto_class=task.auto_class, num_labels=len(task.label_names), pad_token=tokenizer.pad_token_id
    )
    model = PeftModel.from_pretrained(base.model, adapter)
    score = mean_score(model.eval(), task, examples, config.eval.batch_size)
    return {"run": str(folder), "data": table.origin, "rows": len(table.rows), "cut": cut, task.metric: score}


def export_to(folder: Path, to: str, *, merged: bool) -> str:
    """Copies the adapter, or the merged model, to a new folder or to `hub:owner/name`; gives back where it is.

    Raises UserError where the folder holds something, or HF_TOKEN is missing.
    """
    manifest, config, adapter = _finished(folder)
    hub = to.startswith("hub:")
    if hub and not os.environ.get("HF_TOKEN"):
        raise UserError(f"--to {to}: pushing to the Hub needs a token; set the environment variable HF_TOKEN")
    target = folder / "export" if hub else Path(to)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"--to {target} holds something already; name a new folder")
    if merged:
        from transformers import AutoConfig

        base = manifest["model"]["path"]
        task = manifest["task"]
        AutoConfig.from_pretrained(base, revision=config.model.revision)
        merge(
            BaseFacts(
                name=base,
                revision=config.model.revision,
                auto_class=task["auto_class"],
                task_type=task["peft_task_type"],
                head=(),
                label_names=task["label_names"] or [],
                conv1d=False,
            ),
            adapter,
            target,
        )
    else:
        shutil.copytree(adapter, target, dirs_exist_ok=True)
    if not hub:
        return str(target)
    from huggingface_hub import HfApi

    api, name = HfApi(token=os.environ["HF_TOKEN"]), to.removeprefix("hub:")
    api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=target)
    shutil.rmtree(target)
    return f"https://huggingface.co/{name}"


def _finished(folder: Path) -> tuple[dict[str, Any], Config, Path]:
    manifest = read_manifest(folder)
    result = read_result(folder)
    if result is None:
        raise UserError(f"{folder} is not finished: `fedsb resume {folder}` goes on")
    adapter = folder / "adapter"
    if not (adapter / "adapter_config.json").exists():
        names = ", ".join(sorted(path.name for path in adapter.glob("*")))
        raise UserError(f"method {manifest['method']['id']!r} has no global model; its clients' adapters are {names}")
    return manifest, load_config(manifest["config"]).config, adapter
