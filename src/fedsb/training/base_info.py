"""Facts about an adapter's base model and task, for its files, its card and its check in PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsb.adapters.export import BaseModelInfo, has_conv1d
from fedsb.adapters.layer import AdaptedLinear
from fedsb.data.tasks.base import Task
from fedsb.data.tasks.causal import CausalTask
from fedsb.data.tasks.instruction import ALPACA
from fedsb.data.tasks.text import Text
from fedsb.data.tasks.tokens import start_tokens
from fedsb.models.load import BaseModel
from fedsb.models.names import converted_from


def base_model_info(
    loaded: BaseModel, task: Task, layers: Mapping[str, AdaptedLinear], revision: str | None
) -> BaseModelInfo:
    """Returns the facts about the base model that an adapter of this run must state, and how it is used."""
    return BaseModelInfo(
        name=loaded.name,
        shared_name=loaded.shared_name,
        revision=revision,
        head=loaded.head,
        conv1d=has_conv1d(layers),
        pad_token=loaded.pad_token,
        quantization=loaded.quantization,
        model_type=loaded.model_type,
        origin=converted_from(loaded.name),
        **task_facts(task, loaded.model),
    )


def task_facts(task: Task, model: Any = None) -> dict[str, Any]:
    """Returns the fields of BaseModelInfo that follow from the task; its classes are known."""
    facts: dict[str, Any] = {
        "auto_class": task.auto_class,
        "task_type": task.peft_task_type,
        "label_names": task.class_names,
        "problem_type": task.problem_type,
        "max_tokens": task.max_tokens,
    }
    if not isinstance(task, CausalTask):
        return facts | {"pair": task.options.text_pair is not None}
    chat = bool(task.tokenizer.chat_template) and not isinstance(task, Text)
    return facts | {
        "chat": chat,
        "template": "{prompt}" if chat or isinstance(task, Text) else ALPACA,
        "starts": not chat and bool(start_tokens(task.tokenizer)),
        "ends": task.end_tokens(model),
        "stops": task.stops(),
    }
