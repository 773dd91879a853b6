"""The built-in data set, from the interpreter that runs the tests."""

import time
from collections import Counter

import pytest

from fedsb.data import python_docs
from fedsb.utils.errors import UserError


@pytest.fixture(scope="module")
def rows():
    return python_docs.rows()


def test_size_and_shape(rows):
    train, test = rows
    assert 5_000 < len(train) + len(test) < 10_000
    assert 0.1 < len(test) / (len(train) + len(test)) < 0.2
    assert all(row.keys() == {"text", "label", "client", "module", "prompt", "answer"} for row in train + test)
    assert all(row["prompt"].startswith(f"What is `{row['module']}") and row["answer"] for row in train + test)
    assert all(len(row["text"]) >= 20 and row["text"] == row["text"].strip() for row in train + test)
    texts = [row["text"] for row in train + test]
    assert len(texts) == len(set(texts))


def test_a_known_docstring(rows):
    (row,) = [row for row in rows[1] if row["module"] == "textwrap" and row["text"].startswith("Fill a single")]
    assert row["text"].splitlines()[0] == "Fill a single paragraph of text, returning a new string."
    assert (row["label"], row["client"]) == ("text", "test")


def test_eight_uneven_clients_and_a_test_on_other_modules(rows):
    train, test = rows
    sizes = Counter(row["client"] for row in train)
    assert len(sizes) == 8
    assert 2 < max(sizes.values()) / min(sizes.values()) < 6
    areas = {row["label"] for row in train}
    assert areas == {row["label"] for row in test} == set(python_docs.MODULES)
    assert {row["client"] for row in test} == {"test"}
    assert not {row["module"] for row in train} & {row["module"] for row in test}
    by_client = {name: Counter(row["label"] for row in train if row["client"] == name) for name in sizes}
    for name, held in by_client.items():  # each has one area in plenty and little of another
        shares = [held[area] / sizes[name] for area in areas]
        assert max(shares) > 0.15 and min(shares) < 0.03, name


def test_each_module_is_named_once_and_none_is_forgotten():
    named = [m for held in python_docs.MODULES.values() for modules in held.values() for m in modules.split()]
    assert [module for module, times in Counter(named).items() if times > 1] == []
    assert not set(named) & set(python_docs.LEFT_OUT.split())
    root = python_docs.Path(python_docs.sysconfig.get_path("stdlib"))
    forgotten = {
        module
        for module, path in python_docs._modules(root)
        if python_docs._assignment(module) is None
        and any(len(text) >= 20 for _, text in python_docs.docstrings(path, module))
    }
    assert forgotten == set()


def test_docstrings_in_the_order_of_the_source(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text(
        '"""Module."""\nif True:\n    def f():\n        """F.\n\n        More.\n        """\n'
        'class C:\n    """C."""\n    async def g(self):\n        "G."\nx = "no docstring"\n'
    )
    assert list(python_docs.docstrings(path, "m")) == [
        ("m", "Module."),
        ("m.f", "F.\n\nMore."),
        ("m.C", "C."),
        ("m.C.g", "G."),
    ]


def test_quick_and_repeatable(rows):
    started = time.process_time()
    train, test = python_docs.tables()
    assert time.process_time() - started < 5
    assert (train.rows, test.rows) == rows
    assert train.fingerprint != test.fingerprint and train.origin.startswith("python-docs@3.")


def test_a_python_without_sources_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="has no sources of its library"):
        python_docs.rows()
