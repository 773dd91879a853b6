"""Checks the English of docstrings, messages, comments of settings and Markdown: `python tests/support/language.py`.

`make lint` runs it. Each finding is a line `file:line: phrase: what to write instead`. `PHRASES` are the rules.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACES = (
    "src",
    "docs",
    "benchmarks",
    "deploy",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "Makefile",
    "Dockerfile",
)
SUFFIXES = {".py", ".md", ".toml", ".yaml", ".service", ".j2", ""}
GENERATED = {"table.md", "faults.md", "roles.md"}  # results of benchmarks, as printed

A_THING = r"an? (?:row|layer|client|value|token|round|step|tensor|line|core|head|site|run|task)(?! [a-z]+s\b)"
# (pattern, what to write instead). Case is ignored, and a space also matches a line break.
PHRASES = (
    (
        r"(?<!there\s)(?:is|are|was|were|be) no (?!more|less|worse|one\b|\w+er\b)\w+",
        "is not a (valid) ..., does not ...",
    ),
    (r"at hand", "available"),
    (r"tell|tells|told|telling", "leak, reveal, state, show, send, receive, distinguish"),
    (r"hear|hears|heard", "receive"),
    (r"(?:takes?|taken|taking|took) (?:\w+ )?up(?! to)", "resume"),
    (r"so many", "N, or the number itself"),
    (r"whoever", "anyone who"),
    (r"(?:hang|hangs|hung) on", "depends on"),
    (r"(?:goes|go|went|going|gone) on", "continue"),
    (r"wanted|wants? (?:a|an|the|no|another)", "expected, optional, requires"),
    (r"beside", "alongside, next to, in addition to"),
    (r"behind(?! (?:\w+ ){0,3}(?:proxy|proxies|firewall|router|forwarder|NAT|balancer))", "after, or name the thing"),
    (r"(?<!bound\s)(?<!bounds\s)(?<!guarantee\s)(?<!law\s)(?<!equality\s)holds", "contains, stores, has"),
    (r"(?:is|are|was|were) there(?! an?\b)", "exists, is available"),
    (r"(?:is|are) (?:gone|elsewhere|away)", "is missing, is unavailable, is offline"),
    (rf"(?:values?|bytes|nats|steps?|rows?|tokens?|tensors?|seconds|numbers?) {A_THING}", "per row, per layer"),
    (rf"(?:passes|lines?|one|entry|cores?|SVD|file|copy|once|rank|object|process) {A_THING}", "one per row, per layer"),
    (r"anew|afresh", "again, new"),
    (r"doors?|doorkeeper", "the public port, AuthMiddleware, validation"),
    (r"promis(?:e|es|ed)", "guarantee, policy"),
    (r"knock(?:s|ed)?", "connect"),
    (r"whisper\w*|speaks? against|speak of|in vain|learnt by heart|keeps? the books", "name the fact"),
    (r"(?:lies?|lay) (?:beside|there|here)", "is in"),
    (r"(?:stands?|stood) (?:in|on|at|beside|for itself|apart|there|above|before)", "is in, depends on, precedes"),
    (r"dearer|dear", "costs more"),
    (r"on the way", "during training, while ..."),
    (r"with words|in words", "in text"),
    (r"late (?:client|site|comer)s?", "a client that missed the last round"),
    (r"carried adapters?", "residual adapter"),
    (r"secure sums?", "secure aggregation"),
    (r"embedded engine", "in-process channel"),
    (r"(?:of|from|with|by|at|in|has|is) another (?:version|kind|model|name|length|shape|size|type)", "a different ..."),
)
SPACE = r"(?:[ \t]+|[ \t]*\n[ \t#]*)"  # also a line break in a paragraph, or in a comment
RULES = [(re.compile(rf"\b(?:{rule.replace(' ', SPACE)})\b", re.IGNORECASE), instead) for rule, instead in PHRASES]

NOT_FIRST = {"Of", "As", "That", "In", "What", "Who", "Where", "Whether", "Which", "How"}
NOT_VERBS = {"This", "Its", "Rows", "Values", "Bytes", "Tensors", "Clients", "Settings", "Sites", "Always"}
OLD_NAMES = (  # in code quotes of Markdown
    "Promise promise_of Guard Bench Turn Sending Sent Link unmoved common news held kept follow receive fold carry "
    "Facts BasisFacts BaseFacts Asking Holdings Lost AWAY Note Looked Opened Told Held at_hand draws catalogue try_out "
    "Played admit Rules Wanted turns plain_mean sum_only cohort_size Choice Loaded Door Wire Card SiteSums embedded "
    "EmbeddedEngine RemoteEngine"
)
OLD_NAME = re.compile(rf"`(?:\w+\.)*({OLD_NAMES.replace(' ', '|')})`")
NAMED_FILE = re.compile(r"`((?:[\w-]+/)+[\w-]+\.py)\b")
Finding = tuple[int, str, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def phrases(text: str, line: int = 1) -> Iterator[Finding]:
    """Yields the banned phrases in `text`, whose first line has the number `line`."""
    for rule, instead in RULES:
        for found in rule.finditer(text):
            yield line + text.count("\n", 0, found.start()), " ".join(found[0].split()), instead


def python_findings(source: str, *, commands: bool = False) -> Iterator[Finding]:
    """Yields the findings in a module: its docstrings, and its other texts of three words or more.

    `commands` is true for modules whose docstrings are the help texts of commands, which are imperative.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) > 2:
            yield from phrases(node.value, node.lineno)
        if isinstance(node, ast.Module | ast.ClassDef | Function) and (text := ast.get_docstring(node)):
            line, first = node.body[0].lineno, text.split()[0].strip(",.:;")
            verb = re.fullmatch(r"[A-Z][a-z-]*s", first) and first not in NOT_VERBS
            if first in NOT_FIRST:
                yield line, first, "start with a verb; for a class or module, with a noun"
            elif isinstance(node, Function) and not (verb or commands or _is_property(node)):
                yield line, first, "start with a verb in the third person, such as Returns"


def _is_property(node: Function) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def markdown_findings(text: str, old_settings: Iterable[str] = ()) -> Iterator[Finding]:
    """Yields the old names in code quotes of a Markdown page, and the files that it names and that do not exist."""
    settings = re.compile(rf"\b({'|'.join(map(re.escape, old_settings)) or '(?!)'})\b")
    for found in (*OLD_NAME.finditer(text), *settings.finditer(text)):
        yield text.count("\n", 0, found.start()) + 1, found[1], "an old name; CHANGELOG.md has the new one"
    for found in NAMED_FILE.finditer(text):
        if not any((folder / found[1]).exists() for folder in (ROOT, ROOT / "src/fedsb")):
            yield text.count("\n", 0, found.start()) + 1, found[1], "this file does not exist"


def renamed_settings() -> list[str]:
    """Returns the old names of settings, from the table `RENAMED` in fedsb/config."""
    for path in (ROOT / "src/fedsb/config").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RENAMED":
                return list(ast.literal_eval(node.value))
    return []


def findings(path: Path, old_settings: Iterable[str] = ()) -> list[Finding]:
    """Returns the findings in one file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return sorted(python_findings(text, commands=path.parent.name == "cli"))
    if path.suffix == ".toml":  # comments only
        text = "\n".join(line[line.find("#") :] if "#" in line else "" for line in text.splitlines())
    names = markdown_findings(text, old_settings) if path.suffix == ".md" and path.name != "CHANGELOG.md" else ()
    return sorted([*names, *phrases(text)])


def main(places: Iterable[str]) -> int:
    """Prints the findings in files and folders of the repository. Returns 1 if there are any."""
    roots = [ROOT / place for place in places]
    paths = sorted(path for root in roots for path in (root.rglob("*") if root.is_dir() else [root]))
    old, count = renamed_settings(), 0
    for path in paths:
        if path.is_file() and path.suffix in SUFFIXES and path.name not in GENERATED:
            for line, phrase, instead in findings(path, old):
                print(f"{path.relative_to(ROOT)}:{line}: {phrase!r}: {instead}")
                count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or PLACES))
