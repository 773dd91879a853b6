"""Next-token tasks with the real stories260K tokenizer: what is read, what is a target, what is held out."""

import pytest
import torch

from fedsb.data.sources import load_table
from fedsb.data.tasks import causal, open_task
from fedsb.data.tasks.base import TaskOptions
from fedsb.data.tasks.instruction import ALPACA, prompt_text
from fedsb.utils.errors import UserError


def task_of(kind, tokenizer, max_tokens, **columns):
    return open_task(kind, tokenizer=tokenizer, options=TaskOptions(**columns), max_tokens=max_tokens)


def targets(example):
    return [label for label in example["labels"] if label != -100]


def batch_of(labels):
    """What `collate` adds to labels (b, t)."""
    chosen = labels != -100
    chosen[:, 0] = False
    return {"labels": labels, "targets": chosen.flatten().nonzero()[:, 0]}


def test_collate_names_the_targets_and_needs_no_mask(stories):
    task = task_of("text", stories, 8)
    rows = [{"input_ids": [1, 5, 6], "labels": [-100, -100, 6]}, {"input_ids": [7, 8], "labels": [7, 8]}]
    batch = task.collate(rows, multiple_of=1)
    assert batch.keys() == {"input_ids", "labels", "targets"}
    assert batch["targets"].tolist() == [2, 4]  # nothing comes before a text's first token


def test_losses_equal_a_plain_loop(stories):
    task = task_of("text", stories, 8)
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7, requires_grad=True)
    labels = torch.tensor([[-100, 3, -100, 6, 0], [-100, -100, 2, -100, -100]])
    loss_b, weight_b = task.losses(logits, batch_of(labels))
    plain = torch.zeros(2)
    for b in range(2):
        for t in range(1, 5):
            if labels[b, t] != -100:
                plain[b] -= logits[b, t - 1].log_softmax(0)[labels[b, t]].detach()
    torch.testing.assert_close(loss_b, plain)
    assert weight_b.tolist() == [3, 1]
    assert [task.weight({"labels": row}) for row in labels.tolist()] == [3, 1]
    (only_first,) = torch.autograd.grad(loss_b[0], logits)
    assert only_first[1].abs().sum() == 0  # an example's loss touches its own logits
    assert task.scores(logits, batch_of(labels))[0].tolist() == loss_b.tolist()
    none_b, zero_b = task.losses(logits, batch_of(torch.full((2, 5), -100)))
    assert (none_b.tolist(), zero_b.tolist()) == ([0, 0], [0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_at_every_token_equal_those_at_the_targets(minilm, dtype, monkeypatch):
    task = task_of("text", minilm, 12)  # whose tokenizer is not asked
    torch.manual_seed(0)
    logits = torch.randn(3, 12, 7, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 7, (3, 12))
    labels[1, 10:] = labels[2, 3] = -100
    found = []
    for most in (0.8, 1.0):
        monkeypatch.setattr(causal, "MOST", most)
        loss_b, weight_b = task.losses(logits, batch_of(labels))
        (gradient,) = torch.autograd.grad((loss_b * torch.tensor([1.0, 0.5, 0.3])).sum(), logits)
        found.append((loss_b, weight_b, gradient))
    (loss_b, weight_b, gradient), (fewer_b, counts_b, other) = found
    torch.testing.assert_close(loss_b, fewer_b)
    assert weight_b.tolist() == counts_b.tolist() == [11, 9, 10]
    assert torch.equal(gradient, other)


def test_uniform_logits_cost_log_v_a_token(stories):
    sums, counts = task_of("text", stories, 8).losses(torch.zeros(1, 4, 512), batch_of(torch.ones(1, 4).long()))
    torch.testing.assert_close(sums / counts, torch.tensor([512.0]).log())


def test_windows_follow_each_other_and_open_with_the_begin_token(stories):
    task = task_of("text", stories, 8)
    text = "Once upon a time, there was a little girl named Lily.\nShe loved to play."
    examples, n_cut = task.encode([{"text": text}])
    assert n_cut == 0 and len(examples) > 2
    assert all(example["input_ids"][0] == stories.bos_token_id for example in examples)
    assert all(len(example["input_ids"]) == 8 for example in examples[:-1])
    assert stories.decode([token for example in examples for token in example["input_ids"][1:]]) == text
    assert all(example["labels"] == [-100, *example["input_ids"][1:]] for example in examples)
    assert [task.weight(example) for example in examples[:-1]] == [7] * (len(examples) - 1)
    assert task.baseline(examples, examples) is None and task.label_names == []


@pytest.mark.parametrize(
    ("text", "head", "tail"),
    [
        ("a" * 79 + "\n" + "b" * 20, "a" * 79 + "\n", "b" * 20),
        ("a" * 75 + "\n" + "b" * 24, "a" * 75 + "\n", "b" * 24),  # a line's end within a tenth of the text
        ("a\n" + "b" * 70 + " " + "c" * 27, "a\n" + "b" * 70 + " ", "c" * 27),  # too far: between words
        ("a" * 50, "a" * 50, None),
        ("", "", None),
        ("a\n", "a\n", None),
    ],
)
def test_the_tail_of_a_text_is_held_out(stories, text, head, tail):
    heads, tails = task_of("text", stories, 8).split_tail([{"text": text, "client": "A"}], 0.2)
    assert heads == [{"text": head, "client": "A"}]
    assert tails == ([] if tail is None else [{"text": tail, "client": "A"}])


def test_shakespeare_is_held_out_by_tails(stories, real_data):
    rows = load_table(str(real_data / "shakespeare_roles" / "by_role.jsonl.gz")).rows[:99]
    task = task_of("text", stories, 64)
    kept, held = task.hold_out(rows, 0.2, None)
    assert len(kept) == len(held) == 99
    assert [a["text"] + b["text"] for a, b in zip(kept, held, strict=True)] == [row["text"] for row in rows]
    assert all(0.1 < len(b["text"]) / len(row["text"]) < 0.3 for b, row in zip(held, rows, strict=True))
    assert task.hold_out(rows, 0.0, None) == (rows, [])


def test_the_loss_is_on_the_answer_and_the_end_token_only(stories):
    task = task_of("instruction", stories, 128)
    (example,), n_cut = task.encode([{"prompt": "Who is Tom?", "answer": "A cat."}])
    ids = example["input_ids"]
    assert stories.decode(ids) == f"<s> {ALPACA.format(prompt='Who is Tom?')} A cat.</s>"
    assert stories.decode(targets(example)) == "A cat.</s>"
    assert ids.count(stories.bos_token_id) == 1 and ids[-1] == stories.eos_token_id
    assert (n_cut, task.weight(example)) == (0, len(targets(example)))
    prompt = stories(prompt_text(stories, "Who is Tom?"), add_special_tokens=False)["input_ids"]
    assert ids[1 : 1 + len(prompt)] == prompt  # what a model generates from is an exact prefix
    assert example["labels"][: 1 + len(prompt)] == [-100] * (1 + len(prompt))


def test_a_long_answer_is_cut_and_a_long_prompt_dropped(stories):
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "b" * 60}, {"prompt": "a" * 99, "answer": "b"}]
    whole = task_of("instruction", stories, 512).encode(rows[:1])[0][0]["input_ids"]
    task = task_of("instruction", stories, len(whole) + 4)
    examples, n_cut = task.encode(rows)
    assert (len(examples), n_cut) == (2, 2)
    assert len(examples[1]["input_ids"]) == task.max_tokens
    assert stories.eos_token_id not in examples[1]["input_ids"]
    with pytest.raises(UserError, match=rf"fills the window of {task.max_tokens} tokens. Raise model.max_seq_length"):
        task.encode(rows[2:])


CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_a_chat_template_is_used_where_there_is_one(stories, monkeypatch):
    monkeypatch.setattr(stories, "chat_template", CHAT)
    (example,), _ = task_of("instruction", stories, 128).encode([{"prompt": "Who is Tom?", "answer": "A cat."}])
    read = example["input_ids"][: -len(targets(example))]
    assert stories.decode(read) == "<s> [user] Who is Tom?\n[assistant] "
    assert stories.decode(targets(example)) == "A cat.</s>"
    assert example["input_ids"].count(stories.bos_token_id) == 1


def test_a_chat_template_that_rewrites_its_prompt_is_refused(stories, monkeypatch):
    monkeypatch.setattr(stories, "chat_template", CHAT.replace("[assistant] {% endif", "[assistant] <think>{% endif"))
    with pytest.raises(UserError, match="which does not follow the prompt"):
        task_of("instruction", stories, 128).encode([{"prompt": "a", "answer": "b"}])


def test_gsm8k(stories, real_data):
    rows = load_table(str(real_data / "gsm8k" / "train.jsonl.gz")).rows[:50]
    examples, n_cut = task_of("instruction", stories, 512, prompt="question").encode(rows)
    whole = [e for e in examples if len(e["input_ids"]) < 512]
    answers = {row["answer"] + "</s>" for row in rows}
    assert len(whole) > 30 and n_cut == 50 - len(whole)
    assert all(stories.decode(targets(example)) in answers for example in whole)
