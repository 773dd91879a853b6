"""Merges an adapter into the weights of its base model, and writes the result as a folder that other libraries load.

A classifier with mean pooling is trained as a token classifier whose logits are averaged over each text's tokens.
transformers has no text classifier that does this: it would load the folder with a head of random weights. Such a model
is therefore written as a folder of sentence-transformers (encoder, masked mean, linear layer). That folder has no
config.json at its root, so `pipeline("text-classification")` refuses it.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from fedsb.adapters.export import BaseModelInfo, labelled_config, ready_tokenizer
from fedsb.adapters.export_check import TOLERANCE, relative_difference
from fedsb.utils.errors import RunError, UserError

ENCODER, POOLING, DENSE = "0_Transformer", "1_Pooling", "2_Dense"  # folders of a sentence-transformers model


def merge(base: BaseModelInfo, adapter: Path, folder: Path, tokenizer: Any) -> BaseModelInfo:
    """Writes the base with the adapter merged into its weights, and the tokenizer, as an ordinary model folder.

    With mean pooling, it is a folder of sentence-transformers. Returns `base` with the end tokens of the base model's
    generation config added. Raises UserError if `merged_plan` says that the adapter cannot be merged.
    """
    import transformers
    from peft import PeftModel

    labels: dict[str, Any] = (
        {"num_labels": len(base.label_names), "ignore_mismatched_sizes": True} if base.label_names else {}
    )
    model = getattr(transformers, base.auto_class).from_pretrained(
        base.name, revision=base.revision, trust_remote_code=False, **labels
    )
    available, why = merged_plan(base, model.eval())
    if not available:
        raise UserError(
            f"--merged is not possible: {why}. Export the adapter without --merged. Its README shows how to load it."
        )
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    ready = ready_tokenizer(tokenizer, base)
    if base.averages:
        _write_averaging(base, merged.eval(), ready, folder)
        return base
    if base.label_names:
        merged.config = labelled_config(merged.config, base)
    elif base.task_type == "CAUSAL_LM":
        own = merged.generation_config.eos_token_id
        named = own if isinstance(own, list) else [] if own is None else [own]
        base = replace(base, ends=sorted({*base.ends, *named}))
        merged.generation_config = _ending(merged.generation_config, base, ready.pad_token_id)
    merged.save_pretrained(folder)
    ready.save_pretrained(folder)
    return base


@torch.no_grad()
def merged_plan(base: BaseModelInfo, model: Any) -> tuple[bool, str]:
    """Returns whether the adapter can be merged into this base model, with the format of the result or the reason.

    A classifier that averages its tokens' logits must be one linear layer on the encoder's last states. The mean of the
    logits is then this layer applied to the mean of the states.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return (
            False,
            f"the weights of {base.name} are quantised, and an adapter can be merged into unquantised weights only",
        )
    if not base.averages:
        return True, "an ordinary model folder"
    encoder, ids = model.base_model, torch.arange(1, 5, device=model.device).unsqueeze(0)
    heads = _heads(model)
    try:
        plain = len(heads) == 1 and isinstance(heads[0], nn.Linear)
        plain = plain and relative_difference(heads[0](encoder(ids)[0]), model(ids).logits) <= TOLERANCE
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
        plain = False  # an encoder that cannot be called by itself
    if plain:
        return True, "a folder of sentence-transformers, since no class of transformers averages a classifier's logits"
    return False, (
        f"task.pooling = 'mean' is not available for a model of the type {model.config.model_type!r}: its classifier "
        "has more than one layer, and no common format averages its logits"
    )


def _heads(model: Any) -> list[nn.Module]:
    """Returns the modules outside the encoder that have parameters."""
    return [part for part in model.children() if part is not model.base_model and any(True for _ in part.parameters())]


def _ending(settings: Any, base: BaseModelInfo, pad_token: int | None) -> Any:
    """Returns a copy of a generation config that stops at the end tokens of `base`.

    transformers does not save a config that contradicts itself. Such a config is replaced by one without sampling.
    """
    from transformers import GenerationConfig

    ending = copy.deepcopy(settings)
    try:
        ending.validate(strict=True)
    except ValueError:
        ending = GenerationConfig(bos_token_id=settings.bos_token_id, eos_token_id=settings.eos_token_id)
    ending.eos_token_id = list(base.ends) or None
    ending._from_model_config = False  # otherwise transformers may use the end token of config.json
    ending.pad_token_id = settings.pad_token_id if settings.pad_token_id is not None else pad_token
    return ending


@torch.no_grad()
def _write_averaging(base: BaseModelInfo, model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a token classifier that can be merged as an encoder, a masked mean and a linear layer."""
    from transformers import AutoModel

    encoder, kind, (head,) = model.base_model, model.config.model_type, _heads(model)
    assert isinstance(head, nn.Linear)
    whole = AutoModel.from_pretrained(  # with a pooler, if the base has one
        base.name, revision=base.revision, trust_remote_code=False
    )
    if strange := whole.load_state_dict(encoder.state_dict(), strict=False).unexpected_keys:
        raise RunError(
            f"The encoder of a {kind} model has no tensor {strange[0]!r}. Please report it with `fedsb env`."
        )
    whole.save_pretrained(folder / ENCODER)
    tokenizer.save_pretrained(folder / ENCODER)
    (m, n), dense = head.weight.shape, "torch.nn.modules.linear.Identity"
    types = ((ENCODER, "Transformer"), (POOLING, "Pooling"), (DENSE, "Dense"))
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(types)
        ],
        f"{ENCODER}/sentence_bert_config.json": {"max_seq_length": base.max_tokens, "do_lower_case": False},
        f"{POOLING}/config.json": {"word_embedding_dimension": n, "pooling_mode_mean_tokens": True},
        f"{DENSE}/config.json": {
            "in_features": n,
            "out_features": m,
            "bias": head.bias is not None,
            "activation_function": dense,
        },
        "labels.json": list(base.label_names),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2))
    tensors = {f"linear.{name}": tensor.contiguous() for name, tensor in head.state_dict().items()}
    (folder / DENSE / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
