"""Writes trained tensors as plain LoRA adapters, and compares each with the model that was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsb.adapters.card import model_card
from fedsb.adapters.export import companion_files, lora_config, lora_files
from fedsb.adapters.export_check import check_adapter
from fedsb.adapters.serving import serving
from fedsb.data.tasks.base import Example
from fedsb.training.trainer import Trainer
from fedsb.utils.files import write_atomic
from fedsb.utils.tensors import Tensors


def write_adapters(
    trainer: Trainer, models: Mapping[Path, Tensors], facts: Mapping[str, str], probes: Sequence[Example]
) -> None:
    """Writes each model as a plain LoRA adapter in its folder, loads it again with PEFT and compares on the probes.

    Without probes (a coordinator without test rows or without the base model) nothing is compared; the sites then
    compare their own adapters.
    Every folder is written before the first is loaded. Raises the same errors as `check_adapter`.
    """
    base = trainer.base_model_info()
    logits = {path: trainer.logits(tensors, probes) for path, tensors in models.items() if probes}
    model: Any = trainer.adapted.unwrap()
    companions = companion_files(trainer.tokenizer, model.config, base)
    factors = {path: trainer.method.export(tensors) for path, tensors in models.items()}
    for path, tensors in models.items():
        head = {key: tensors[key] for key in trainer.head}
        card = model_card(base, facts, serving(lora_config(factors[path], base), base.model_type))
        files = companions | lora_files(factors[path], head, base, card)
        for name in sorted(files, key=lambda name: name == "adapter_config.json"):
            write_atomic(path / name, files[name])
    for path in logits:
        check_adapter(path, model, *logits[path], factors[path], base)
