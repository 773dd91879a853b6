"""Law 8 over torch.distributed: the adapter does not depend on the number of processes that train the clients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from conftest import adapter_bytes, set_all, write_toml
from fedsb.channels import launch
from fedsb.config.load import load_config
from fedsb.privacy.ledger import read_ledger
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.run import federate
from fedsb.utils.errors import UserError
from laws.test_channels import merged
from support.server import open_server

METHODS: dict[str, dict[str, Any]] = {
    "fed-sb": {"method": {"name": "fed-sb", "rank": 4}, "basis": {"kind": "core", "samples": 20}},
    "flora": {"method": {"name": "flora", "rank": 2}, "server": {"clients_per_round": 2}},
    "moments": {"method": {"name": "fedit", "rank": 2}, "train": {"local_steps": 2, "persist_optimizer_state": True}},
    "ranks": {"method": {"name": "fed-sb", "rank": 4}, "clients": {"total_ranks": {"site 1": 2}}},
    "one-client": {
        "method": {"name": "fed-sb", "rank": 4},
        "clients": {"partition": "iid", "count": 1},
        "train": {"local_steps": 2, "batch_size": 3, "gradient_accumulation_steps": 5, "dropout": 0.1},
    },
    "central": {"method": {"name": "central", "rank": 2}, "train": {"batch_size": 2, "gradient_accumulation_steps": 2}},
    "secure": {"method": {"name": "fed-sb", "rank": 4}, "server": {"secure_aggregation": True}},
}


def start(ranks: int, *arguments: object) -> subprocess.Popen[str]:
    """Starts `fedsb` in so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "fedsb"]
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def torchrun(ranks: int, *arguments: object, fails: bool = False) -> str:
    """Runs `fedsb` in so many processes. Returns what they said."""
    process = start(ranks, *arguments)
    said, _ = process.communicate(timeout=300)
    assert (process.returncode != 0) == fails, said[-4000:]
    return said


SOME = ("fed-sb", "secure")  # in every test run; the others in `make test-long`


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SOME else pytest.mark.long) for n in METHODS])
def test_any_number_of_processes_makes_the_same_adapter(name: str, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    config = merged(set_all(tiny_config, rounds=2, engine={"clients_per_forward": 1}), METHODS[name])
    toml = write_toml(tmp_path / "run.toml", config)
    federate(load_config({**config, "name": "ranks-1"}))
    found = []
    for ranks in (1, 2, 3) if name in ("fed-sb", "one-client") else (1, 2):
        folder = Path(config["out"]) / f"ranks-{ranks}"
        if ranks > 1:
            torchrun(ranks, "run", toml, "--set", f"name={folder.name}")
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(folder / "rounds.jsonl")]
        found.append((adapter_bytes(folder), read_rows(folder / "traffic.jsonl"), rows))
    assert all(each[0] == found[0][0] for each in found)
    if name != "secure":  # keys, and so the bytes of their messages, are drawn for each run
        assert all(each[1:] == found[0][1:] for each in found)


def test_a_private_run_is_charged_at_rank_0(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    privacy = {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "clip_norm": 0.5}
    config = set_all(tiny_config, rounds=2, privacy=privacy, engine={"clients_per_forward": 1})
    torchrun(2, "run", write_toml(tmp_path / "run.toml", config))
    folder = Path(config["out"]) / "tiny"
    ledgers = sorted((folder / "privacy").glob("*.jsonl"))
    assert len(ledgers) == 3
    for ledger in ledgers:
        assert [entry.round for entry in read_ledger(ledger)] == [1, 2]
    assert json.loads((folder / "manifest.json").read_text())["privacy"]


def test_shares_of_one_noise_come_from_all_ranks(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """Every row is drawn, and the noise is a hundredth of the clip: the model is that of one process, up to it."""
    config = set_all(
        tiny_config,
        rounds=3,
        clients={"partition": "iid", "count": 3},
        train={"local_steps": 1, "batch_size": 30, "optimizer": "sgd", "lr": 1.0, "head_lr": 1.0},
        server={"secure_aggregation": True},
        privacy={"unit": "example", "noise_multiplier": 0.3, "delta": 1e-3, "clip_norm": 0.5},
        engine={"clients_per_forward": 1},
    )
    alone = federate(load_config({**config, "name": "ranks-1"})).folder
    torchrun(2, "run", write_toml(tmp_path / "run.toml", config), "--set", "name=ranks-2")
    together = alone.parent / "ranks-2"
    for ledger in sorted((together / "privacy").glob("*.jsonl")):
        entries = read_ledger(ledger)
        assert [entry.round for entry in entries] == [1, 2, 3] and entries[0].own_sigma is not None
    heads = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (alone, together)]
    noise = 3 * 0.3 * 0.5 / 90  # of the three steps' means
    for key, x in heads[0].items():
        if "classifier" in key:
            assert float((x - heads[1][key]).abs().max()) < 7 * noise < float(x.abs().max()), key


def test_a_loss_that_diverges_on_another_rank_ends_the_run(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    train = {"local_steps": 8, "batch_size": 4, "optimizer": "sgd", "lr": 1e30, "max_grad_norm": 1e9}
    config = set_all(tiny_config, train=train, engine={"clients_per_forward": 1})
    said = torchrun(2, "run", write_toml(tmp_path / "run.toml", config), fails=True)
    assert (
        "the loss of client 'site" in said
        and "became" in said
        and "Traceback" not in said.split("torch/distributed")[0]
    )


def pid_of_rank(rank: int, folder: Path) -> int | None:
    """Returns the process of a rank of a launch whose arguments name the folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, settings = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if str(folder).encode() in b" ".join(words) and f"RANK={rank}".encode() in settings:
            return int(process.name)
    return None


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the process of a rank in /proc")
def test_a_rank_that_is_killed_ends_all_and_the_run_resumes_with_another_number(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    config = set_all(tiny_config, rounds=30, engine={"clients_per_forward": 1})
    toml = write_toml(tmp_path / "run.toml", config)
    whole, cut = Path(config["out"]) / "whole", Path(config["out"]) / "cut"
    federate(load_config({**config, "name": "whole"}))
    process = start(2, "run", toml, "--set", "name=cut")
    deadline = time.monotonic() + 120
    while not (cut / "checkpoints" / "round-0002").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    pid = pid_of_rank(1, tmp_path)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode, said[-2000:]
    done = len(read_rows(cut / "rounds.jsonl"))
    assert 2 <= done < 30
    torchrun(3, "resume", cut)
    assert adapter_bytes(cut) == adapter_bytes(whole)


def test_ranks_with_other_rows_are_refused(tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_server(tiny_config).opened

    def gather(every: list[Any], own: dict[str, str]) -> None:
        every[:] = [own, {**own, "the train rows": "others"}]

    monkeypatch.setattr(launch.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(launch.dist, "all_gather_object", gather)
    with pytest.raises(UserError, match=r"Rank 1 differs from rank 0 in the train rows \(others.*same files"):
        launch.refuse_differences(opened)


def test_a_run_that_exists_is_refused_and_no_process_hangs(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    toml = write_toml(tmp_path / "run.toml", set_all(tiny_config, rounds=1))
    federate(load_config(toml))
    assert "contains a finished run" in torchrun(2, "run", toml, fails=True)
