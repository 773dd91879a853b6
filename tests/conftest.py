"""Tiny random models with a real tokenizer, a tiny labelled text, and a run of a few seconds on them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from support.architectures import WORDS, write_rows

os.environ["OMP_NUM_THREADS"] = "1"  # tiny shapes; and runs in processes of their own must round alike
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

collect_ignore_glob = [] if find_spec("flwr") else ["deployment/*"]  # needs the extra `flower`

CLASSES = ("red", "blue", "green")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="write the golden traces of tests/laws anew")


def save_model(folder: Path, model: Any) -> Path:
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
    return save_model(tmp_path_factory.mktemp("tiny-bert"), BertModel(config))


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
    return save_model(tmp_path_factory.mktemp("tiny-llama"), LlamaForCausalLM(config))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS) + 3, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    return save_model(tmp_path_factory.mktemp("tiny-gpt2"), GPT2LMHeadModel(config))


@pytest.fixture(scope="session")
def tiny_deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3: the first block is dense, the second has experts and a shared expert."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=len(WORDS) + 3,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        moe_intermediate_size=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
        n_group=1,
        topk_group=1,
        initializer_range=0.2,
    )
    return save_model(tmp_path_factory.mktemp("tiny-deepseek"), DeepseekV3ForCausalLM(config))


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


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(train, test) files of labelled rows."""
    folder = tmp_path_factory.mktemp("tables")
    return write_rows(folder / "train.jsonl", labelled_rows(90, 0)), write_rows(
        folder / "test.jsonl", labelled_rows(40, 1)
    )


def tiny_settings(model: Path, tables: tuple[Path, Path], out: Path) -> dict[str, Any]:
    """A whole run of three clients, in a second or two."""
    return {
        "name": "tiny",
        "rounds": 3,
        "out": str(out),
        "model": {"name": str(model), "max_seq_length": 16},
        "data": {"train": str(tables[0]), "test": str(tables[1])},
        "task": {"kind": "classification"},
        "clients": {"partition": "column", "column": "client", "holdout_fraction": 0.2},
        "method": {"name": "fed-sb", "rank": 4},
        "basis": {"kind": "random", "share_samples": 6},
        "train": {"local_steps": 3, "batch_size": 4, "lr": 0.02},
    }


@pytest.fixture
def tiny_config(tiny_bert: Path, tables: tuple[Path, Path], tmp_path: Path) -> dict[str, Any]:
    return tiny_settings(tiny_bert, tables, tmp_path / "runs")


def set_all(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`set_all(config, method={"name": "fedit"}, rounds=2)`: a copy with sections replaced or values set."""
    return {**config, **changes}


def write_toml(path: Path, config: Mapping[str, Any]) -> Path:
    """Writes a configuration as a TOML file."""
    path.write_text(tomli_w.dumps(config))
    return path


def adapter_bytes(folder: Path) -> dict[str, bytes]:
    """What a finished run's adapter weighs in on, file by file."""
    files = sorted((folder / "adapter").rglob("*.safetensors"))
    assert files
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@dataclass(frozen=True)
class Said:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """`cli("run", path)`: the real command line, `main` and all, in this process. A traceback fails the test."""
    from fedsb.cli.app import main

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["fedsb", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Said(ended.value.code, captured.out, captured.err)

    monkeypatch.setenv("COLUMNS", "100")
    return run
