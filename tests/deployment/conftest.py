"""A real federation needs the extra `flower`: without it there is nothing to test here."""

from importlib.util import find_spec

if find_spec("flwr") is None:
    collect_ignore_glob = ["test_*.py"]
