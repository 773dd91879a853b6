"""The built-in data set `python-docs`: the docstrings of the standard library, read from the running interpreter.

A row is {"text": the docstring, "label": the area of the library, "client": its client, "module": its module,
"prompt": a question about what is documented, "answer": the docstring's first paragraph}. The sources are parsed, never
imported, so it takes seconds and no download. A table assigns modules of each area to clients. The clients cut across
the areas unevenly, as real organisations do, and the test is on modules that no client has. A different Python version
has different docstrings, and a module that it lacks is absent.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from fedsb.data.rows import Row, Table, make_table
from fedsb.utils.errors import UserError

MIN_CHARACTERS = 20  # a shorter docstring says too little about its area
TEST = "test"  # in place of a client's name

# area -> client -> modules. A package means all of its modules except those that are named separately.
MODULES: dict[str, dict[str, str]] = {
    "text": {
        "site-aurora": "re",
        "site-birch": "codecs",
        "site-ember": "difflib",
        "site-fjord": "_strptime",
        "site-harbor": "gettext string stringprep",
        TEST: "locale textwrap",
    },
    "data-types": {
        "site-aurora": "enum",
        "site-cedar": "functools",
        "site-delta": "collections",
        "site-fjord": "datetime _pydatetime zoneinfo",
        "site-grove": "_collections_abc operator weakref _weakrefset",
        "site-harbor": "array bisect copy graphlib pprint reprlib types",
        TEST: "calendar heapq",
    },
    "numeric": {
        "site-aurora": "random",
        "site-delta": "fractions",
        "site-fjord": "_pydecimal _pylong decimal numbers",
        "site-harbor": "colorsys secrets",
        TEST: "statistics",
    },
    "files": {
        "site-aurora": "pathlib",
        "site-birch": "configparser",
        "site-cedar": "shutil",
        "site-delta": "tarfile",
        "site-ember": "csv plistlib",
        "site-fjord": "_compression bz2 compression copyreg lzma pickle",
        "site-grove": "genericpath ntpath nturl2path posixpath stat",
        "site-harbor": "dbm filecmp fileinput fnmatch linecache netrc shelve sqlite3 tomllib xdrlib",
        TEST: "glob gzip tempfile zipfile",
    },
    "system": {
        "site-aurora": "ctypes logging",
        "site-birch": "_threading_local threading",
        "site-cedar": "os",
        "site-delta": "_pyio io multiprocessing queue sched",
        "site-harbor": "_aix_support _android_support _apple_support _ios_support _osx_support pipes pty signal tty",
        TEST: "concurrent platform subprocess",
    },
    "networking": {
        "site-aurora": "urllib webbrowser",
        "site-birch": "asyncio http selectors socket ssl wsgiref",
        "site-cedar": "ipaddress",
        "site-delta": "imaplib",
        "site-ember": "cgi cgitb smtplib",
        "site-fjord": "nntplib",
        "site-grove": "poplib telnetlib",
        "site-harbor": "asynchat asyncore smtpd uuid",
        TEST: "ftplib socketserver xmlrpc",
    },
    "internet-data": {
        "site-aurora": "_markupbase html",
        "site-delta": "base64",
        "site-ember": "email mailbox xml",
        "site-harbor": "mailcap mimetypes quopri uu",
        TEST: "json xml.dom xml.etree",
    },
    "interfaces": {
        "site-aurora": "argparse tkinter",
        "site-birch": "code codeop",
        "site-delta": "curses",
        "site-fjord": "turtle",
        "site-grove": "_pyrepl optparse tkinter.tix",
        "site-harbor": "getopt getpass rlcompleter tkinter.filedialog tkinter.font tkinter.simpledialog",
        TEST: "cmd shlex tkinter.ttk",
    },
    "development": {
        "site-aurora": "typing",
        "site-birch": "unittest.mock",
        "site-cedar": "distutils unittest venv",
        "site-delta": "bdb",
        "site-grove": "pydoc tracemalloc",
        "site-harbor": "cProfile profile profiling pstats zipapp",
        TEST: "doctest pdb timeit trace",
    },
    "runtime": {
        "site-aurora": "annotationlib contextlib dataclasses inspect",
        "site-birch": "warnings _py_warnings",
        "site-cedar": "imp importlib pkgutil site sysconfig zipimport",
        "site-delta": "ast _ast_unparse dis opcode symtable",
        "site-harbor": "_py_abc _sitebuiltins abc compileall modulefinder pickletools py_compile pyclbr runpy tokenize",
        TEST: "importlib.metadata importlib.resources traceback",
    },
}

# Modules of the standard library without an area: tests, bundled programs, tables, cryptography, old sound and image
# files, jokes, and stubs of a few lines. Any other module that is in neither list is left out too.
LEFT_OUT = (
    "__future__ __hello__ __phello__ _bootsubprocess _colorize _missing_stdlib_info _opcode_metadata aifc antigravity "
    "chunk crypt encodings ensurepip hashlib hmac idlelib imghdr keyword lib2to3 pydoc_data sndhdr sunau tabnanny test "
    "this turtledemo wave"
)


def rows() -> tuple[list[Row], list[Row]]:
    """Returns (training rows, test rows), by module and then in order of the source. Repeated texts are kept once.

    Raises UserError if the interpreter has no sources of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    train: list[Row] = []
    test: list[Row] = []
    seen: set[str] = set()
    for module, path in _modules(root):
        assignment = _assignment(module)
        if assignment is None:
            continue
        label, client = assignment
        for name, text in docstrings(path, module):
            if len(text) >= MIN_CHARACTERS and text not in seen:
                seen.add(text)
                row = {
                    "text": text,
                    "label": label,
                    "client": client,
                    "module": module,
                    "prompt": f"What is `{name}` in Python?",
                    "answer": " ".join(text.split("\n\n")[0].split()),
                }
                (test if client == TEST else train).append(row)
    if not train or not test:
        raise UserError(
            f"python-docs found no docstrings below {root}, because this Python has no sources of its library. Use a "
            "different Python, or give your own file: --set data.train=PATH"
        )
    return train, test


def tables() -> tuple[Table, Table]:
    """Returns `rows` as tables with an origin and a fingerprint."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    train, test = rows()
    return make_table(train, f"python-docs@{version}"), make_table(test, f"python-docs@{version} (test modules)")


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Yields every module of the library in alphabetical order, without the packages' own tests."""
    found: dict[str, Path] = {}
    for top in sorted(sys.stdlib_module_names.difference(LEFT_OUT.split())):
        for path in (root / f"{top}.py", *(root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if path.is_file() and not {"test", "tests"} & set(parts):
                found[".".join(parts).removesuffix(".__init__")] = path
    yield from sorted(found.items())


def _assigned() -> dict[str, tuple[str, str]]:
    """Returns module or package -> (area, client)."""
    return {
        module: (area, client)
        for area, clients in MODULES.items()
        for client, modules in clients.items()
        for module in modules.split()
    }


_ASSIGNED = _assigned()


def _assignment(module: str) -> tuple[str, str] | None:
    """Returns (area, client) by the longest prefix in the table, or None."""
    while module and module not in _ASSIGNED:
        module = module.rpartition(".")[0]
    return _ASSIGNED.get(module)


def docstrings(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """Yields (full name, cleaned docstring) of the module in a file, and of its classes, functions and methods."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own invalid escapes
        nodes: list[tuple[str, ast.AST]] = [(module, ast.parse(path.read_bytes()))]
    while nodes:
        name, node = nodes.pop()
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{name}.{node.name}"
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield name, (ast.get_docstring(node) or "").strip()
        inner = [n for n in ast.iter_child_nodes(node) if isinstance(n, (ast.stmt, ast.ExceptHandler))]
        nodes += [(name, n) for n in reversed(inner)]  # expressions have no docstrings; the last is taken first
