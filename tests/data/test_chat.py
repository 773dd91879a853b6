"""Conversations: what is a target, turn by turn, decoded from the mask; templates that cannot be trained on."""

import pytest

from fedsb.data.tasks import open_task
from fedsb.data.tasks.base import TaskOptions
from fedsb.utils.errors import UserError

TURNS = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Once upon?"},
    {"role": "assistant", "content": "A time."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "The end."},
    {"role": "user", "content": "Thank you."},
]


@pytest.fixture
def chatty(stories, monkeypatch):
    """A real tokenizer with a template of its own."""

    def give(template=TURNS):
        monkeypatch.setattr(stories, "chat_template", template)
        return stories

    return give


def task_of(tokenizer, max_tokens=512, **options):
    return open_task("chat", tokenizer=tokenizer, options=TaskOptions(**options), max_tokens=max_tokens)


def spans(tokenizer, example):
    """(whether it is a target, its text) of each stretch of a row."""
    stretches = []
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        told = label != -100
        assert label in (-100, token)
        if not stretches or stretches[-1][0] != told:
            stretches.append((told, []))
        stretches[-1][1].append(token)
    return [(told, tokenizer.decode(tokens)) for told, tokens in stretches]


def test_the_assistants_turns_are_targets_each_with_its_end_token(chatty):
    tokenizer = chatty()
    task = task_of(tokenizer)
    (example,), n_cut = task.encode([{"messages": TALK}])
    assert spans(tokenizer, example) == [
        (False, "[system] Be kind.\n[user] Once upon?\n[assistant] "),
        (True, "A time.</s>"),
        (False, "\n[user] And then?\n[assistant] "),
        (True, "The end.</s>"),
    ]  # nothing is behind the last of them: no one learns from it
    assert n_cut == 0 and task.weight(example) == sum(label != -100 for label in example["labels"])
    assert (task.metric, task.needs) == ("nats_per_token", ["messages"])


def test_one_turn_is_what_an_instruction_is(chatty):
    tokenizer = chatty()
    row = {"prompt": "Once upon?", "answer": "A time.", "messages": TALK[1:3]}
    instruction = open_task("instruction", tokenizer=tokenizer, options=TaskOptions(), max_tokens=512)
    assert task_of(tokenizer).encode([row]) == instruction.encode([row])


def test_a_row_is_cut_and_one_without_a_target_is_dropped(chatty):
    tokenizer = chatty()
    whole = task_of(tokenizer).encode([{"messages": TALK}])[0][0]
    first = next(i for i, label in enumerate(whole["labels"]) if label != -100)
    long = [{"role": "user", "content": "Once upon? " * 30}, *TALK[2:3]]
    examples, n_cut = task_of(tokenizer, max_tokens=first + 2).encode([{"messages": TALK}, {"messages": long}])
    assert len(examples) == 1 and n_cut == 2
    assert examples[0]["input_ids"] == whole["input_ids"][: first + 2]
    with pytest.raises(UserError, match=r"No assistant's turn begins within 4 tokens. Raise model.max_seq_length."):
        task_of(tokenizer, max_tokens=4).encode([{"messages": long}])


def test_a_row_that_fills_the_window_is_whole(chatty):
    tokenizer = chatty()
    (whole,), _ = task_of(tokenizer).encode([{"messages": TALK}])
    length = len(whole["input_ids"])
    assert task_of(tokenizer, max_tokens=length).encode([{"messages": TALK}]) == ([whole], 0)
    assert task_of(tokenizer, max_tokens=length - 1).encode([{"messages": TALK}])[1] == 1
    assert task_of(tokenizer).encode([]) == ([], 0)


def test_no_template(chatty):
    task_of(None)  # prices are told without a tokenizer
    with pytest.raises(UserError, match="needs a tokenizer with a chat template, and this one has none"):
        task_of(chatty(None))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        # as some do, the words before the last turn are written otherwise: a thought is left out
        (
            TURNS.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else 'so' }}"),
            "turn 4 so that it does not follow the turns before it",
        ),
        (TURNS.replace("[assistant] {% endif %}", "[bot] {% endif %}"), "turn 2 so that it does not follow its own"),
        (
            TURNS.replace("{% if m.role ==", "{% if loop.last and m.role =="),
            "turn 4 so that it does not follow the turns before it",
        ),  # an end token for the last answer alone
    ],
)
def test_a_template_that_writes_turns_otherwise_later(chatty, template, said):
    task = task_of(chatty(template))
    with pytest.raises(UserError, match=said):
        task.encode([{"messages": TALK[1:]}])


def test_a_template_that_refuses(chatty):
    task = task_of(chatty("{{ raise_exception('no system role') }}"))
    with pytest.raises(UserError, match="refuses a conversation with the roles user: no system role"):
        task.encode([{"messages": TALK[1:]}])


@pytest.mark.parametrize(
    "messages", ["hello", [], None, 5, [{"role": "user"}], [{"role": "assistant", "content": None}], ["hello"]]
)
def test_what_messages_must_be(chatty, messages):
    with pytest.raises(UserError, match=r"row 2: the column 'messages' contains .* a list of messages is expected"):
        task_of(chatty()).encode([{"messages": TALK}, {"messages": messages}])


def test_a_row_without_the_assistant(chatty):
    with pytest.raises(UserError, match=r"row 1 has no turn of the role 'assistant', .* Its roles are: user"):
        task_of(chatty()).encode([{"messages": TALK[1:2]}])
