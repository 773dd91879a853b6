"""The federation of faults.py and scale.py: a tiny random BERT, toy labelled texts, and sites with some rows each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsb.channels.serialized import SerializedChannel
from fedsb.client.handler import SiteHandler
from fedsb.client.policy import SiteConfig
from fedsb.client.secure_sum import Identity
from fedsb.config.schema import Config
from fedsb.methods.base import Method
from fedsb.protocol.channel import Handle, NoResponse
from fedsb.server.opened import OpenedFederation, open_sites
from fedsb.utils.errors import RunError, UserError

WORDS = [f"{kind}{i}" for kind in ("red", "blue", "green", "grey") for i in range(12)]
CLASSES = ("red", "blue", "green")


def make_model(folder: Path, width: int = 32, layers: int = 2) -> Path:
    """Saves a random BERT with a word-level tokenizer over WORDS. It depends on the shape only."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 3 * width // 2, "num_hidden_layers": layers}
    BertModel(BertConfig(vocab_size=len(words), num_attention_heads=2, **shape)).save_pretrained(folder)
    return folder


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Texts whose most frequent colour is their label."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        label = CLASSES[int(draw.integers(3))]
        own = [word for word in WORDS if word.startswith(label)]
        words = [*draw.choice(own, size=int(draw.integers(3, 9))), *draw.choice(WORDS, size=3)]
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_toml(path: Path, settings: Mapping[str, Any]) -> Path:
    """Writes a configuration as a TOML file: its values first, then its sections."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if not isinstance(value, dict)]
    for section, values in settings.items():
        if isinstance(values, dict):
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def settings(model: Path, test: Path, **more: Any) -> dict[str, Any]:
    """Returns the configuration of a run of Fed-SB. `more` replaces values and adds to sections."""
    config: dict[str, Any] = {
        "name": "run",
        "rounds": 4,
        "engine": {"name": "flower"},
        "model": {"name": str(model), "max_seq_length": 16},
        "data": {"train": "each site's own", "test": str(test)},
        "task": {"kind": "classification"},
        "clients": {"holdout_fraction": 0.2},
        "method": {"name": "fed-sb", "rank": 8},
        "basis": {"kind": "weights", "share_samples": 0},
        "train": {"local_steps": 12, "batch_size": 8, "lr": 0.01},
        "eval": {"every": 100},
    }
    for key, value in more.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return config


class OneProcess:
    """Real sites with folders of their own, called one after another: the same messages, and no network."""

    def __init__(self, folder: Path, rows: Mapping[str, Sequence[Mapping[str, str]]], resident: bool = True) -> None:
        """Creates the sites. Without `resident`, each request reads its site from its folder: one model in memory."""
        self.folder, self.resident = folder, resident
        self.keys = {name: Ed25519PrivateKey.generate() for name in rows}
        self.directory = {name: key.public_key().public_bytes_raw() for name, key in self.keys.items()}
        for name, own in rows.items():
            write_rows(folder / name / "rows.jsonl", own)
        self.handles: dict[str, Handle] = {name: self.open(name) for name in rows} if resident else {}
        self.absent: set[tuple[str, str, int]] = set()  # (site, verb, round) that get no answer

    def open(self, name: str) -> SiteHandler:
        site = SiteConfig.model_validate({"data": str(self.folder / name / "rows.jsonl")})
        return SiteHandler(self.folder / name, site, Identity(name=name, key=self.keys[name], directory=self.directory))

    @property
    def sites(self) -> Sequence[str]:
        return sorted(self.keys)

    def ask(
        self, requests: Mapping[str, bytes], timeout_s: float | None = None
    ) -> Iterator[tuple[str, bytes | NoResponse]]:
        from spoil import verb_and_round

        for name, request in requests.items():
            if (name, *verb_and_round(request)) in self.absent:
                yield name, NoResponse("left out")
                continue
            try:
                yield name, (self.handles[name] if self.resident else self.open(name))(request)
            except (UserError, RunError) as error:
                yield name, NoResponse(str(error))

    def open_federation(self, config: Config, method: Method, run: str) -> OpenedFederation:
        return open_sites(config, method, run, SerializedChannel(self, "flower"), self.directory)
