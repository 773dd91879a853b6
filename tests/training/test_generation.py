"""Answers that a model writes do not depend on the batch, on the order, or on the adapter's wrapper."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fedsb.adapters.adapted import AdaptedModel
from fedsb.config.inputs import ModelConfig
from fedsb.models.layers import find_targets
from fedsb.models.load import load_base
from fedsb.training.generation import Prompt, Written, write_answers

STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"
TEXTS = [
    "Once upon a time",
    "Lily",
    "One day, a big dog and a little cat went to the park to play with a ball",
    "The end. Tom was",
    "She saw a",
    "He",
    "They all had fun and",
]


@pytest.fixture(scope="module")
def stories():
    if not STORIES.is_dir():
        pytest.skip("stories260K is not beside the repository, in ../shared/models")
    return AutoModelForCausalLM.from_pretrained(STORIES).eval(), AutoTokenizer.from_pretrained(STORIES)


def prompts_of(tokenizer, new_tokens=24):
    made = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    return [Prompt(tokens=(tokenizer.bos_token_id, *tokens), new_tokens=new_tokens) for tokens in made]


def write(model, tokenizer, prompts, batch_size=64, ends=(2,), stops=()):
    made = list(write_answers(model, tokenizer, prompts, ends=ends, stops=stops, batch_size=batch_size))
    found = dict(made)
    assert len(found) == len(made)  # each once
    return [found[i] for i in range(len(prompts))]


@torch.no_grad()
def naive(model, tokenizer, prompt, ends=(2,)):
    """One prompt, one token at a time, the whole text anew each time."""
    tokens = list(prompt.tokens)
    made = []
    while len(made) < prompt.new_tokens:
        made.append(int(model(torch.tensor([tokens + made])).logits[0, -1].argmax()))
        if made[-1] in ends:
            return Written(text=tokenizer.decode(made[:-1], skip_special_tokens=True), tokens=len(made), ended=True)
    return Written(text=tokenizer.decode(made, skip_special_tokens=True), tokens=len(made), ended=False)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_a_batch_equals_a_plain_loop(stories, batch_size):
    model, tokenizer = stories
    prompts = prompts_of(tokenizer)
    prompts[2] = replace(prompts[2], new_tokens=9)
    wanted = [naive(model, tokenizer, prompt) for prompt in prompts]
    assert write(model, tokenizer, prompts, batch_size) == wanted
    assert write(model, tokenizer, prompts[::-1], batch_size) == wanted[::-1]
    assert len({written.text for written in wanted}) == len(TEXTS)


def test_end_tokens_and_stop_texts(stories):
    model, tokenizer = stories
    prompts = prompts_of(tokenizer)
    prompts = [replace(prompt, new_tokens=6 + 3 * i) for i, prompt in enumerate(prompts)]
    end = tokenizer(".", add_special_tokens=False)["input_ids"][-1]
    wanted = [naive(model, tokenizer, prompt, ends=(end,)) for prompt in prompts]
    assert any(written.ended for written in wanted) and not all(written.ended for written in wanted)
    assert write(model, tokenizer, prompts, ends=(end,)) == wanted
    prompts = prompts_of(tokenizer)
    whole = write(model, tokenizer, prompts)
    stopped = write(model, tokenizer, prompts, stops=["was", " big"])
    for all_of_it, part in zip(whole, stopped, strict=True):
        places = [at for stop in ("was", " big") if (at := all_of_it.text.find(stop)) >= 0]
        assert part.text == all_of_it.text[: min(places, default=None)]
        assert part.ended == bool(places)
    assert any(part.ended for part in stopped) and not all(part.ended for part in stopped)


def test_nothing_is_written_behind_an_end_nor_read_twice(stories):
    """A forward a token, of that token alone, no more than the answer has; and long prompts come first."""
    model, tokenizer = stories
    prompts = prompts_of(tokenizer)
    whole = write(model, tokenizer, prompts[:1])[0]
    end = int(tokenizer(whole.text, add_special_tokens=False)["input_ids"][6])
    wanted = naive(model, tokenizer, prompts[0], ends=(end,))
    assert wanted.ended and wanted.tokens < 24
    widths = []
    hook = model.register_forward_pre_hook(
        lambda _, __, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    assert write(model, tokenizer, prompts[:1], ends=(end,)) == [wanted]
    assert widths == [len(prompts[0].tokens)] + [1] * (wanted.tokens - 1)
    widths.clear()
    word = whole.text.split()[2]
    assert write(model, tokenizer, prompts[:1], stops=[word])[0].ended and len(widths) < 24
    hook.remove()
    order = [i for i, _ in write_answers(model, tokenizer, prompts, ends=(2,), batch_size=1)]
    assert order == sorted(order, key=lambda i: len(prompts[i].tokens), reverse=True) and order[0] == 2


def test_a_prompt_that_fills_the_window_is_cut_and_not_dropped(stories):
    model, tokenizer = stories
    window = model.config.max_position_embeddings
    near, one, over = (Prompt(tokens=(1,) * (window - left), new_tokens=24) for left in (3, 1, 0))
    first, last, second, third = write(model, tokenizer, [near, one, over, prompts_of(tokenizer)[0]])
    assert (first.tokens, first.ended, last.tokens, last.ended) == (3, False, 1, False)
    assert second == Written(text="", tokens=0, ended=False)
    assert third.tokens == 24


def test_a_checkpoints_own_way_of_writing_is_put_aside(stories):
    """Sampling, a penalty on repetition, a smallest length: greedy is greedy."""
    model, tokenizer = stories
    prompts = prompts_of(tokenizer)
    wanted, before = write(model, tokenizer, prompts), model.generation_config
    own = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=2, eos_token_id=2
    )
    model.generation_config = own
    try:
        assert write(model, tokenizer, prompts) == wanted
        assert model.generation_config is own
    finally:
        model.generation_config = before


def test_blocks_that_recompute_activations_keep_their_cache(stories):
    """They stand in training mode, in which transformers drops the cache: the model would see one token at a time."""
    model, tokenizer = stories
    base = load_base(
        ModelConfig(name=str(STORIES), device="cpu", activation_checkpointing=True),
        auto_class="AutoModelForCausalLM",
        num_labels=0,
        pad_token=None,
    )
    modes = [module.training for module in base.model.modules()]
    assert any(modes)
    prompts = prompts_of(tokenizer)
    assert write(base.model, tokenizer, prompts) == write(model, tokenizer, prompts)
    assert [module.training for module in base.model.modules()] == modes


def test_with_an_adapter_inside_and_by_peft(stories, tmp_path):
    """The core adapter in fedsb's layer and the same as PEFT's LoRA write the same, and not what the base writes."""
    from peft import LoraConfig, get_peft_model

    tokenizer = stories[1]
    prompts = prompts_of(tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    targets = find_targets(plain)
    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(STORIES).eval(),
        LoraConfig(r=4, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM"),
    ).eval()
    draw = torch.Generator().manual_seed(0)
    adapted = AdaptedModel(plain, kind="core", targets=targets)
    tensors = {}
    for name, (m, n) in adapted.shapes.items():
        A, B = torch.randn(4, n, generator=draw) * 0.2, torch.randn(m, 4, generator=draw) * 0.2
        R = torch.randn(1, 1, 4, 4, generator=draw)
        tensors |= {f"{name}.A": A, f"{name}.B": B, f"{name}.R": R}
        layer = lora.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data.copy_(A)
        layer.lora_B["default"].weight.data.copy_(B @ R[0, 0])
    adapted.load(tensors)
    written = write(adapted.model, tokenizer, prompts, 3)
    assert written == [naive(adapted.model, tokenizer, prompt) for prompt in prompts]
    assert written == write(lora, tokenizer, prompts, 2)
    assert written != write(stories[0], tokenizer, prompts)


def test_positions_are_counted_from_the_text(tiny_gpt2):
    """GPT-2's positions are absolute: padding on the left must not move them."""
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    prompts = [Prompt(tokens=tuple(range(3, 3 + length)), new_tokens=12) for length in (2, 17, 5, 30)]
    assert write(model, tokenizer, prompts) == [naive(model, tokenizer, prompt) for prompt in prompts]
