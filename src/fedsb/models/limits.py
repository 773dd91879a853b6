"""The limits of a base model's inputs: the number of its positions, and its tokens.

Both follow from the architecture, so `fedsb check` can report them without weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from fedsb.config.inputs import ModelConfig
from fedsb.config.resolved import ResolvedSetting
from fedsb.models.layers import is_inside, other_towers
from fedsb.utils.errors import UserError

POSITIONS = re.compile(
    r"(^|\.)((char_)?position_embeddings?|embed_positions|positions_embed|pos_embeddings?|wpe|pos_encoding)$"
)


def usable_positions(model: Any) -> int | None:
    """Returns the maximal number of tokens; None for a model without a table of positions (RoPE, ALiBi, T5).

    A table may have reserved entries: RoBERTa starts after the position of its padding token, OPT and BART at an
    offset.
    """
    towers = other_towers(model)

    def is_table(name: str) -> bool:
        return POSITIONS.search(name) is not None and not any(is_inside(name, tower) for tower in towers)

    found: list[int] = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and is_table(name):
            reserved = getattr(module, "offset", 0)
            if (pad := getattr(module, "padding_idx", None)) is not None:
                reserved = max(reserved, pad + 1)
            found.append(len(weight) - reserved)
    found += [len(x) for name, x in model.named_buffers() if x.dim() >= 2 and is_table(name)]
    text = model.config.get_text_config() if hasattr(model, "config") else None
    if text is not None and text.model_type == "mpt":  # ALiBi, for this many positions
        found.append(text.max_seq_len)
    if found and isinstance(stated := getattr(text, "max_position_embeddings", None), int):
        found.append(stated)
    return min(found, default=None)


def check_positions(model: Any, config: ModelConfig) -> list[ResolvedSetting]:
    """Returns a warning for a window that is longer than the model was trained on.

    Raises UserError if the model has no position for the last tokens of such a row.
    """
    usable = usable_positions(model)
    if usable is not None and config.max_seq_length > usable:
        raise UserError(
            f"model.max_seq_length = {config.max_seq_length}, but {config.name!r} has {usable} positions and fails on "
            f"longer rows. Set it to {usable} or less: --set model.max_seq_length={usable}"
        )
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if usable is None and isinstance(trained, int) and config.max_seq_length > trained:
        reason = f"warning: the model was trained for {trained:,} positions; it may read longer rows badly"
        return [ResolvedSetting(key="model.max_seq_length", value=config.max_seq_length, reason=reason)]
    return []


def check_tokens(model: Any, tokenizer: Any, examples: Iterable[Sequence[int]]) -> None:
    """Raises UserError if a row contains a token for which the model has no embedding."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return
    if not isinstance(table, nn.Embedding):  # CANINE hashes characters
        return
    largest = max((max(tokens) for tokens in examples if tokens), default=0)
    if largest >= table.num_embeddings:
        raise UserError(
            f"The rows contain token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the model has "
            f"embeddings for {table.num_embeddings:,} tokens only. The tokenizer has more tokens than the model. Use "
            "the tokenizer that belongs to it, or resize the model's embeddings and save it again "
            "(model.resize_token_embeddings)."
        )


def batch_dependent_positions(model: Any, max_tokens: int) -> str | None:
    """Returns why a row's positions depend on the longest row of its batch; None if they do not.

    The rotary types "dynamic" and "longrope" change their frequencies once any row is longer than the original window.
    """
    text = model.config.get_text_config()
    found = getattr(text, "rope_parameters", None) or {}
    for rope in (found, *(inner for inner in found.values() if isinstance(inner, dict))):
        kind = rope.get("rope_type")
        window = rope.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", None)
        if kind in ("dynamic", "longrope") and isinstance(window, int) and max_tokens > window:
            return (
                f"its rotary embedding ({kind}) changes for all rows of a batch once one is longer than {window:,} "
                f"tokens (model.max_seq_length = {max_tokens})"
            )
    return None
