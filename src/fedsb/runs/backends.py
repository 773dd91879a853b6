"""Optional packages that evaluate an adapter: vLLM generates answers, lm-eval runs its own tasks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedsb.adapters.serving import LORA_RANKS, max_lora_rank
from fedsb.training.generation import Prompt, Written
from fedsb.utils.errors import UserError

CHUNK = 1024  # prompts between two stores of the answers


def write_with_vllm(
    base: str,
    revision: str | None,
    dtype: str,
    adapter: Path,
    prompts: Sequence[Prompt],
    *,
    ends: Sequence[int],
    stops: Sequence[str],
) -> Iterator[tuple[int, Written]]:
    """Generates answers as `generation.write_answers`, with vLLM and the LoRA adapter.

    Raises UserError if vLLM is not installed, and if it does not support the adapter's rank.
    """
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise UserError(
            "--backend vllm needs the package vllm. Install it on a machine with a GPU: pip install vllm"
        ) from error
    rank = int(json.loads((adapter / "adapter_config.json").read_text())["r"])
    room = max_lora_rank(rank)
    if room is None:
        raise UserError(
            f"vLLM supports LoRA up to rank {LORA_RANKS[-1]}, but this adapter has rank {rank}. Leave --backend out."
        )
    model = LLM(model=base, revision=revision, dtype=dtype, enable_lora=True, max_lora_rank=room)
    window = model.llm_engine.model_config.max_model_len
    lora = LoRARequest("fedsb", 1, str(adapter))
    fits = [i for i, prompt in enumerate(prompts) if len(prompt.tokens) < window]
    yield from ((i, Written(text="", tokens=0, ended=False)) for i in sorted(set(range(len(prompts))) - set(fits)))
    for start in range(0, len(fits), CHUNK):
        chunk = fits[start : start + CHUNK]
        how = [
            SamplingParams(
                temperature=0.0, max_tokens=prompts[i].new_tokens, stop=list(stops), stop_token_ids=list(ends)
            )
            for i in chunk
        ]
        outputs = model.generate([{"prompt_token_ids": list(prompts[i].tokens)} for i in chunk], how, lora_request=lora)
        for i, output in zip(chunk, outputs, strict=True):
            made = output.outputs[0]
            yield i, Written(text=made.text, tokens=len(made.token_ids), ended=made.finish_reason == "stop")


def run_lm_eval(model: Any, tokenizer: Any, tasks: str, batch_size: int) -> dict[str, Any]:
    """Returns the results of lm-eval's `tasks` ("gsm8k,piqa"). Raises UserError without lm-eval or for unknown ones."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("--lm-eval needs the package lm-eval. Install it: pip install 'lm-eval[hf]'") from error
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    manager = TaskManager()
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown or not names:
        raise UserError(f"--lm-eval {tasks!r}: lm-eval has no task {', '.join(unknown)!r}. See `lm-eval ls tasks`.")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(model=wrapped, tasks=names, task_manager=manager)
    return {name: dict(values) for name, values in found["results"].items()}
