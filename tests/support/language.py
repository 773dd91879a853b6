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
PLACES = ("src", "docs", "benchmarks", "deploy", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "Dockerfile")
KINDS = {".py", ".md", ".toml", ".yaml", ".service", ".j2"}

# (pattern, what to write instead). A space also matches a line break and the "#" of a comment's next line.
PHRASES = (
    (r"(?<!there\s)(?:is|are|was|were|be) no (?!longer|more|less|better|worse|different|fewer|smaller|larger|one\b)\w+",
     "is not a valid ..., is not a ..., does not ..."),
    (r"at hand", "available"),
    (r"tells? of|telling of", "leaks, reveals, describes"),
    (r"tell|tells|told|telling", "state, show, send, receive, distinguish"),
    (r"hear|hears|heard", "receive"),
    (r"(?:takes?|taken|taking|took) (?:\w+ )?up(?! to)", "resume"),
    (r"so many", "N, or the number itself"),
    (r"whoever", "anyone who"),
    (r"(?:hang|hangs|hung) on", "depends on"),
    (r"(?:goes|go|went|going|gone) on", "continue"),
    (r"(?:is|are|was|were) wanted|if wanted|wants? (?:a|an|the|no|another)|wanted\b", "expected, optional, requires"),
    (r"beside", "alongside, next to, in addition to"),
    (r"behind(?! (?:(?:a|an|the) )?(?:\w+ ){0,2}(?:proxy|proxies|firewall|router|forwarder|NAT|balancer))",
     "after, or name the thing"),
    (r"(?<!bound\s)(?<!bounds\s)(?<!guarantee\s)(?<!law\s)(?<!equality\s)holds", "contains, keeps, stores"),
    (r"(?:is|are|was|were) there(?! (?:a|an|any)\b)", "exists, is available"),
    (r"(?:is|are) (?:gone|elsewhere|away)", "is missing, is unavailable, is offline"),
    (r"(?:values?|bytes|nats|steps?|rows?|tokens?|tensors?|passes|lines?|seconds|numbers?|one|entry|cores?|SVD|file|copy"
     r"|once|rank|object|process) an? (?:row|layer|client|value|token|round|step|tensor|line|core|head|site|run|task)"
     r"(?! [a-z]+s\b)",
     "per row, per layer"),
    (r"anew", "again, new"),
    (r"afresh", "again, from the start"),
    (r"doors?|doorkeeper", "the public port, AuthMiddleware, validation"),
    (r"promis(?:e|es|ed)", "guarantee, policy"),
    (r"knock(?:s|ed)?", "connect"),
    (r"whisper\w*|speaks? against|speak of|in vain|learnt by heart|keeps? the books", "name the fact plainly"),
    (r"(?:lies?|lay) (?:beside|there|here)", "is in"),
    (r"(?:stands?|stood) (?:in|on|at|beside|for itself|apart|there|above|before)", "is in, depends on, precedes"),
    (r"dearer|dear\b", "more expensive, costs more"),
    (r"ever so|on the way", "during training, while ..."),
    (r"says? (?:so|it|what|which|how|why|that there)(?= (?:itself|alone))", "states"),
    (r"with words|in words", "in text"),
    (r"late (?:client|site|comer)s?", "a client that missed the last round"),
    (r"carried adapters?", "residual adapter"),
    (r"secure sums?", "secure aggregation"),
    (r"doc(?:tor|ument)ed by whom|(?:of|for) whom", "name the subject"),
    (r"(?:of|from|with|by|at|in|for|to|has|have|is) another (?:version|kind|model|run's|name|length|shape|size|dtype|type)",
     "a different ..."),
)  # fmt: skip
FIRST_WORDS = {"Of", "As", "That", "In", "What", "Who", "Where", "Whether", "Which", "How"}
NOT_VERBS = {"This", "Its", "Rows", "Values", "Bytes", "Tensors", "Clients", "Names", "Settings", "Sites", "Always"}
OLD_NAMES = (  # in code quotes of Markdown; STYLE's table
    "Promise promise_of PromiseSpentError Guard Bench Turn Sending Sent Link heard settled owed unmoved common news held "
    "kept follow receive fold carry carried Facts BasisFacts BaseFacts Asking Holdings Lost AWAY notes Looked Opened "
    "Started Told Held at_hand NotAtHandError draws catalogue try_out Played admit Rules Wanted turns plain_mean sum_only "
    "cohort_size Choice Loaded idle claims Door Wire Register Card SiteSums EmbeddedEngine RemoteEngine embedded"
).split()


SPACE = r"[\s#]+"
RULES = [(re.compile(rf"\b(?:{pattern.replace(' ', SPACE)})\b", re.IGNORECASE), instead) for pattern, instead in PHRASES]
OLD_NAME = re.compile(rf"`(?:\w+\.)*({'|'.join(OLD_NAMES)})`")
NAMED_FILE = re.compile(r"`((?:[\w-]+/)+[\w-]+\.py)\b")
Finding = tuple[int, str, str]


def phrases(text: str, line: int = 1) -> Iterator[Finding]:
    """Yields the banned phrases in `text`, whose first line has the number `line`."""
    for rule, instead in RULES:
        for found in rule.finditer(text):
            yield line + text.count("\n", 0, found.start()), " ".join(found[0].split()), instead


def python_findings(source: str, *, commands: bool) -> Iterator[Finding]:
    """Yields the findings in a module: its docstrings, and its other texts of three words or more.

    `commands` is true for modules whose docstrings are the help texts of commands, which are imperative.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) > 2:
            yield from phrases(node.value, node.lineno)
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not (text := ast.get_docstring(node)):
            continue
        line, first = node.body[0].lineno, text.split()[0].strip(",.:;")
        if first in FIRST_WORDS:
            yield line, first, "start with a verb, a class or module with a noun"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not commands and not _is_property(node):
            if not re.fullmatch(r"[A-Z][a-z-]*s", first) or first in NOT_VERBS:
                yield line, first, "start with a verb in the third person, as in Returns, Loads"


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def markdown_findings(text: str, old_settings: Iterable[str] = ()) -> Iterator[Finding]:
    """Yields the old names in code quotes of a Markdown page, and the files that it names and that do not exist."""
    for pattern in (OLD_NAME, re.compile(rf"\b({'|'.join(map(re.escape, old_settings)) or '(?!)'})\b")):
        for found in pattern.finditer(text):
            yield text.count("\n", 0, found.start()) + 1, found[1], "an old name; CHANGELOG.md has the new one"
    for found in NAMED_FILE.finditer(text):
        if not any((folder / found[1]).exists() for folder in (ROOT, ROOT / "src" / "fedsb")):
            yield text.count("\n", 0, found.start()) + 1, found[1], "this file does not exist"


def renamed_settings() -> list[str]:
    """Returns the old names of settings, read from the table `RENAMED` of fedsb/config."""
    for path in sorted((ROOT / "src/fedsb/config").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RENAMED":
                return list(ast.literal_eval(node.value))
    return []


def findings(path: Path, old_settings: Iterable[str] = ()) -> list[Finding]:
    """Returns what is wrong with the language of one file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return sorted(python_findings(text, commands=path.parent.name == "cli"))
    found = list(markdown_findings(text, old_settings)) if path.suffix == ".md" and path.name != "CHANGELOG.md" else []
    if path.suffix == ".toml":  # comments only
        text = "\n".join(line[line.find("#") :] if "#" in line else "" for line in text.splitlines())
    return sorted([*found, *phrases(text)])


def main(places: Iterable[str]) -> int:
    """Prints every finding. Returns 1 if there is one."""
    paths = [path for place in places for path in ([ROOT / place] if (ROOT / place).is_file() else (ROOT / place).rglob("*"))]
    old, count = renamed_settings(), 0
    for path in sorted(paths):
        if path.is_file() and (path.suffix in KINDS or not path.suffix) and path.name != "LICENSE":
            for line, phrase, instead in findings(path, old):
                count += 1
                print(f"{path.relative_to(ROOT)}:{line}: {phrase!r}: {instead}")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or PLACES))
