"""Measures the errors of pass@1: right programs that do not pass their tests, and wrong ones that do.

    python benchmarks/grading/programs.py --data FOLDER        (FOLDER contains humaneval/ and mbpp/, as jsonl.gz)

Right programs are the data sets' own solutions, as a model is taught to write them (HumanEval's also as a body alone).
Wrong ones are made from them (from every third of MBPP): every function returns None; the first operator is replaced;
the first number plus one; the last return is removed; the process ends before the tests. Some changes leave a program
right, or are detected by none of the row's tests: they pass, and are listed with their rows. Some 3,500 programs, each
in a sandbox, take about a quarter of an hour on one core. Writes programs.json.
"""

from __future__ import annotations

import argparse
import ast
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedsb.data.grading.code_check import check_sandbox
from fedsb.data.rows import Row
from fedsb.data.sources import load_table
from fedsb.data.tasks.base import TaskOptions
from fedsb.data.tasks.code import Code, code_of, fenced, run_with_tests

HERE = Path(__file__).parent
TURNED = {ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
          ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add,
          ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.Mod: ast.FloorDiv, ast.And: ast.Or,
          ast.Or: ast.And}  # fmt: skip


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def give_none(tree: ast.Module) -> bool:
    for function in functions(tree):
        function.body = [ast.Return(ast.Constant(None))]
    return True


def turn_operator(tree: ast.Module) -> bool:
    for function in functions(tree):
        for node in ast.walk(function):
            if isinstance(node, ast.Compare) and type(node.ops[0]) in TURNED:
                node.ops[0] = TURNED[type(node.ops[0])]()
                return True
            if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in TURNED:
                node.op = TURNED[type(node.op)]()
                return True
    return False


def one_more(tree: ast.Module) -> bool:
    for function in functions(tree):
        for node in ast.walk(function):
            if isinstance(node, ast.Constant) and type(node.value) is int:
                node.value += 1
                return True
    return False


def no_last_return(tree: ast.Module) -> bool:
    found = [function for function in functions(tree) if isinstance(function.body[-1], ast.Return)]
    if not found:
        return False
    found[-1].body[-1] = ast.Pass()
    return True


CHANGES: dict[str, Callable[[ast.Module], bool]] = {
    "gives back None": give_none,
    "an operator turned": turn_operator,
    "a number one more": one_more,
    "the last return left out": no_last_return,
}
ENDINGS = {
    "sys.exit(0) before the tests": "\nimport sys\nsys.exit(0)\n",
    "os._exit(0) before the tests": "\nimport os\nos._exit(0)\n",
    "raise SystemExit before the tests": "\nraise SystemExit\n",
}


def changed(program: str, change: Callable[[ast.Module], bool]) -> str | None:
    """Returns the changed program, or None if there is nothing to change."""
    tree = ast.parse(program)
    return ast.unparse(ast.fix_missing_locations(tree)) if change(tree) else None


def tally(cases: list[tuple[Any, str, Any]], *, right: bool) -> dict[str, Any]:
    """Returns how many of the cases (row, answer, question) are judged differently from `right`, and which."""
    failures, stopped = [], 0
    for row, answer, question in cases:
        ran = run_with_tests(question, code_of(answer, question.gold))
        stopped += not ran.ended
        if ran.passed != right:
            failures.append({"row": row, "why": ran.why, "answer": answer})
    return {"programs": len(cases), "misjudged": len(failures), "stopped": stopped, "failures": failures}


def measure(rows: list[Row], keep: Callable[[str, dict[str, Any]], None], *, spoil_every: int) -> None:
    task = Code(tokenizer=None, options=TaskOptions(run_code=True), max_tokens=512)
    layout = task.layout(list(rows[0]))
    questions = [task.question(row, layout) for row in rows]
    told = [task.row_answer(row, layout) for row in rows]
    names = [row["task_id"] for row in rows]
    golds = [code_of(answer, question.gold) for answer, question in zip(told, questions, strict=True)]
    keep("solutions", tally(list(zip(names, told, questions, strict=True)), right=True))
    if layout.name == "HumanEval":
        bodies = [str(row["canonical_solution"]) for row in rows]
        keep("solutions, the body alone", tally(list(zip(names, bodies, questions, strict=True)), right=True))
    for kind, change in CHANGES.items():
        made = [changed(gold, change) for gold in golds]
        cases = [(n, fenced(m), q) for n, m, q in zip(names, made, questions, strict=True) if m is not None][
            ::spoil_every
        ]
        keep(f"wrong: {kind}", tally(cases, right=False))
    for kind, ending in ENDINGS.items():
        cases = [(n, fenced(g + ending), q) for n, g, q in zip(names, golds, questions, strict=True)][::10]
        keep(f"wrong: {kind}, every tenth row", tally(cases, right=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    results: dict[str, Any] = {"isolation": check_sandbox()}
    for name, path in (("HumanEval", "humaneval/HumanEval.jsonl.gz"), ("MBPP", "mbpp/mbpp.jsonl.gz")):
        started = [time.monotonic()]

        def keep(kind: str, found: dict[str, Any], name: str = name, started: list[float] = started) -> None:
            now = time.monotonic()
            results.setdefault(name, {})[kind] = {"seconds": round(now - started[0], 1), **found}
            started[0] = now
            (HERE / "programs.json").write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name} | {kind} | {found['programs']} | {found['misjudged']} | {found['stopped']}", flush=True)

        measure(load_table(str(data / path)).rows, keep, spoil_every=1 if name == "HumanEval" else 3)


if __name__ == "__main__":
    main()
