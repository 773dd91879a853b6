"""Greedy generation, batched and left-padded, with the key-value cache of transformers.

The same prompts give the same answers in any order and any batch, except for rounding: in bfloat16 two almost equal
logits may change places. It works with a plain model, with fedsb's adapter of one client, and with a PEFT model.
Shapes: b prompts, t tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedsb.data.tasks.tokens import Tokenizer, pad_token

STOP_TOKENS = 16  # of an answer's end that are searched for a stop text


@dataclass(frozen=True, kw_only=True)
class Written:
    """A generated text."""

    text: str
    tokens: int
    ended: bool  # by an end token or a stop text; else it was cut


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt and the maximal length of its answer."""

    tokens: tuple[int, ...]
    new_tokens: int


def write_answers(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    ends: Sequence[int],
    stops: Sequence[str] = (),
    batch_size: int,
) -> Iterator[tuple[int, Written]]:
    """Yields (the prompt's position, the generated text). A batch has prompts of one length; long ones come first.

    A prompt that leaves no room in the model's window has an empty answer, which counts as cut.
    """
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # PEFT's own wrapper adds nothing
        inner = inner.get_base_model()
    window = _window(inner)
    room = {
        i: min(prompt.new_tokens, window - len(prompt.tokens)) if window else prompt.new_tokens
        for i, prompt in enumerate(prompts)
    }
    yield from ((i, Written(text="", tokens=0, ended=False)) for i, left in room.items() if left < 1)
    order = sorted(
        (i for i, left in room.items() if left >= 1), key=lambda i: (room[i], len(prompts[i].tokens)), reverse=True
    )
    while order:  # a batch shares its limit: prompts near the window's end have limits of their own
        limit = room[order[0]]
        batch = [i for i in order[:batch_size] if room[i] == limit]
        order = order[len(batch) :]
        rows = _generate(inner, tokenizer, [prompts[i].tokens for i in batch], limit, ends, stops)
        yield from ((i, _read(tokenizer, row, limit, ends, stops)) for i, row in zip(batch, rows, strict=True))


@torch.no_grad()
def _generate(
    model: Any,
    tokenizer: Tokenizer,
    prompts: list[tuple[int, ...]],
    limit: int,
    ends: Sequence[int],
    stops: Sequence[str],
) -> list[list[int]]:
    """Returns the new tokens of each prompt, padded after their end."""
    from transformers import GenerationConfig

    pad = pad_token(tokenizer)
    width = max(map(len, prompts))
    ids_bt = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask_bt = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = next(model.parameters()).device
    plain = GenerationConfig(
        do_sample=False, max_new_tokens=limit, eos_token_id=list(ends) or None, pad_token_id=pad, use_cache=True
    )
    with _ready(model, plain):
        out_bt = model.generate(
            input_ids=ids_bt.to(device),
            attention_mask=mask_bt.to(device),
            stopping_criteria=[_stopper(tokenizer, width, stops)] if stops else None,
        )
    return [[int(token) for token in row[width:]] for row in out_bt.cpu()]


def _stopper(tokenizer: Tokenizer, width: int, stops: Sequence[str]) -> Any:
    """Ends rows whose last tokens contain a stop text. That of transformers needs a table of the whole vocabulary."""

    def done(ids_bt: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tails = tokenizer.batch_decode(ids_bt[:, width:][:, -STOP_TOKENS:], skip_special_tokens=True)
        return torch.tensor([any(stop in tail for stop in stops) for tail in tails], device=ids_bt.device)

    return done


def _read(tokenizer: Tokenizer, row: list[int], limit: int, ends: Sequence[int], stops: Sequence[str]) -> Written:
    """Decodes a row of new tokens, cut before its first end token and its first stop text."""
    own = next((at for at, token in enumerate(row) if token in ends), len(row))
    text = tokenizer.decode(row[:own], skip_special_tokens=True)
    cuts = [at for stop in stops if (at := text.find(stop)) >= 0]
    ended = own < len(row) or bool(cuts)
    return Written(text=text[: min(cuts)] if cuts else text, tokens=min(own + (own < len(row)), limit), ended=ended)


def _window(model: Any) -> int | None:
    """Returns the maximal number of tokens that the model's configuration states, if any."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found and found > 0 else None


@contextmanager
def _ready(model: Any, plain: Any) -> Iterator[None]:
    """Sets evaluation mode and a plain generation config inside a `with` block.

    A checkpoint's own config may sample, penalise repetition or ban tokens. Blocks that recompute activations are in
    training mode (see models/activations.py), in which transformers drops their cache.
    """
    before, modes = model.generation_config, [(module, module.training) for module in model.modules()]
    model.eval()
    model.generation_config = plain
    try:
        yield
    finally:
        model.generation_config = before
        for module, mode in modes:
            module.training = mode
