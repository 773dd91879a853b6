"""The loop of a run: a client with a bad update misses that round, and nothing else changes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Said, adapter_bytes, set_all, write_toml
from fedsb.channels.in_process import InProcessChannel
from fedsb.config.load import load_config
from fedsb.config.schema import Config
from fedsb.protocol import schedule
from fedsb.protocol.messages import TrainReply
from fedsb.protocol.payload import pack, unpack
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.run import federate, resume
from fedsb.utils.errors import ConfigError, UserError

BAD_CLIENT, BAD_ROUND = "site 1", 1  # the second round


def with_nan(data: bytes) -> bytes:
    payload = unpack(data)
    vector = payload.vector.copy()
    vector[0] = np.nan
    return pack(dataclasses.replace(payload, vector=vector))


def of_another_run(data: bytes) -> bytes:
    return pack(dataclasses.replace(unpack(data), run="elsewhere"))


def spoil(monkeypatch: pytest.MonkeyPatch, harm: Callable[[bytes], bytes]) -> None:
    """In the second round, one client's update goes through `harm`."""
    exchange = InProcessChannel.exchange

    def harmed(self: InProcessChannel, requests: Any, timeout_s: float | None = None) -> Any:
        for name, reply in exchange(self, requests, timeout_s):
            bad = isinstance(reply, TrainReply) and unpack(reply.payload).round == BAD_ROUND and name == BAD_CLIENT
            yield name, reply.model_copy(update={"parts": (harm(reply.payload),)}) if bad else reply

    monkeypatch.setattr(InProcessChannel, "exchange", harmed)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        pytest.param(with_nan, "contains 1 values that are NaN or infinite", id="nan"),
        pytest.param(of_another_run, "its run is 'elsewhere'", id="another run"),
        pytest.param(lambda data: data[:100], "Not a payload of fedsb", id="torn"),
        pytest.param(lambda data: b"", "Not a payload of fedsb", id="nothing"),
    ],
)
@pytest.mark.parametrize("method", [{"name": "fed-sb", "rank": 4}, {"name": "fedit", "rank": 2}])
def test_a_client_with_a_bad_update_misses_the_round(
    tiny_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: dict[str, Any],
    harm: Callable[[bytes], bytes],
    said: str,
) -> None:
    """It is named with its reason, and the run ends bit for bit as one in which it was not in that round."""
    config = set_all(tiny_config, method=method, engine={"clients_per_forward": 1})

    sample = schedule.sample

    def without(names: Sequence[str], round: int, settings: Config) -> list[str]:
        return [name for name in sample(names, round, settings) if (name, round) != (BAD_CLIENT, BAD_ROUND)]

    with monkeypatch.context() as patch:
        patch.setattr(schedule, "sample", without)
        wanted = federate(load_config(set_all(config, out=str(tmp_path / "without"))))
    spoil(monkeypatch, harm)
    got = federate(load_config(set_all(config, out=str(tmp_path / "with"))))

    assert adapter_bytes(got.folder) == adapter_bytes(wanted.folder)
    rows, others = (read_rows(result.folder / "rounds.jsonl") for result in (got, wanted))
    assert [row["dropped"] for row in rows if row["round"] != BAD_ROUND + 1] == [[], []]
    (dropped,) = rows[BAD_ROUND]["dropped"]
    assert dropped["client"] == BAD_CLIENT and said in dropped["reason"]
    assert BAD_CLIENT in rows[BAD_ROUND]["cohort"] and BAD_CLIENT not in others[BAD_ROUND]["cohort"]
    assert [row["score"] for row in rows] == [row["score"] for row in others]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in others], rel=1e-12)
    assert BAD_CLIENT in (got.folder / "report.html").read_text()


def test_too_few_good_updates_stop_the_run_and_it_can_be_resumed(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Said]
) -> None:
    config = set_all(tiny_config, server={"min_clients": 3})
    whole = federate(load_config(set_all(config, out=str(tmp_path / "whole"))))
    folder = tmp_path / "runs" / "tiny"
    with monkeypatch.context() as patch:
        spoil(patch, with_nan)
        said = cli("run", write_toml(tmp_path / "tiny.toml", config))
    assert said.code == 2
    assert "Round 2 has 2 good updates, but server.min_clients = 3 (site 1: " in said.err
    assert f"fedsb resume {folder}\n" in said.err
    assert [row["round"] for row in read_rows(folder / "rounds.jsonl")] == [1]
    assert cli("resume", folder).code == 0
    assert adapter_bytes(folder) == adapter_bytes(whole.folder)


def test_the_table_shows_which_client_was_dropped_and_why(
    tiny_config: dict[str, Any], tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Said]
) -> None:
    """Names are shown unchanged, although the terminal's library has a markup of its own."""
    rows = [json.loads(line) for line in tables[0].read_text().splitlines()]
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({**row, "client": f"[/b] {row['client']}"}) + "\n" for row in rows))
    monkeypatch.setattr("test_run.BAD_CLIENT", "[/b] site 1")
    spoil(monkeypatch, of_another_run)
    said = cli("run", write_toml(tmp_path / "tiny.toml", set_all(tiny_config, data={"train": str(train)})))
    assert said.code == 0, said.err
    assert "dropped [/b] site 1: its run is 'elsewhere'" in said.out


def test_a_resume_on_another_base_model_is_refused(
    tiny_config: dict[str, Any], tiny_bert: Path, tmp_path: Path
) -> None:
    """One weight of the base retrained in place between two rounds."""
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_bert, base)
    config = set_all(tiny_config, model={"name": str(base), "max_seq_length": 16}, rounds=1)
    done = federate(load_config(config))
    tensors = load_file(base / "model.safetensors")
    key = next(key for key in tensors if key.endswith("query.weight"))
    save_file({**tensors, key: tensors[key] + 1}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="has changed since the run was started"):
        resume(done.folder)


def test_a_run_keeps_the_dtype_that_its_first_device_chose(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be resumed where "auto" would mean another dtype, and with the TOML that says "auto"."""
    config = load_config(set_all(tiny_config, rounds=2))
    assert config.config.model.dtype == "auto"
    whole = federate(dataclasses.replace(config, config=config.config.model_copy(update={"name": "whole"})))
    done = federate(config)
    assert json.loads((done.folder / "manifest.json").read_text())["config"]["model"]["dtype"] == "float32"
    shutil.rmtree(done.folder / "checkpoints" / "round-0002")
    monkeypatch.setattr("fedsb.runs.run.choose_dtype", lambda *_: (torch.bfloat16, "a GPU"))
    resumed = resume(done.folder, changed=config)
    assert adapter_bytes(resumed.folder) == adapter_bytes(whole.folder)


def test_float16_is_not_trained(tiny_config: dict[str, Any]) -> None:
    model = {**tiny_config["model"], "dtype": "float16"}
    with pytest.raises(UserError, match="'float16' cannot be trained"):
        federate(load_config(set_all(tiny_config, model=model)))


def test_a_resume_whose_federation_does_not_open_releases_the_lock(tiny_config: dict[str, Any]) -> None:
    """Also while the error is alive, as a notebook keeps the last one."""
    done = federate(load_config(set_all(tiny_config, rounds=1)))

    def fails(config: Config, method: Any, run: str) -> Any:
        raise UserError("the rows are gone")

    errors = []
    for _ in range(2):
        with pytest.raises(UserError, match="the rows are gone") as caught:
            resume(done.folder, open_federation=fails)
        errors.append(caught)
    assert resume(done.folder).folder == done.folder


def test_the_local_to_global_gap(tiny_config: dict[str, Any]) -> None:
    """Both scores are on the clients' held-out rows; the last global one is the mean of those in result.json."""
    finished = federate(load_config(set_all(tiny_config, eval={"every": 2, "gap": True})))
    rows = read_rows(finished.folder / "rounds.jsonl")
    assert ["local_score" in row for row in rows] == [False, True, True]
    clients = json.loads((finished.folder / "result.json").read_text())["clients"]
    assert rows[-1]["global_score"] == pytest.approx(sum(c["score"] for c in clients) / len(clients))
    assert 0 <= rows[-1]["local_score"] <= 1
    with pytest.raises(ConfigError, match=r"Set clients\.holdout_fraction"):
        load_config(set_all(tiny_config, eval={"gap": True}, clients={"partition": "iid", "count": 3}))


def test_flora_na_logs_its_errors(tiny_config: dict[str, Any]) -> None:
    finished = federate(load_config(set_all(tiny_config, method={"name": "flora-na", "rank": 2})))
    for row in read_rows(finished.folder / "rounds.jsonl"):
        assert 0 < row["error_best_rank_r"] <= row["error_flora_na"] <= row["error_fedit"] < 1
