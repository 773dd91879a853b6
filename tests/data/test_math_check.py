"""MATH by math-verify: the same value however it is written, and nothing that hangs, crashes or raises."""

import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest

from fedsb.data.grading import math_check
from fedsb.data.grading.math_check import MathChecker, strip_latex
from fedsb.utils.errors import RunError, UserError


@pytest.fixture(scope="module")
def checker():
    pytest.importorskip("math_verify")
    made = MathChecker(seconds=20)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("gold", "written", "right"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac{1}{2}", "\\dfrac12", True),
        ("\\frac{1}{2}", "$\\frac{2}{4}$.", True),
        ("\\frac{1}{2}", "2", False),
        ("3\\sqrt{13}", "\\sqrt{117}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("10,080", "10080", True),
        ("-3", "3", False),
        ("(1,2)", "(2,1)", False),
        ("(-\\infty,3]", "(-\\infty,3)", False),
        ("\\text{Evelyn}", "Evelyn", True),
        ("\\text{Evelyn}", "Brian", False),
        ("12\\text{ cm}", "12", True),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", True),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}", False),
        ("11/2", "1 1/2", False),
        ("1200_7", "1200_7", True),
        ("1200_7", "1200_{7}", True),
        ("1200_7", "1200_8", False),
        ("1200_{7}", "1201_{7}", False),
        (".0000672", ".000067", False),
        ("\\frac{1}{3}", "0.333333", False),
        ("\\frac \\pi4 + 2 - \\sqrt2", "\\frac{\\pi}{4} + 2 - \\sqrt{2}", True),
        ("\\frac \\pi4 + 2 - \\sqrt2", "2", False),
        ("\\frac{2009}{4}", "\\frac{2,009}{4}", True),
        ("2250\\pi", "2{,}250\\pi", True),
        ("11,\\! 111,\\! 100", "11111100", True),
        ("4,6,14", "14,6,4", True),
        ("4,6,14", "4614", False),
        ("(100,200)", "(100.0,200)", True),  # no thousands
        ("12", "12.4", False),
        ("12", "1", False),
        ("12", "{12", False),
        ("\\frac{1}{2}", "\\frac{1}{", False),
    ],
)
def test_mathematics(checker, gold, written, right):
    verdict = checker.grade(gold, f"So it is.\nThe answer is: {written}")
    assert (verdict.right, verdict.extracted) == (right, written)


def test_no_answer(checker):
    assert checker.grade("2", "so it is 2").extracted is None
    assert not checker.grade("2", "so it is 2").right


def test_what_hangs_is_wrong_and_the_next_is_graded_again():
    pytest.importorskip("math_verify")
    checker = MathChecker(seconds=1)
    assert checker.same("5", "\\frac{10}{2}").right
    child, started = checker.child, time.monotonic()
    assert checker.same("5", "10000000!").fault == "took more than 1 s"
    assert checker.child is None and time.monotonic() - started < 8
    assert child.stdin.closed and child.stdout.closed
    assert checker.same("5", "\\frac{10}{2}").right
    child = checker.child
    assert os.getsid(child.pid) == child.pid != os.getsid(0)  # Ctrl-C is not its own
    time.sleep(1.5)
    assert child.poll() is None  # no alarm outlives its answer
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    found = checker.same("5", "\\frac{15}{3}")
    assert not found.right and found.fault == "crashed (-9)"
    assert checker.same("5", "\\frac{15}{3}").right
    child = checker.child
    del checker
    assert child.poll() is not None  # nothing stays behind


def test_an_interrupt_leaves_no_reply_behind():
    """Else every verdict after it would be the one before's."""
    pytest.importorskip("math_verify")
    checker = MathChecker(seconds=20)
    assert checker.same("5", "\\frac{10}{2}").right
    reader = checker.child.stdout

    class Interrupted:
        def readline(self):
            raise KeyboardInterrupt

        def close(self):
            reader.close()

    checker.child.stdout = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        checker.same("5", "\\frac{15}{3}")
    assert not checker.same("5", "\\frac{12}{3}").right
    checker.close()


def test_what_raises_is_wrong_and_says_so(monkeypatch):
    math_verify = pytest.importorskip("math_verify")

    def fail(*_, **__):
        raise ZeroDivisionError("no")

    monkeypatch.setattr(math_verify, "verify", fail)
    found = math_check.compare("1", "2")
    assert (found.right, found.fault) == (False, "ZeroDivisionError: no")


def test_equal_texts_need_no_library(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    checker = MathChecker()
    assert checker.same("\\frac{1}{2}", " $\\frac{1}{2}$. ").right
    assert strip_latex("$a$ or $b$") == "$a$ or $b$" and strip_latex("1 1/2") != strip_latex("11/2")
    assert strip_latex("5 .") == "5" and strip_latex("$$") == "$$"
    with pytest.raises(UserError, match=r"pip install 'fedsb\[eval\]'"):
        checker.same("1", "2")


def test_a_child_that_does_not_start(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RunError, match=r"does not start \(exit code 3\)"):
        MathChecker().same("1", "2")


def test_a_gold_that_cannot_be_read_is_a_fault_and_such_an_answer_is_wrong():
    pytest.importorskip("math_verify")
    assert math_check.compare("", "2").fault == "math-verify cannot read the gold ''"
    found = math_check.compare("2", "")
    assert (found.right, found.fault) == (False, None)


def test_the_child_has_little_memory_and_an_alarm_that_ends_it():
    """Whatever its caller had ignored: a process of its own, whose input is at its end."""
    pytest.importorskip("math_verify")
    script = (
        "import io, resource, signal, sys; from fedsb.data.grading import math_check\n"
        "signal.signal(signal.SIGALRM, signal.SIG_IGN); sys.stdin = io.StringIO('')\n"
        "out = sys.stdout; math_check.serve(1)\n"
        "print(resource.getrlimit(resource.RLIMIT_AS)[0], signal.getsignal(signal.SIGALRM) == signal.SIG_DFL, file=out)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["ready", str(4 * 1024**3), "True"]
