"""Compares two mathematical answers by math-verify, in a separate process.

Some answers take forever, such as 9^(9^9) inside one machine instruction loop that no Python signal can interrupt. The
comparisons therefore run in a child process, one at a time, which asks the system to end it after a while. The caller's
process needs neither threads nor signal handlers, and a child ends with its caller. An answer that ends the
child, or raises, is wrong, and the reason is reported.

    python -m fedsb.data.grading.math_check     reads {"gold": ..., "answer": ...} per line, writes {"right", "fault"}
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

SECONDS = 10  # per answer
MEMORY_BYTES = 4 << 30
DECIMALS = 12  # for comparing floats; math-verify's default of 6 accepts .000067 for .0000672


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The result of a comparison."""

    right: bool
    fault: str | None = None


class MathChecker:
    """Compares answers in a child process, which is started when needed. `close`, or garbage collection, ends it."""

    def __init__(self, seconds: int = SECONDS) -> None:
        self.seconds = seconds
        self.child: subprocess.Popen[str] | None = None

    def grade(self, gold: str, text: str) -> Verdict:
        """Returns whether the text after the last "The answer is:" equals the gold answer as mathematics."""
        answer = last_answer(text)
        if answer is None:
            return Verdict(right=False, extracted=None)
        checked = self.same(gold, answer)
        return Verdict(right=checked.right, extracted=answer, fault=checked.fault)

    def same(self, gold: str, answer: str) -> Checked:
        """Returns whether the answer equals the gold answer. Both are LaTeX, with or without dollars around it."""
        if strip_latex(gold) == strip_latex(answer):
            return Checked(right=True)
        if bases_differ(gold, answer):
            return Checked(right=False)
        return self.ask(gold, answer)

    def ask(self, gold: str, answer: str) -> Checked:
        """Returns math-verify's result from the child."""
        child = self.child or self._start()
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps({"gold": gold, "answer": answer}) + "\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:  # Ctrl-C: the pending reply must not be read as the next one
            self.close()
            raise
        if not line:
            code = child.wait()
            self.close()
            late = code == -signal.SIGALRM
            return Checked(right=False, fault=f"took more than {self.seconds} s" if late else f"crashed ({code})")
        return Checked(**json.loads(line))

    def close(self) -> None:
        """Ends the child."""
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
        source = str(Path(__file__).resolve().parents[3])  # the child must import the same package
        paths = os.pathsep.join(path for path in (source, os.environ.get("PYTHONPATH")) if path)
        self.child = subprocess.Popen(
            [sys.executable, "-m", "fedsb.data.grading.math_check", str(self.seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # the caller handles Ctrl-C
        )
        assert self.child.stdout is not None
        if self.child.stdout.readline() != "ready\n":
            code = self.child.wait()
            raise RunError(
                f"the process that grades mathematics does not start (exit code {code}). Run `python -m "
                "fedsb.data.grading.math_check` to see the reason."
            )
        return self.child


def need_math_verify() -> None:
    """Raises UserError if the package is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("Grading mathematics needs the package math-verify. Install it: pip install 'fedsb[eval]'")


def strip_latex(latex: str) -> str:
    """Returns LaTeX without a final full stop, enclosing dollars and repeated white space."""
    text = " ".join(latex.split()).removesuffix(".").strip()
    return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1] else text


def normalise_latex(latex: str) -> str:
    """Returns LaTeX that math-verify reads correctly: "\\frac \\pi4" with braces, "11,\\!111" and "11{,}111" joined."""
    text = re.sub(r"(?<=[0-9])(?:,\\!|\{,\})\s*(?=[0-9])", "", strip_latex(latex))
    return re.sub(r"\\([dt]?)frac\s*(\\[A-Za-z]+|[0-9])\s*([0-9])", r"\\\1frac{\2}{\3}", text)


def strip_thousands(gold: str, answer: str) -> str:
    """Returns the answer without thousands separators if the gold has no comma, and so is not a list."""
    return answer if "," in gold else re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", answer)


def bases_differ(gold: str, answer: str) -> bool:
    """Returns whether both name the base of their digits, as in 1200_7, and differ in it: math-verify ignores it."""
    named = [re.search(r"[0-9A-Z]_\{?([0-9]+)\}?$", strip_latex(text)) for text in (gold, answer)]
    return all(named) and len({found.group(1) for found in named if found}) > 1


def compare(gold: str, answer: str) -> Checked:
    """Compares by math-verify in this process, without a time limit."""
    from math_verify import parse, verify

    try:
        golds, answers = (
            parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)
            for text in (normalise_latex(gold), strip_thousands(gold, normalise_latex(answer)))
        )
        if not golds:
            return Checked(right=False, fault=f"math-verify cannot read the gold {gold!r}")
        same = verify(golds, answers, float_rounding=DECIMALS, timeout_seconds=None, raise_on_error=True)
        return Checked(right=bool(same))
    except Exception as error:  # sympy and its parsers may raise anything
        return Checked(right=False, fault=f"{type(error).__name__}: {error}"[:200])


def serve(seconds: int) -> None:
    """Runs the child's loop. The system's alarm can end it at any point."""
    import resource

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    out, sys.stdout = sys.stdout, sys.stderr  # keeps the libraries' output out of the replies
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    compare("1", "\\frac{2}{2}")  # loads the parsers, which is slow
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        signal.alarm(math.ceil(seconds))
        found = compare(request["gold"], request["answer"])
        signal.alarm(0)
        print(json.dumps({"right": found.right, "fault": found.fault}), file=out, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]) if len(sys.argv) > 1 else SECONDS)
