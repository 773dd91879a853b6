"""Whether two mathematical answers are the same, by math-verify, in a process of its own.

Some answers take forever, 9^(9^9) inside one machine instruction loop that no Python signal can reach. So the checks
run in a child process, one at a time, which asks the system to end it after a while: neither threads nor signal
handlers in the caller's process, and a child whose caller is gone ends too. An answer that ends the child, or raises,
is wrong, and says why.

    python -m fedsb.data.grading.math_check     reads {"gold": ..., "answer": ...} a line, answers {"right", "fault"}
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsb.data.grading.verdict import Verdict, last_answer
from fedsb.utils.errors import RunError, UserError

SECONDS = 10  # for one answer
MEMORY_BYTES = 4 << 30
DECIMALS = 12  # that floats are compared to; math-verify's own 6 take .000067 for .0000672


@dataclass(frozen=True, kw_only=True)
class Checked:
    right: bool
    fault: str | None = None


class MathChecker:
    """Starts the child when it is first needed, and again after it was ended; `close`, or forgetting this, ends it."""

    def __init__(self, seconds: int = SECONDS) -> None:
        self.seconds = seconds
        self.child: subprocess.Popen[str] | None = None

    def grade(self, gold: str, text: str) -> Verdict:
        """Right where what follows the text's last "The answer is:" is the gold, as mathematics."""
        answer = last_answer(text)
        if answer is None:
            return Verdict(right=False, extracted=None)
        checked = self.same(gold, answer)
        return Verdict(right=checked.right, extracted=answer, fault=checked.fault)

    def same(self, gold: str, answer: str) -> Checked:
        """Whether the answer is the gold. Both are LaTeX, with or without dollars around it."""
        if bare(gold) == bare(answer):
            return Checked(right=True)
        if other_base(gold, answer):
            return Checked(right=False)
        return self.ask(gold, answer)

    def ask(self, gold: str, answer: str) -> Checked:
        """What math-verify says, in the child."""
        child = self.child or self._start()
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps({"gold": gold, "answer": answer}) + "\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:  # Ctrl-C: the reply that is still to come must not be taken for the next one's
            self.close()
            raise
        if not line:
            code = child.wait()
            self.close()
            late = code == -signal.SIGALRM
            return Checked(right=False, fault=f"took more than {self.seconds} s" if late else f"crashed ({code})")
        return Checked(**json.loads(line))

    def close(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            for pipe in (self.child.stdin, self.child.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            self.child = None

    def __del__(self) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[str]:
        need_math_verify()
        source = str(Path(__file__).resolve().parents[3])  # the child must find this very package
        paths = os.pathsep.join(path for path in (source, os.environ.get("PYTHONPATH")) if path)
        self.child = subprocess.Popen(
            [sys.executable, "-m", "fedsb.data.grading.math_check", str(self.seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C is the caller's to handle
        )
        assert self.child.stdout is not None
        if self.child.stdout.readline() != "ready\n":
            code = self.child.wait()
            raise RunError(f"the process that grades mathematics does not start (exit code {code}): try `python -m "
                           "fedsb.data.grading.math_check` and see why")  # fmt: skip
        return self.child


def need_math_verify() -> None:
    """Raises UserError where the package is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("grading mathematics needs the package math-verify: pip install 'fedsb[eval]'")


def bare(latex: str) -> str:
    """LaTeX without a full stop at its end and dollars around it, white space alike: what is equal so is the same."""
    text = " ".join(latex.split()).removesuffix(".").strip()
    return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1] else text


def tidy(latex: str) -> str:
    """LaTeX that math-verify reads as it is meant: "\\frac \\pi4" with braces, "11,\\!111" and "11{,}111" together."""
    text = re.sub(r"(?<=[0-9])(?:,\\!|\{,\})\s*(?=[0-9])", "", bare(latex))
    return re.sub(r"\\([dt]?)frac\s*(\\[A-Za-z]+|[0-9])\s*([0-9])", r"\\\1frac{\2}{\3}", text)


def together(gold: str, answer: str) -> str:
    """The answer without thousands separators, where the gold has no comma, and so is no list."""
    return answer if "," in gold else re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", answer)


def other_base(gold: str, answer: str) -> bool:
    """Whether both name the base of their digits, as in 1200_7, and another one: math-verify reads past it."""
    named = [re.search(r"[0-9A-Z]_\{?([0-9]+)\}?$", bare(text)) for text in (gold, answer)]
    return all(named) and len({found.group(1) for found in named if found}) > 1


def compare(gold: str, answer: str) -> Checked:
    """By math-verify, in this process, without a limit of time."""
    from math_verify import parse, verify

    try:
        golds, answers = (
            parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)
            for text in (tidy(gold), together(gold, tidy(answer)))
        )
        if not golds:
            return Checked(right=False, fault=f"math-verify cannot read the gold {gold!r}")
        same = verify(golds, answers, float_rounding=DECIMALS, timeout_seconds=None, raise_on_error=True)
        return Checked(right=bool(same))
    except Exception as error:  # sympy and its parsers raise whatever they like
        return Checked(right=False, fault=f"{type(error).__name__}: {error}"[:200])


def serve(seconds: int) -> None:
    """The child's loop. The system's own alarm ends it in the middle of whatever it does."""
    import resource

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    compare("1", "\\frac{2}{2}")  # loads the parsers, which is slow and not the answer's fault
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        signal.alarm(math.ceil(seconds))
        found = compare(asked["gold"], asked["answer"])
        signal.alarm(0)
        print(json.dumps({"right": found.right, "fault": found.fault}), file=out, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]) if len(sys.argv) > 1 else SECONDS)
