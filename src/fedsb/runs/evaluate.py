"""Uses the adapter of a finished run as a plain LoRA adapter: scores it on other data, exports it, merges it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from fedsb.adapters.card import merged_card
from fedsb.adapters.export import BaseModelInfo
from fedsb.adapters.merge import merge
from fedsb.config.load import load_config
from fedsb.config.schema import Config
from fedsb.data.clients import build_task
from fedsb.data.rows import Table
from fedsb.data.tables import load_rows
from fedsb.data.tasks import TASKS
from fedsb.data.tasks.answers import Answers
from fedsb.data.tasks.base import Example, Task, question_of
from fedsb.data.tasks.tokens import pad_token
from fedsb.models.hub import hub_errors, licence_of, quiet
from fedsb.models.load import load_base, matmul_precision
from fedsb.models.names import converted_from, resolve_name, shared_name
from fedsb.models.tokenizer import load_tokenizer
from fedsb.reporting.run_directory import read_manifest, read_result
from fedsb.runs.answers import answer_all
from fedsb.runs.artifacts import card_facts
from fedsb.runs.backends import run_lm_eval, write_with_vllm
from fedsb.training.base_info import task_facts
from fedsb.training.scoring import Answered, answers, graded, measured, prompts_of
from fedsb.utils.errors import UserError
from fedsb.utils.files import disk_errors, safe_name, usual_modes, write_atomic

Backend = Literal["transformers", "vllm"]
Note = Callable[[str], None]


def evaluate_tables(
    folder: Path,
    sources: Sequence[str | None] = (None,),
    *,
    backend: Backend = "transformers",
    note: Note = lambda text: None,
) -> dict[str, Any]:
    """Loads the base model and the LoRA adapter with PEFT, and scores them on tables, by default the run's test data.

    Returns {"run", "metric", "tables", "mean"} with the plain mean over the tables, all of which are read before the
    first one is scored. Generated answers are stored in evals/ in the run directory, and an interrupted evaluation
    resumes from them. Raises UserError for a run that is not finished, a method without a global model, and a
    duplicate table.
    """
    manifest, config, adapter = finished_run(folder)
    task = fitted_task(manifest, config)
    if backend == "vllm" and len(sources) > 1:
        raise UserError("--backend vllm can score one table only. Give one --data per command.")
    tables = [load_rows(config, task, source) for source in sources]
    origins = [table.origin for table in tables]
    if len(set(origins)) < len(origins):
        raise UserError(f"--data contains a table twice: {', '.join(origins)}. Give each table once.")
    encoded = [task.encode_test(table.rows) for table in tables]
    opened = Opened(
        folder=folder,
        config=config,
        task=task,
        adapter=adapter,
        model=cache(lambda: adapted_model(config, task, adapter)),  # loaded once, and only if needed
    )
    found = []
    for table, (examples, cut) in zip(tables, encoded, strict=True):
        if len(tables) > 1:
            note(f"{table.origin}, {len(table.rows):,} rows")
        found.append(_evaluate(opened, table, examples, cut, backend, note))
    return {
        "run": str(folder),
        "metric": task.metric,
        "tables": found,
        "mean": sum(of[task.metric] for of in found) / len(found),
    }


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A finished run that is being scored."""

    folder: Path
    config: Config
    task: Task
    adapter: Path
    model: Callable[[], Any]


def _evaluate(
    opened: Opened, table: Table, examples: Sequence[Example], cut: int, backend: Backend, note: Note
) -> dict[str, Any]:
    """Returns the scores of one table."""
    config, task, adapter = opened.config, opened.task, opened.adapter
    found = {"run": str(opened.folder), "data": table.origin, "rows": len(table.rows)}
    if not isinstance(task, Answers) or task.scoring == "loss":
        if backend != "transformers":
            raise UserError(_not_generated(backend, task))
        with matmul_precision(config.model.float32_matmul_precision):
            return {**found, "cut": cut, **measured(opened.model(), task, examples, config.eval.batch_size).figures}

    def answering(left: Sequence[Example]) -> Iterator[Answered]:
        if not left:
            return
        if backend == "vllm":
            yield from _by_vllm(config, task, adapter, left)
            return
        with matmul_precision(config.model.float32_matmul_precision):
            yield from answers(opened.model(), task, left, config.eval.batch_size)

    where = opened.folder / "evals" / _name(config, table, adapter, backend)
    found |= answer_all(task, examples, answering, where / "answers.jsonl", note)
    write_atomic(where / "result.json", json.dumps(found, indent=1).encode())
    return found


def _not_generated(backend: str, task: Task) -> str:
    return f"--backend {backend} generates answers, but this run is scored by {task.scoring}. Leave it out."


def evaluate_by_lm_eval(folder: Path, tasks: str) -> dict[str, Any]:
    """Runs lm-eval's own `tasks` ("gsm8k,piqa") on the base model with the adapter.

    Raises UserError as `evaluate_tables`, and for a task that does not generate text.
    """
    _, config, adapter = finished_run(folder)
    tokenizer = load_tokenizer(config.model)
    task = build_task(config, tokenizer)
    if task.auto_class != "AutoModelForCausalLM":
        raise UserError(f"--lm-eval needs a model that generates text, but this run's task is {config.task.kind!r}.")
    found = run_lm_eval(adapted_model(config, task, adapter), tokenizer, tasks, config.eval.batch_size)
    return {"run": str(folder), "lm_eval": found}


def adapted_model(config: Config, task: Task, adapter: Path) -> Any:
    """Returns the base model with the LoRA adapter, loaded with PEFT, in evaluation mode."""
    from peft import PeftModel

    base = load_base(
        config.model, auto_class=task.auto_class, num_labels=len(task.label_names), pad_token=pad_token(task.tokenizer)
    )
    with _silently():
        return PeftModel.from_pretrained(base.model, adapter).eval()


def _by_vllm(config: Config, task: Answers, adapter: Path, examples: Sequence[Example]) -> Iterator[Answered]:
    if task.scoring != "answers":
        raise UserError(_not_generated("vllm", task))
    questions = [question_of(example) for example in examples]
    written = write_with_vllm(
        resolve_name(config.model.name)[0],
        config.model.revision,
        config.model.dtype,
        adapter,
        prompts_of(questions),
        ends=task.end_tokens(),
        stops=task.stops(),
    )
    return graded(task, questions, written)


def _name(config: Config, table: Table, adapter: Path, backend: str) -> str:
    """Returns the folder name of an evaluation, which depends on the table, adapter, task, model and backend."""
    weights = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    model = config.model.model_dump_json(
        include={"name", "revision", "dtype", "float32_matmul_precision", "attn_implementation"}
    )
    facts = (table.fingerprint, weights, model, config.task.model_dump_json(), backend)
    return f"{safe_name(Path(table.origin).name.split('.')[0])}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}"


def fitted_task(manifest: Mapping[str, Any], config: Config, new_tokens: int | None = None) -> Task:
    """Returns the task of a run, with the classes that it was trained on.

    `new_tokens` replaces the run's own limit. Raises UserError if it is below 1 or the task does not generate text.
    """
    if new_tokens is not None:
        if TASKS[config.task.kind].auto_class != "AutoModelForCausalLM":
            raise UserError(
                f"--new-tokens {new_tokens} is for models that generate text, but this run's task is "
                f"{config.task.kind!r}. Leave it out."
            )
        if new_tokens < 1:
            raise UserError(f"--new-tokens {new_tokens} is too small. It must be at least 1.")
        config = config.model_copy(update={"task": config.task.model_copy(update={"new_tokens": new_tokens})})
    task = build_task(config, load_tokenizer(config.model))
    task.take_classes(manifest["task"])
    return task


def export_to(folder: Path, to: str, *, merged: bool, public: bool = False) -> str:
    """Copies the adapter or the merged model to a new folder or to `hub:owner/name`, and returns its path or address.

    A new repository on the Hub is private unless `public`. A folder is written atomically. Raises UserError if the
    folder is not empty, if HF_TOKEN is missing, and if the Hub refuses.
    """
    manifest, config, adapter = finished_run(folder)
    if public and not to.startswith("hub:"):
        raise UserError(f"--public is for a repository on the Hub, but --to {to} is a folder. Leave --public out.")
    if to.startswith("hub:"):
        if not os.environ.get("HF_TOKEN"):
            raise UserError(f"--to {to} needs a token for the Hub. Set the environment variable HF_TOKEN.")
        with disk_errors(folder), TemporaryDirectory(dir=folder, prefix=".export.") as draft:
            made = _make(folder, manifest, config, adapter, Path(draft) / "model", merged=merged)
            if not merged:
                _forget_local_base(made)
            return _push(made, to, public=public)
    target = Path(to).expanduser()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"--to {to} is not empty. Choose a new folder.")
    with disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as draft:
            made = _make(folder, manifest, config, adapter, Path(draft) / "model", merged=merged)
            usual_modes(made)
            made.replace(target)
    return str(target)


def _make(run: Path, manifest: Mapping[str, Any], config: Config, adapter: Path, folder: Path, *, merged: bool) -> Path:
    """Writes the adapter or the merged model to `folder` and returns it."""
    if not merged:
        return Path(shutil.copytree(adapter, folder))
    name, _ = resolve_name(config.model.name)
    task = fitted_task(manifest, config)
    base = BaseModelInfo(
        name=name,
        shared_name=shared_name(config.model.name, name),
        revision=config.model.revision,
        head=(),
        conv1d=False,
        pad_token=manifest["model"]["pad_token"],
        origin=converted_from(name),
        **task_facts(task),
    )
    with _silently(), hub_errors(name):
        base = merge(base, adapter, folder, task.tokenizer)
    licence, files = licence_of(name, config.model.revision)
    for path in files:
        shutil.copy(path, folder)
    (folder / "README.md").write_text(merged_card(base, card_facts(run), licence), encoding="utf-8")
    return folder


def _forget_local_base(adapter: Path) -> None:
    """Replaces the path of a local base model by its name, since the path is meaningless elsewhere."""
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text())
    if Path(settings["base_model_name_or_path"]).is_dir():
        settings["base_model_name_or_path"] = Path(settings["base_model_name_or_path"]).name
        path.write_text(json.dumps(settings, indent=2, sort_keys=True))


def _push(folder: Path, to: str, *, public: bool) -> str:
    from huggingface_hub import HfApi

    api, name = HfApi(token=os.environ["HF_TOKEN"]), to.removeprefix("hub:")
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # the Hub's client raises errors of many libraries
        raise UserError(f"--to {to}: the Hub refused it: {error}. The run is unchanged.") from error
    return f"https://huggingface.co/{name}"


@contextmanager
def _silently() -> Iterator[None]:
    """Hides progress bars, load reports, and PEFT's use of a deprecated name of transformers."""
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def finished_run(folder: Path) -> tuple[dict[str, Any], Config, Path]:
    """Returns the manifest, the settings and the adapter of a run.

    Raises UserError if the run is not finished, has no global model, or has an adapter that PEFT cannot load.
    """
    manifest, result = read_manifest(folder), read_result(folder)
    if result is None:
        raise UserError(f"{folder} is not finished. Resume it with `fedsb resume {folder}`.")
    config, adapter = load_config(manifest["config"]).config, folder / "adapter"
    if not config.method.spec.global_model:
        names = ", ".join(sorted(path.name for path in adapter.glob("*")))
        raise UserError(
            f"Method {config.method.spec.id!r} has no global model. The adapters of its clients are {names}."
        )
    if not (adapter / "adapter_config.json").exists():
        raise UserError(f"{adapter} does not exist. `fedsb resume {folder}` writes it again.")
    if result.get("adapter_fault"):
        raise UserError(f"The adapter of {folder} cannot be used. {result['adapter_fault']}")
    return manifest, config, adapter
