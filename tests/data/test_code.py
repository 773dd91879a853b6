"""Programs: what is read and run, and what the sandbox keeps out."""

import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedsb.data.grading import code_check
from fedsb.data.grading.code_check import run_tests
from fedsb.data.sources import load_table
from fedsb.data.tasks import code as programs
from fedsb.data.tasks import open_task
from fedsb.data.tasks.base import TaskOptions, question_of
from fedsb.data.tasks.code import code_of, fenced
from fedsb.utils.errors import RunError, UserError

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\n\ndef half(x: int) -> int:\n    """ Half of x. """\n',
    "entry_point": "half",
    "canonical_solution": "    return math.floor(x / 2)\n",
    "test": "def check(candidate):\n    assert candidate(5) == 2\n",
}
MBPP = {
    "text": "Write a function to add one.",
    "code": "def one(x):\r\n  return x + step",
    "task_id": 1,
    "test_setup_code": "step = 1",
    "test_list": ["assert one(1) == 2", "assert one(2) == 3"],
    "challenge_test_list": [],
}


def task_of(tokenizer, **options):
    return open_task("code", tokenizer=tokenizer, options=TaskOptions(**options), max_tokens=512)


def question(task, row):
    return question_of(task.encode_test([row])[0][0])


def test_nothing_runs_unless_it_is_allowed(stories):
    with pytest.raises(UserError, match=r"Allow it with task\.run_code = true, or set task\.score = 'loss'"):
        task_of(stories)
    loss = task_of(stories, score="loss")
    assert (loss.metric, loss.higher_is_better) == ("nats_per_token", False)
    assert "question" not in loss.encode_test([MBPP])[0][0]
    assert task_of(stories, run_code=True).metric == "pass@1"


def test_humaneval(stories):
    task = task_of(stories, run_code=True)
    asked = question(task, HUMANEVAL)
    assert asked.prompt == (
        "Complete this Python function, and write the whole of it.\n```python\n" + HUMANEVAL["prompt"].strip() + "\n```"
    )
    assert (asked.gold.splitlines()[-1], asked.new_tokens) == ("check(half)", 512)
    layout = task.layout(list(HUMANEVAL))
    assert task.row_answer(HUMANEVAL, layout) == fenced(HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"])
    assert task.grade(asked, task.row_answer(HUMANEVAL, layout)).right
    for written, right in [
        (HUMANEVAL["canonical_solution"], True),  # a body alone
        ("def half(x):\n    return x // 2", True),
        ("Like this:\n```python\ndef half(x):\n    return math.floor(x / 2)\n```\nTry `half(5)`.", True),
        ("```python\ndef half(x):\n    return x / 2\n```", False),
        ("    return x / 2\n", False),
        ("", False),  # the prompt alone is a program too
        ("I do not know.", False),
    ]:
        assert task.grade(asked, written).right == right, written


def test_mbpp(stories):
    task = task_of(stories, run_code=True)
    asked = question(task, MBPP)
    assert asked.prompt == (
        "Write a function to add one.\nYour code should pass these tests:\nassert one(1) == 2\nassert one(2) == 3"
    )
    told = task.row_answer(MBPP, task.layout(list(MBPP)))
    assert told == "```python\ndef one(x):\n  return x + step\n```"
    assert task.grade(asked, told).right
    assert not task.grade(asked, told.replace("+", "-")).right
    assert task.grade(asked, "").extracted is None


def test_rows_to_train_on_need_no_tests_rows_to_score_do(stories):
    task = task_of(stories, run_code=True)
    rows = [{"query": "Add.", "answer": "Sure:\n```python\nx = 1 + 1\n```"}]
    (example,), _ = task.encode(rows)
    told = [token for token in example["labels"] if token != -100]
    assert stories.decode(told) == "Sure:\n```python\nx = 1 + 1\n```</s>"
    with pytest.raises(UserError, match=r"CodeFeedback rows have no tests to run .* or set task\.score = 'loss'"):
        task.encode_test(rows)


@pytest.mark.parametrize(
    ("written", "code"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),  # cut before its end
        ("```py\nf(1)\n```\n```py\ndef f(x): return x\n```\n```py\ndef f(x): return 0\n```", "def f(x): return x\n"),
        ("```bash\npip install x\n```\n```python\nx = 1\n```", "x = 1\n"),
        ("```bash\npip install x\n```", "pip install x\n"),
        ("```bash\npip install x\n```\n```Python\nx = 1\n```", "x = 1\n"),
        ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
    ],
)  # fmt: skip
def test_the_program_in_an_answer(written, code):
    assert code_of(written, "assert f(1) == 1") == code
    assert code_of(fenced("x = 1\r\ny = 2"), "") == "x = 1\ny = 2\n"


def test_half_a_humaneval_row_has_no_tests():
    """Both columns, or MBPP's list."""
    assert programs.tests_of({"test": "def check(f): pass"}) == programs.tests_of({"entry_point": "f"}) == []
    assert programs.tests_of({"entry_point": "f", "test_list": ["assert f()"]}) == ["assert f()"]


ESCAPES = {
    "an exit": "import sys\nsys.exit(0)",
    "an exit of the process": "import os\nos._exit(0)",
    "a plain exit": "raise SystemExit(0)",
    "an interrupt": "raise KeyboardInterrupt",
    "a kill": "import os\nos.kill(os.getpid(), 9)",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "too deep": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "too large": "x = bytearray(1 << 34)",
    "a file too large": "open('x', 'wb').write(bytes(1 << 26))",
    "many files": "for i in range(100): open(str(i), 'wb').write(bytes(1 << 20))",
    "a file elsewhere": "import os\nopen(os.path.dirname(os.getcwd()) + '/fedsb-escaped', 'w')",
    "a fork": "import os\nos.fork()",
    "a fork by hand": "import ctypes\nctypes.CDLL(None).fork()",
    "a thread": "import threading\nthreading.Thread(target=print).start()",
    "a shell": "import os\nif os.system('true'): raise ValueError",
    "a program": "import subprocess\nsubprocess.run(['true'])",
    "the network": "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)",
    "a socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('/var/run/docker.sock')",
    "input": "input()",
    "an environment": "import os\nos.environ['PATH']",
    "no syntax": "def f(:",
}


@pytest.mark.parametrize("what", ESCAPES)
def test_what_must_not_pass(what):
    ran = run_tests(ESCAPES[what], "", seconds=5)
    assert not ran.passed and ran.why
    assert not (Path(tempfile.gettempdir()) / "fedsb-escaped").exists()


def test_what_passes():
    program = "import re, math, collections, heapq, bisect, itertools, typing, json\nimport encodings.latin_1\n"
    ran = run_tests(program + "open('here', 'w').write('x')\nprint('x' * 10**7)", "assert open('here').read() == 'x'")
    assert ran == code_check.ProgramResult(passed=True, why=None, ended=True, isolation=code_check.check_sandbox())
    ran = run_tests("x = 1", "assert x == 2, 'no'")
    assert (ran.passed, ran.why, ran.ended) == (False, "AssertionError: no", True)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import sys\nwhile True: sys.stdout.write('x' * 4096)",
        "try:\n    while True: pass\nexcept BaseException:\n    pass\nwhile True: pass",
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except Exception: pass\n"
        "while True: pass",
    ],
)
def test_an_endless_program_ends(program):
    code_check.check_sandbox()
    started = time.monotonic()
    ran = run_tests(program, "", seconds=1)
    assert (ran.passed, ran.why, ran.ended) == (False, "took more than 1 s", False)
    assert time.monotonic() - started < 5


def test_nothing_is_left_behind(monkeypatch, tmp_path):
    code_check.check_sandbox()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ran = run_tests("open('here', 'w').write('x')\nwhile True: pass", "", seconds=0.5)
    assert ran.why == "took more than 0.5 s" and list(tmp_path.iterdir()) == []
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_without_namespaces_python_refuses_instead():
    """In a container that allows none; where nobody cannot read this Python, a superuser's run is refused."""
    for program, passes in {
        "x = 1": True,
        "open('here', 'w').write('x')": True,
        "import os\nopen(os.path.dirname(os.getcwd()) + '/fedsb-escaped', 'w')": False,
        "import os\nos.remove('/tmp/none')": False,
        "import os\nos.fork()": False,
        "import os\nos._exit(0)": False,
    }.items():
        ran = code_check._run(program, "", 5, namespaces=False)
        assert (ran.passed, ran.isolation) == (passes, "hooks"), (program, ran.why)


def test_the_limits_are_those_of_the_page():
    """docs/tasks.md: 10 seconds, 1 GiB, 16 MiB of files."""
    assert (code_check.SECONDS, code_check.MEMORY_BYTES, code_check.FILES_BYTES) == (10, 2**30, 2**24)


def test_a_system_without_limits_is_refused(monkeypatch):
    monkeypatch.setattr(code_check, "os", SimpleNamespace(name="nt"))
    code_check.check_sandbox.cache_clear()
    with pytest.raises(UserError, match=r"Use Linux, or task\.score = 'loss'"):
        run_tests("x = 1", "")
    code_check.check_sandbox.cache_clear()


def test_a_sandbox_that_does_not_hold_is_not_used(monkeypatch):
    monkeypatch.setattr(code_check, "PROBES", {"done = True": False})
    code_check.check_sandbox.cache_clear()
    with pytest.raises(RunError, match=r"does not work here \('done = True': passed\)"):
        run_tests("x = 1", "")
    code_check.check_sandbox.cache_clear()


@pytest.mark.parametrize("name", ["humaneval/HumanEval", "mbpp/mbpp"])
def test_real_solutions_pass_and_none_passes_not(stories, real_data, name):
    """Every fortieth row; benchmarks/grading/programs.py does all."""
    table = load_table(str(real_data / f"{name}.jsonl.gz"))
    task = task_of(stories, run_code=True)
    layout = task.layout(table.columns)
    for row in table.rows[::40][:10]:
        asked = task.question(row, layout)
        assert task.grade(asked, task.row_answer(row, layout)).right, row["task_id"]
        assert not task.grade(asked, "    return None\n").right
