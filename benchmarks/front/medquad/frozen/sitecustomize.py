"""Keeps the states of each row below the adapted blocks of SmolLM2, which no run changes, for the runs of a process.

    FROZEN_BLOCKS=20 PYTHONPATH=benchmarks/front/medquad/frozen fedsb compare ...

Python imports this module at its start. It takes two fifths of the time of a run that adapts the last ten of thirty
blocks. A row's states are computed once, in the first batch that contains it, so a run equals one without this module
only up to the rounding of another batch. Without FROZEN_BLOCKS nothing is changed, nor where a forward has a cache of
keys (generation) or embeddings of its own.

Legend: b rows, t tokens, d width of the model.
"""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

MODULE = "transformers.models.llama.modeling_llama"
FROZEN = int(os.environ.get("FROZEN_BLOCKS", "0"))


def keep_states(llama: ModuleType) -> None:
    """Replaces the forward of the model and of its blocks."""
    import torch

    model_forward, block_forward = llama.LlamaModel.forward, llama.LlamaDecoderLayer.forward
    states: dict[tuple[int, ...], torch.Tensor] = {}  # a row's tokens -> (t, d)
    skipped = False

    def block(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if skipped and self.self_attn.layer_idx < FROZEN:
            return hidden_states
        return block_forward(self, hidden_states, *args, **kwargs)

    def below(self: Any, input_ids: torch.Tensor) -> torch.Tensor:  # (b, t) -> (b, t, d)
        """Computes the states before the first adapted block."""
        layers, norm = self.layers, self.norm
        self.layers, self.norm = layers[:FROZEN], torch.nn.Identity()
        count, self.config.num_hidden_layers = self.config.num_hidden_layers, FROZEN
        try:
            found: torch.Tensor = model_forward(self, input_ids=input_ids, use_cache=False).last_hidden_state
        finally:
            self.layers, self.norm, self.config.num_hidden_layers = layers, norm, count
        return found

    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        nonlocal skipped
        own = kwargs.pop("inputs_embeds", None)
        if own is not None or kwargs.get("past_key_values") is not None or not _right_padded(attention_mask):
            return model_forward(self, input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=own, **kwargs)
        rows = [_trimmed(tuple(row), self.config.pad_token_id) for row in input_ids.tolist()]
        new = [i for i, row in enumerate(rows) if row not in states]
        with torch.no_grad():
            if new:  # causal: what a row's tokens see does not depend on the padding behind them
                for i, found in zip(new, below(self, input_ids[new]), strict=True):
                    states[rows[i]] = found[: len(rows[i])].clone()
            some = states[rows[0]]
            embedded = some.new_zeros(*input_ids.shape, some.shape[-1])
            for i, row in enumerate(rows):
                embedded[i, : len(row)] = states[row]
        skipped = True
        try:
            kwargs["use_cache"] = False
            return model_forward(self, inputs_embeds=embedded, attention_mask=attention_mask, **kwargs)
        finally:
            skipped = False

    llama.LlamaModel.forward, llama.LlamaDecoderLayer.forward = forward, block


def _right_padded(mask: Any) -> bool:
    """Returns whether no padding comes before a row's tokens."""
    return mask is None or bool((mask[:, :1] == 1).all())


def _trimmed(tokens: tuple[int, ...], padding: int | None) -> tuple[int, ...]:
    """Returns a row with one token of its padding at most, which may be the end of its text."""
    end = len(tokens)
    while end > 1 and tokens[end - 1] == tokens[end - 2] == padding:
        end -= 1
    return tokens[:end]


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def and_patch(module: ModuleType) -> None:
            run(module)
            keep_states(module)

        spec.loader.exec_module = and_patch  # type: ignore[method-assign]
        return spec


if FROZEN:
    sys.meta_path.insert(0, _Finder())
