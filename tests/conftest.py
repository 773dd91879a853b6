"""Tiny random models with a real tokenizer, a tiny labelled text, and a run of a few seconds on them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WORDS = [f"{kind}{i}" for kind in ("red", "blue", "green", "grey") for i in range(12)]
CLASSES = ("red", "blue", "green")


def _save(folder: Path, model: Any) -> Path:
    """A model folder with a word-level tokenizer over WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[EOS]", *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=64
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 3, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    return _save(tmp_path_factory.mktemp("tiny-bert"), BertModel(config))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    return _save(tmp_path_factory.mktemp("tiny-llama"), LlamaForCausalLM(config))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS) + 3, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    return _save(tmp_path_factory.mktemp("tiny-gpt2"), GPT2LMHeadModel(config))


def labelled_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts whose most frequent colour is their label, of three clients."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        label = CLASSES[int(draw.integers(3))]
        own = [word for word in WORDS if word.startswith(label)]
        words = [*draw.choice(own, size=int(draw.integers(3, 9))), *draw.choice(WORDS, size=3)]
        rows.append({"text": " ".join(words), "label": label, "client": f"site {i % 7 % 3}"})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(train, test) files of labelled rows."""
    folder = tmp_path_factory.mktemp("tables")
    return write_rows(folder / "train.jsonl", labelled_rows(90, 0)), write_rows(
        folder / "test.jsonl", labelled_rows(40, 1)
    )


@pytest.fixture
def tiny_config(tiny_bert: Path, tables: tuple[Path, Path], tmp_path: Path) -> dict[str, Any]:
    """A whole run of three clients, in a second or two."""
    return {
        "name": "tiny",
        "rounds": 3,
        "out": str(tmp_path / "runs"),
        "model": {"name": str(tiny_bert), "max_tokens": 16},
        "data": {"train": str(tables[0]), "test": str(tables[1])},
        "task": {"kind": "classification"},
        "clients": {"split": "column", "column": "client", "held_out": 0.2},
        "method": {"name": "fed-sb", "rank": 4},
        "basis": {"kind": "random", "share_samples": 6},
        "train": {"steps": 3, "batch_size": 4, "lr": 0.02},
    }


def set_all(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`set_all(config, method={"name": "fedit"}, rounds=2)`: a copy with sections replaced or values set."""
    return {**config, **changes}
