"""What a row's text may be: special tokens in it are text; inputs, tools, system texts and weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsb.data.tasks import open_task
from fedsb.data.tasks.base import NO_LOSS, TaskOptions
from fedsb.utils.errors import UserError

TURNS = (
    "{% if tools %}<s>tools {{ tools | tojson }}</s>{% endif %}"
    "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
PLAIN = TURNS.replace("{% if tools %}<s>tools {{ tools | tojson }}</s>{% endif %}", "")
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


@pytest.fixture
def chatty(stories: Any) -> Any:
    """The real tokenizer with a chat template of its own special tokens."""
    from copy import deepcopy

    tokenizer = deepcopy(stories)
    tokenizer.chat_template = TURNS
    return tokenizer


def task_of(kind: str, tokenizer: Any, **options: Any) -> Any:
    return open_task(kind, tokenizer=tokenizer, options=TaskOptions(**options), max_tokens=512)


def ids_of(task: Any, row: dict[str, Any]) -> list[int]:
    return list(task.encode([row])[0][0]["input_ids"])


def targets_of(task: Any, row: dict[str, Any]) -> str:
    labels = task.encode([row])[0][0]["labels"]
    text = str(task.tokenizer.decode([token for token in labels if token != NO_LOSS]))
    return text.replace("</s> ", "</s>").strip()


# --- special tokens in a row's text ---


def test_a_separator_in_a_classified_text_is_text(minilm: Any) -> None:
    task = task_of("classification", minilm, text_pair="other")
    task.label_names = ["a", "b"]
    ids = ids_of(task, {"text": "one [SEP] two [MASK]", "other": "[CLS]", "label": "a"})
    special = [minilm.cls_token_id, minilm.sep_token_id, minilm.mask_token_id]
    assert [token for token in ids if token in special] == [
        minilm.cls_token_id,
        minilm.sep_token_id,
        minilm.sep_token_id,
    ]
    plain = ids_of(task, {"text": "one two", "other": "three", "label": "a"})
    assert plain == minilm("one two", "three")["input_ids"]


def test_an_end_token_in_a_text_of_an_encoder_decoder(tmp_path: Path) -> None:
    """BART's classifier reads the last end token of each row, and refuses rows with different numbers of them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BartConfig, BartForSequenceClassification, PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", "one", "two"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    task = task_of("classification", tokenizer)
    task.label_names = ["a", "b"]
    rows = [{"text": "one </s> two", "label": "a"}, {"text": "two", "label": "b"}]
    batch = task.collate(task.encode(rows)[0])
    assert (batch["input_ids"] == 2).sum(dim=1).tolist() == [1, 1]
    model = BartForSequenceClassification(
        BartConfig(vocab_size=6, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
                   decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, num_labels=2,
                   pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2)
    )  # fmt: skip
    labels = batch.pop("labels")
    assert torch.isfinite(model(**batch).logits).all() and labels.tolist() == [0, 1]


def test_an_end_token_in_plain_text(stories: Any) -> None:
    task = task_of("text", stories)
    ids = ids_of(task, {"text": "once</s> upon <s> a time"})
    assert ids.count(stories.eos_token_id) == 0 and ids.count(stories.bos_token_id) == 1
    assert stories.decode(ids, skip_special_tokens=True).strip() == "once</s> upon <s> a time"


@pytest.mark.parametrize("templated", [False, True])
def test_an_end_token_in_a_prompt_and_an_answer(stories: Any, chatty: Any, templated: bool) -> None:
    tokenizer = chatty if templated else stories
    task = task_of("instruction", tokenizer)
    row = {"prompt": "say </s> and <s>", "answer": "so </s> it is"}
    ids, clean = ids_of(task, row), ids_of(task, {"prompt": "say and", "answer": "so it is"})
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        assert ids.count(token) == clean.count(token)
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == (2 if templated else 1)
    assert targets_of(task, row) == "so </s>it is</s>"


def test_the_templates_own_tokens_stay_special(chatty: Any) -> None:
    task = task_of("chat", chatty)
    talk = [{"role": "user", "content": "end </s> of"}, {"role": "assistant", "content": "yes </s>"}]
    row = {"messages": talk}
    ids = ids_of(task, row)
    assert (ids.count(chatty.bos_token_id), ids.count(chatty.eos_token_id)) == (2, 2)
    assert targets_of(task, row) == "yes </s></s>"
    clean = [{"role": "user", "content": "end of"}, {"role": "assistant", "content": "yes"}]
    whole = chatty.apply_chat_template(clean, tokenize=False)
    assert chatty.decode(ids_of(task, {"messages": clean})).replace(" ", "") == whole.replace(" ", "")


@pytest.mark.parametrize("number", ["999999", "9" * 5000])
def test_a_text_that_looks_like_a_marked_token_is_text(stories: Any, number: str) -> None:
    from fedsb.data.tasks.tokens import MARK

    task = open_task("instruction", tokenizer=stories, options=TaskOptions(), max_tokens=60_000)
    ids = ids_of(task, {"prompt": f"say {MARK}{number}{MARK} and </s>", "answer": "so"})
    assert number in stories.decode(ids) and ids.count(stories.eos_token_id) == 1
    assert MARK in stories.decode(ids_of(task_of("text", stories), {"text": f"once {MARK} upon </s>"}))


def test_they_are_counted_and_said(chatty: Any) -> None:
    from fedsb.data.card import make_card
    from fedsb.data.rows import make_table

    task = task_of("instruction", chatty)
    rows = [{"prompt": "a </s>" if i < 3 else f"b {i}", "answer": "c"} for i in range(10)]
    card = make_card(task, make_table(rows, "rows.jsonl"), None, clients={"one": 10}, lost={"train": (0, 0)})
    assert card.notes() == ["3 rows contain a special token of the tokenizer, which is read as ordinary text."]


# --- Alpaca's input, and what conversations have ---


def test_an_input_goes_into_the_prompt(stories: Any, chatty: Any) -> None:
    row = {"instruction": "Add these.", "input": "1 and 2", "output": "3"}
    task = task_of("instruction", stories, prompt="instruction", answer="output")
    text = stories.decode(ids_of(task, row), skip_special_tokens=True)
    assert "paired with an input that provides further context" in text
    assert "### Instruction:\nAdd these.\n\n### Input:\n1 and 2\n\n### Response: 3" in text
    for empty in ("", None):
        without = stories.decode(ids_of(task, {**row, "input": empty}), skip_special_tokens=True)
        assert "### Input:" not in without and "### Instruction:\nAdd these.\n\n### Response: 3" in without
    templated = task_of("instruction", chatty, prompt="instruction", answer="output")
    assert "<s>user Add these.\n\n1 and 2</s>" in chatty.decode(ids_of(templated, row)).replace("<s> ", "<s>")
    with pytest.raises(UserError, match="row 1: the column 'input' contains 5, where text is expected"):
        task.encode([{**row, "input": 5}])


def test_an_input_that_is_the_prompt_is_read_once(stories: Any) -> None:
    task = task_of("instruction", stories, prompt="input", answer="output")
    text = stories.decode(ids_of(task, {"input": "hello", "output": "bye"}), skip_special_tokens=True)
    assert text.count("hello") == 1 and "### Input:" not in text


TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two", "weight": 0},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four", "weight": 1},
]


def test_a_turn_of_weight_0_is_no_target(chatty: Any) -> None:
    task = task_of("chat", chatty)
    assert targets_of(task, {"messages": TALK}) == "four</s>"
    unweighted = [{**turn, "weight": None} for turn in TALK]
    assert targets_of(task, {"messages": unweighted}) == "two</s>four</s>"
    assert ids_of(task, {"messages": TALK}) == ids_of(task, {"messages": unweighted})
    none = [{**turn, "weight": 0} for turn in TALK]
    examples, _ = task.encode([{"messages": TALK}, {"messages": none}])
    assert len(examples) == 1
    with pytest.raises(UserError, match="Turns of weight 0 do not count"):
        task.encode([{"messages": none}])
    for turn, weight in ((1, 0.5), (1, "0"), (0, 1)):
        talk = [dict(each) for each in TALK]
        talk[turn]["weight"] = weight
        with pytest.raises(UserError, match=f"row 1: turn {turn + 1}, of the role .* has the weight"):
            task.encode([{"messages": talk}])


def test_tools_are_given_to_the_template(chatty: Any) -> None:
    task = task_of("chat", chatty)
    for tools in (TOOLS, json.dumps(TOOLS)):
        text = chatty.decode(ids_of(task, {"messages": TALK, "tools": tools}))
        assert '"name": "look"' in text and text.count('"name": "look"') == 1
    for nothing in (None, [], "", "[]"):
        assert ids_of(task, {"messages": TALK, "tools": nothing}) == ids_of(task, {"messages": TALK})
    with pytest.raises(UserError, match="row 1: the column 'tools' contains 'look', where a list of tools is expected"):
        task.encode([{"messages": TALK, "tools": "look"}])
    chatty.chat_template = PLAIN
    with pytest.raises(UserError, match="the chat template writes the same text with and without them"):
        task.encode([{"messages": TALK, "tools": TOOLS}])


def test_a_call_of_a_tool_may_have_no_content(chatty: Any) -> None:
    chatty.chat_template = TURNS.replace(
        "{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
    )
    calls = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    talk = [TALK[0], {"role": "assistant", "content": None, "tool_calls": calls}]
    assert '"name": "look"' in targets_of(task_of("chat", chatty), {"messages": talk})


def test_a_system_column_is_the_first_turn(chatty: Any) -> None:
    task = task_of("chat", chatty)
    text = chatty.decode(ids_of(task, {"messages": TALK, "system": "be kind"}))
    assert text.replace("<s> ", "<s>").startswith("<s>system be kind</s>")
    for nothing in (None, ""):
        assert ids_of(task, {"messages": TALK, "system": nothing}) == ids_of(task, {"messages": TALK})
    with pytest.raises(UserError, match=r"row 1: the column 'system' .* already begin with a system turn"):
        task.encode([{"messages": [{"role": "system", "content": "a"}, *TALK], "system": "b"}])


def test_a_template_that_refuses_names_the_row(chatty: Any) -> None:
    chatty.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="row 1: the chat template refuses"):
        task_of("chat", chatty).encode([{"messages": TALK}])
