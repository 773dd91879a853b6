"""A site's disk that is full for a while, and lines that were cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsb.client import store
from fedsb.client.outbox import Outbox
from fedsb.client.round import ClientView
from fedsb.config.load import load_config
from fedsb.privacy.ledger import Ledger, read_ledger
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.run import federate
from fedsb.utils.errors import DiskError
from laws.test_channels import federation, merged, remote_of

PRIVATE = {
    "privacy": {"unit": "example", "epsilon": 5.0, "clip_norm": 1.0, "delta": 1e-3},
    "clients": {"holdout_fraction": 0.0},
    "basis": {"share_samples": 0},
}


@pytest.mark.parametrize("what", ["store", "ledger"])
def test_a_full_disk_costs_a_site_the_round_and_no_more(
    what: str, tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ledger is closed when it cannot be written: the next round opens it again."""
    write, append = store.write_atomic, Ledger._append

    def full_store(path: Path, content: bytes) -> None:
        if what == "store" and "site 1" in str(path) and path.name == "round-0002.safetensors":
            raise DiskError("the disk is full")
        write(path, content)

    def full_ledger(self: Ledger, line: bytes) -> None:
        if what == "ledger" and "sites/site 1" in str(self.path) and b'"round": 2' in line:
            raise OSError(28, "no space left")
        append(self, line)

    monkeypatch.setattr(store, "write_atomic", full_store)
    monkeypatch.setattr(Ledger, "_append", full_ledger)
    sites = federation(tmp_path)
    config = load_config(merged(remote_of(tiny_config, {}), PRIVATE))
    folder = federate(config, open_federation=sites.open_federation).folder
    rows = read_rows(folder / "rounds.jsonl")
    assert [[drop["client"] for drop in row["dropped"]] for row in rows] == [[], ["site 1"], []]
    assert "DiskError at the site" in rows[1]["dropped"][0]["reason"]
    (own,) = (sites.folder / "site 1").glob("runs/*/privacy/*.jsonl")
    charged = [1, 2, 3] if what == "store" else [1, 3]
    assert [entry.round for entry in read_ledger(own)] == charged
    assert read_ledger(folder / "privacy" / own.name) == read_ledger(own)


def test_a_state_that_is_held_under_the_servers_hash_is_so_after_a_restart(tmp_path: Path) -> None:
    """As a site does whose own state differs by rounding."""
    view = ClientView({"a.A": torch.ones(2, 3)}, known_hash="the server's")
    store.DiskStore(tmp_path).save_start(view, 0)
    kept = store.DiskStore(tmp_path).view(0)
    assert kept is not None
    assert kept.hash == "the server's"
    assert torch.equal(kept.shared["a.A"], view.shared["a.A"])
    assert kept.updated({**kept.shared, "a.residual_A": torch.ones(1, 3)}).hash == "the server's"
    assert kept.updated({"a.A": torch.zeros(2, 3)}).hash != "the server's"


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.jsonl")
    outbox.note("look", b"x")
    with outbox.path.open("ab") as file:
        file.write(b'{"time": "2026-')
    outbox.note("round", b"y")
    first, torn, last = outbox.path.read_text().splitlines()
    assert (json.loads(first)["what"], torn, json.loads(last)["what"]) == ("look", '{"time": "2026-', "round")
