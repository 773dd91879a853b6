"""What every task shares: opening, padding, holding out."""

from types import MappingProxyType

import numpy as np
import pytest

from fedsb.data.tasks import TASKS, open_task
from fedsb.data.tasks.base import TaskOptions
from fedsb.data.tasks.tokens import pad_token
from fedsb.utils.errors import UserError


class Plain:
    """A tokenizer with no special tokens: a token is a character's code."""

    pad_token_id = eos_token_id = bos_token_id = chat_template = eos_token = None
    added_tokens_decoder = MappingProxyType({})

    def __call__(self, texts, add_special_tokens, verbose, split_special_tokens):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    def tokenize(self, text):
        return list(text)


def plain(kind="text", max_tokens=4, **columns):
    return open_task(kind, tokenizer=Plain(), options=TaskOptions(**columns), max_tokens=max_tokens)


def test_opening_a_task():
    with pytest.raises(UserError, match=r"'clasification' is not known: did you mean 'classification'"):
        open_task("clasification", tokenizer=Plain(), options=TaskOptions(), max_tokens=8)
    with pytest.raises(UserError, match="max_seq_length = 1 is too small"):
        plain(max_tokens=1)
    assert plain("classification", text_pair="other").needs == ["text", "other", "label"]
    assert plain("instruction", prompt="question").needs == ["question", "answer"]
    assert plain("text", text="line").needs == ["line"]
    assert {kind: (task.metric, task.auto_class, task.peft_task_type) for kind, task in TASKS.items()} == {
        "classification": ("accuracy", "AutoModelForSequenceClassification", "SEQ_CLS"),
        "regression": ("pearson", "AutoModelForSequenceClassification", "SEQ_CLS"),
        "text": ("nats_per_token", "AutoModelForCausalLM", "CAUSAL_LM"),
        "chat": ("nats_per_token", "AutoModelForCausalLM", "CAUSAL_LM"),
        "code": ("pass@1", "AutoModelForCausalLM", "CAUSAL_LM"),
        "instruction": ("nats_per_token", "AutoModelForCausalLM", "CAUSAL_LM"),
        "arithmetic": ("accuracy", "AutoModelForCausalLM", "CAUSAL_LM"),
        "commonsense": ("accuracy", "AutoModelForCausalLM", "CAUSAL_LM"),
    }


def test_padding_is_on_the_right_and_within_max_tokens():
    examples = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [-100]}]
    batch = plain().collate(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [-100, -100, -100, -100]]
    assert plain(max_tokens=100).collate(examples)["input_ids"].shape == (2, 8)
    assert plain(max_tokens=100).collate(examples, multiple_of=1)["input_ids"].shape == (2, 3)
    assert examples[0].keys() == {"input_ids", "labels"}


def test_the_pad_token_is_the_tokenizers_else_its_end_token_else_zero(minilm, stories):
    assert (pad_token(minilm), pad_token(stories), pad_token(Plain())) == (0, stories.eos_token_id, 0)
    assert stories.pad_token_id is None and stories.eos_token_id == 2


def test_holding_out_rows():
    rows = [{"text": str(i)} for i in range(10)]
    task = plain("classification")
    kept, held = task.hold_out(rows, 0.25, np.random.default_rng(0))
    assert len(held) == 2 and sorted(kept + held, key=lambda row: row["text"]) == rows
    assert kept == [row for row in rows if row in kept]  # in their order
    assert task.hold_out(rows, 0.25, np.random.default_rng(0)) == (kept, held)
    assert task.hold_out(rows, 0.0, np.random.default_rng(0)) == (rows, [])
    assert task.hold_out(rows[:1], 0.9, np.random.default_rng(0)) == (rows[:1], [])
    assert task.hold_out([], 0.5, np.random.default_rng(0)) == ([], [])
    with pytest.raises(UserError, match=r"held-out share of 1\.0"):
        task.hold_out(rows, 1.0, np.random.default_rng(0))


@pytest.mark.parametrize("value", [None, 3])
def test_a_text_that_is_none_names_its_row(value):
    with pytest.raises(UserError, match=rf"row 2: the column 'text' contains {value}, where text is expected"):
        plain().encode([{"text": "a b"}, {"text": value}])


def test_text_without_special_tokens():
    examples, n_cut = plain().encode(
        [{"text": "abcdefghi"}, {"text": ""}, {"text": "xy"}]
    )  # a lone last "i" is dropped
    assert [[chr(i) for i in e["input_ids"]] for e in examples] == [list("abcd"), list("efgh"), list("xy")]
    assert examples[0]["labels"] == [-100, ord("b"), ord("c"), ord("d")]
    assert n_cut == 0


def test_an_answer_needs_an_end_token():
    with pytest.raises(UserError, match="The tokenizer has no end token"):
        plain("instruction").encode([{"prompt": "p", "answer": "a"}])
