"""Arithmetic and commonsense rows: what is read, what is a target, what is gold."""

import pytest

from fedsb.data.rows import make_table
from fedsb.data.sources import load_table
from fedsb.data.tasks import TASKS, open_task
from fedsb.data.tasks.base import TaskOptions, question_of
from fedsb.data.tasks.instruction import ALPACA
from fedsb.utils.errors import UserError

METAMATH = {
    "type": "GSM_Rephrased",
    "query": "What is 1 + 1?",
    "original_question": "1 + 1?",
    "response": "1 + 1 = 2\n#### 2\nThe answer is: 2",
}
GSM8K = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 1,024"}
MATH = {"problem": "Half of $1$?", "level": "1", "solution": "It is $\\boxed{\\frac{1}{2}}$."}
CHOICE = {
    "instruction": "Which?\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer format: answer1/answer2/answer3",
    "input": "",
    "output": "the correct answer is answer3",
    "answer": "answer3",
}


def task_of(kind, tokenizer, max_tokens=512, **options):
    return open_task(kind, tokenizer=tokenizer, options=TaskOptions(**options), max_tokens=max_tokens)


def seen(task, row):
    """(what is read, what is a target) of a row, decoded from the mask."""
    (example,), _ = task.encode([row])
    cut = next(at for at, label in enumerate(example["labels"]) if label != -100)
    assert example["labels"][cut:] == example["input_ids"][cut:]
    return task.tokenizer.decode(example["input_ids"][:cut]), task.tokenizer.decode(example["input_ids"][cut:])


@pytest.mark.parametrize(
    ("kind", "row", "prompt", "told", "gold", "graded", "limit"),
    [
        ("arithmetic", METAMATH, "What is 1 + 1?", METAMATH["response"], "2", "number", 256),
        ("arithmetic", METAMATH | {"type": "MATH_FOBAR", "response": "The answer is: 2"}, "What is 1 + 1?",
         "The answer is: 2", "2", "math", 512),
        ("arithmetic", METAMATH | {"response": "The answer is: 3:30"}, "What is 1 + 1?",
         "The answer is: 3:30", "3:30", "math", 512),
        ("arithmetic", GSM8K, "How many?",
         "48/2 = 24 clips.\n#### 1,024\nThe answer is: 1,024", "1,024", "number", 256),
        ("arithmetic", MATH, "Half of $1$?",
         "It is $\\boxed{\\frac{1}{2}}$.\nThe answer is: \\frac{1}{2}", "\\frac{1}{2}", "math", 512),
        ("arithmetic", {"prompt": "Q", "answer": "so\nThe answer is: x"}, "Q",
         "so\nThe answer is: x", "x", "math", 512),
        ("commonsense", CHOICE, CHOICE["instruction"], "the correct answer is answer3", "answer3", "choice", 32),
    ],
)  # fmt: skip
def test_a_row(stories, kind, row, prompt, told, gold, graded, limit):
    pytest.importorskip("math_verify")
    task = task_of(kind, stories)
    task.columns_of(make_table([row], "t"))
    read, target = seen(task, row)
    assert read == f"<s> {ALPACA.format(prompt=prompt)}"
    assert target == f"{told}</s>"  # the loss is on the answer and the end token only
    (example,), cut = task.encode_test([row])
    question = question_of(example)
    assert stories.decode(question.prompt_ids) == read  # tests read what training read
    assert (question.gold, question.kind, question.new_tokens, cut) == (gold, graded, limit, 0)
    assert task.grade(question, told).right  # what is learned is graded right
    assert question_of(task_of(kind, stories, new_tokens=7).encode_test([row])[0][0]).new_tokens == 7


def test_columns_and_how_to_map_them(stories):
    task = task_of("arithmetic", stories)
    with pytest.raises(UserError) as said:
        task.columns_of(make_table([{"q": "1 + 1?", "a": "2"}], "my.jsonl"))
    assert str(said.value) == (
        "my.jsonl has the columns q, a. Known are MetaMathQA: query, response; GSM8K: question, answer; MATH: problem, "
        "solution. For a different table, name its columns: --set task.prompt=COLUMN --set task.answer=COLUMN"
    )
    own = task_of("arithmetic", stories, prompt="q", answer="a")
    assert own.columns_of(make_table([{"q": "1 + 1?", "a": "The answer is: 2"}], "my.jsonl")) == ["q", "a"]
    assert own.columns_of(make_table([GSM8K], "gsm")) == ["question", "answer"]  # a test of another shape
    both = {**MATH, "q": "1 + 1?", "a": "The answer is: 2"}
    assert own.columns_of(make_table([both], "both")) == ["q", "a"]  # what was set comes first
    with pytest.raises(UserError, match=r"has the columns text\. Known are LLM-Adapters: instruction, answer"):
        task_of("commonsense", stories).columns_of(make_table([{"text": "a"}], "t"))


def test_rows_that_cannot_be_graded(stories):
    arithmetic, commonsense = task_of("arithmetic", stories), task_of("commonsense", stories)
    with pytest.raises(UserError, match=r"contains 'it is 2', which has no gold answer. Write it after"):
        arithmetic.encode_test([{"prompt": "1 + 1?", "answer": "it is 2"}])
    with pytest.raises(UserError, match="the gold answer '2 or 3' in the column 'answer' is not a single number"):
        arithmetic.encode_test([GSM8K | {"answer": "#### 2 or 3"}])
    with pytest.raises(UserError, match="does not end with its answers, as in 'Answer format: true/false'"):
        commonsense.encode_test([CHOICE | {"instruction": "Which?"}])
    with pytest.raises(UserError, match="does not end with its answers"):
        commonsense.encode_test([CHOICE | {"instruction": "Which? Answer format: yes/no"}])
    with pytest.raises(UserError, match="'answer4' is not one of the question's options, answer1/answer2/answer3"):
        commonsense.encode_test([CHOICE | {"answer": "answer4"}])
    with pytest.raises(UserError, match="the output 'It is answer3' is not 'the correct answer is answer3'"):
        commonsense.columns_of(make_table([CHOICE | {"output": "It is answer3"}], "t"))
    with pytest.raises(ValueError, match="encoded by `encode_test`"):
        question_of(arithmetic.encode([GSM8K])[0][0])


def test_an_input_stands_behind_the_instruction(stories):
    row = CHOICE | {"instruction": "Which?", "input": "Answer format: answer1/answer3"}
    (example,), _ = task_of("commonsense", stories).encode_test([row])
    assert question_of(example).prompt == "Which?\n\nAnswer format: answer1/answer3"
    assert question_of(example).options == ("answer1", "answer3")


def test_no_test_row_is_dropped_and_no_prompt_cut(stories):
    long = GSM8K | {"question": "How many? " * 200}
    task = task_of("arithmetic", stories, max_tokens=128)
    examples, cut = task.encode_test([GSM8K, long])
    assert len(examples) == 2 and cut == 0
    assert len(question_of(examples[1]).prompt_ids) > 1000
    assert all(len(example["input_ids"]) <= 128 for example in examples)  # the window of a forward, as in training
    assert len(task.encode([GSM8K, long])[0]) == 1


def test_a_task_knows_how_it_is_scored(stories):
    assert {kind: task.scorings for kind, task in TASKS.items()} == {
        "classification": ("logits",),
        "regression": ("logits",),
        "text": ("loss",),
        "chat": ("loss",),
        "code": ("answers", "loss"),
        "instruction": ("loss",),
        "arithmetic": ("answers", "loss"),
        "commonsense": ("answers", "options", "loss"),
    }
    for kind in ("arithmetic", "commonsense"):
        assert (task_of(kind, stories).metric, task_of(kind, stories).higher_is_better) == ("accuracy", True)
        loss = task_of(kind, stories, score="loss")
        assert (loss.metric, loss.higher_is_better) == ("nats_per_token", False)
        assert "question" not in loss.encode_test([CHOICE if kind == "commonsense" else GSM8K])[0][0]
        assert [TASKS[kind].higher_is_better_by(score) for score in ("auto", "answers", "loss")] == [True, True, False]
    assert TASKS["classification"].higher_is_better_by("auto") and not TASKS["text"].higher_is_better_by("auto")
    with pytest.raises(UserError, match=r"'options' is not supported by this task. Supported: answers, loss"):
        task_of("arithmetic", stories, score="options")
    with pytest.raises(UserError, match=r"task\.score = 'answers' is not supported by this task. Supported: loss"):
        task_of("text", stories, score="answers")


CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}END"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_where_an_answer_ends(stories, monkeypatch):
    task = task_of("arithmetic", stories)
    assert (task.end_tokens(), task.stops()) == ([stories.eos_token_id], ["### Instruction:"])
    monkeypatch.setattr(stories, "chat_template", CHAT)
    assert (task.end_tokens(), task.stops()) == ([stories.eos_token_id], ["END"])  # its last token is text
    monkeypatch.setattr(stories, "chat_template", CHAT.replace("END", "{{ unk_token }}"))
    assert task.end_tokens() == sorted([stories.eos_token_id, stories.unk_token_id])
    (example,), _ = task.encode_test([GSM8K])
    assert stories.decode(question_of(example).prompt_ids) == "<s> [user] How many?\n[assistant] "


def test_options_are_whole_answers(stories):
    task = task_of("commonsense", stories, score="options")
    (example,), _ = task.encode_test([CHOICE])
    told = [stories.decode(tokens) for tokens in task.option_tokens(question_of(example))]
    assert told == [f"the correct answer is answer{i}</s>" for i in (1, 2, 3)]
    assert task.option_tokens(question_of(example))[2] == [t for t in example["labels"] if t != -100]


TESTS = {
    "boolq": (3270, 2), "piqa": (1838, 2), "social_i_qa": (1954, 3), "hellaswag_1000": (1000, 4),
    "winogrande": (1267, 2), "ARC-Easy": (2376, 5), "ARC-Challenge": (1172, 5), "openbookqa": (500, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", TESTS)
def test_the_eight_tests_at_full_size(stories, real_data, name):
    table = load_table(str(real_data / "commonsense" / "test" / f"{name}.jsonl.gz"))
    task = task_of("commonsense", stories)
    assert task.columns_of(table) == ["instruction", "answer"]
    layout = task.layout(table.columns)
    questions = [task.question(row, layout) for row in table.rows]
    assert (len(questions), max(len(question.options) for question in questions)) == TESTS[name]
    for row, question in zip(table.rows, questions, strict=True):
        assert task.grade(question, row["output"]).right
        for option, written in zip(question.options, question.option_texts, strict=True):
            assert task.grade(question, written).right == (option == row["answer"])


@pytest.mark.parametrize("name", ["train", "test"])
def test_gsm8k_at_full_size(stories, real_data, name):
    """Every gold answer is right as it is learned; one more, the other sign, another row's are wrong."""
    table = load_table(str(real_data / "gsm8k" / f"{name}.jsonl.gz"))
    task = task_of("arithmetic", stories)
    layout = task.layout(table.columns)
    questions = [task.question(row, layout) for row in table.rows]
    golds = [int(question.gold.replace(",", "")) for question in questions]
    assert len(golds) == {"train": 7473, "test": 1319}[name]
    for row, question, gold, other in zip(table.rows, questions, golds, golds[1:] + golds[:1], strict=True):
        told = task.row_answer(row, layout)
        assert "<<" not in told and task.grade(question, told).right
        wrong = {gold + 1, gold - 1, other, gold * 100} - {gold}
        assert not any(task.grade(question, f"The answer is: {value}").right for value in wrong)
        assert task.grade(question, f"The answer is: {-gold}").right == (gold == 0)
        assert task.grade(question, f"The answer is: ${gold:,}.00.").right
