"""The run directory: atomic, locked, self-contained; a torn or foreign checkpoint or a full disk loses nothing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Said, adapter_bytes, set_all, tiny_settings, write_rows, write_toml
from fedsb.adapters.basis import basis_hash
from fedsb.config.load import load_config
from fedsb.methods.base import State
from fedsb.reporting.run_directory import read_manifest, read_rows
from fedsb.runs.record import Record
from fedsb.runs.run import Silent, federate, resume
from fedsb.server.replies import Replies
from fedsb.server.server import RoundResult
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.files import safe_name, write_atomic

SHARED = {"x.A": torch.arange(6.0).reshape(2, 3)}
MANIFEST = {"run": "abc", "config": {}, "origin": {}, "basis_hash": basis_hash(SHARED)}


def state_of(round: int) -> State:
    accepted = {"a/b": round} if round else {}
    return State(round=round, tensors={"x.R": torch.full((2, 2), float(round))}, shared=SHARED, accepted=accepted)


def result_of(round: int) -> RoundResult:
    return RoundResult(state=state_of(round), cohort=["a/b"], replies=Replies(), dropped=[], traffic=[])


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Record]:
    """A run with checkpoints of round 0, 1 and 2, the last two kept."""
    with Record.create(tmp_path / "run", MANIFEST) as record:
        record.start(state_of(0), [])
        for round in (1, 2):
            record.commit(result_of(round), {"round": round}, {"a/b": {"x": torch.ones(round)}}, keep=2)
        yield record


@pytest.fixture(scope="module")
def unbroken(tiny_bert: Path, tables: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_settings(tiny_bert, tables, tmp_path_factory.mktemp("unbroken"))
    return federate(load_config(config)).folder


def checkpoints(record: Record) -> list[str]:
    return sorted(path.name for path in (record.folder / "checkpoints").iterdir())


def test_a_state_is_read_as_it_was_written(record: Record) -> None:
    state = record.latest()
    assert state is not None and not record.skipped
    assert state.round == 2
    assert torch.equal(state.tensors["x.R"], torch.full((2, 2), 2.0))
    assert torch.equal(state.shared["x.A"], SHARED["x.A"])
    assert checkpoints(record) == ["round-0001", "round-0002"]
    assert state.accepted == {"a/b": 2}
    (own,) = record.client_states(state)["a/b"].items()
    assert own[0] == 2 and torch.equal(own[1]["x"], torch.ones(2))


def truncate(folder: Path) -> None:
    path = folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def foreign(folder: Path) -> None:
    facts = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**facts, "run": "another"}))


TORN = [
    pytest.param(truncate, "its sha256 differs", id="truncated"),
    pytest.param(flip, "its sha256 differs", id="a flipped bit"),
    pytest.param(foreign, "it is of the run 'another', this is 'abc'", id="foreign"),
    pytest.param(lambda folder: (folder / "state.safetensors").unlink(), "No such file", id="missing"),
    pytest.param(lambda folder: (folder / "state.json").write_text(""), "Expecting value", id="empty facts"),
    pytest.param(lambda folder: (folder / "state.json").write_text("[1]"), "list indices", id="other facts"),
    pytest.param(lambda folder: (folder / "state.json").write_text("{}"), "run", id="no facts"),
]


@pytest.mark.parametrize(("harm", "said"), TORN)
def test_a_torn_or_foreign_checkpoint_is_skipped_and_named(
    record: Record, harm: Callable[[Path], None], said: str
) -> None:
    harm(record.folder / "checkpoints" / "round-0002")
    state = record.latest()
    assert state is not None and state.round == 1
    (skipped,) = record.skipped
    assert skipped.startswith("checkpoint round-0002 was skipped: ") and said in skipped
    (own,) = record.client_states(state)["a/b"].items()
    assert own[0] == 1 and torch.equal(own[1]["x"], torch.ones(1))
    record.roll_back(state.round)
    assert record.rows("rounds.jsonl") == [{"round": 1}]
    assert [path.name for path in (record.folder / "clients").glob("*/*")] == ["round-0001.safetensors"]
    record.commit(result_of(2), {"round": 2}, {}, keep=2)
    assert checkpoints(record) == ["round-0001", "round-0002"]
    fresh = Record(record.folder, MANIFEST)
    assert fresh.latest() is not None and not fresh.skipped


def test_all_torn(record: Record) -> None:
    for name in ("round-0001", "round-0002"):
        truncate(record.folder / "checkpoints" / name)
    with pytest.raises(RunError, match=r"(?s)no checkpoint in .*run can be used:.*round-0002.*round-0001"):
        record.latest()
    assert checkpoints(record) == ["round-0001", "round-0002"]


def test_another_basis_is_noticed(record: Record) -> None:
    path = record.folder / "shared.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(RunError, match="the basis, is not the one that the run was started with"):
        record.latest()


def test_a_foreign_checkpoint_of_a_later_round_deletes_no_own_one(record: Record) -> None:
    """It is the first in the folder's order. If it were counted, the only good checkpoint would be deleted."""
    shutil.copytree(record.folder / "checkpoints" / "round-0002", record.folder / "checkpoints" / "round-0099")
    (record.folder / "checkpoints" / "round-notes").mkdir()
    record.checkpoint(state_of(3), keep=1)
    fresh = Record(record.folder, MANIFEST)
    state = fresh.latest()
    assert state is not None and state.round == 3
    assert "round-0099 was skipped: it was written as that of round 2" in fresh.skipped[0]


def test_the_remains_of_a_killed_run_are_deleted_and_nothing_else(record: Record) -> None:
    left = [
        record.folder / "checkpoints" / ".round-0003.17" / "state.json",
        record.folder / "adapter" / ".adapter_model.safetensors.17",
        record.folder / ".manifest.json.17",
    ]
    mine = record.folder / ".notes"
    for path in [*left, mine]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    with (record.folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3}\n{"round": 4, "lo')
    record.roll_back(2)
    assert not any(path.exists() for path in left) and mine.exists()
    assert [row["round"] for row in record.rows("rounds.jsonl")] == [1, 2]


def test_a_start_that_was_cut_off_counts_its_bytes_once(tmp_path: Path) -> None:
    """Killed between the ledger and the first checkpoint, the start is repeated; its basis is counted once."""
    from fedsb.protocol.traffic import TrafficRecord

    sent = [
        TrafficRecord(
            round=0, client="a", direction="up", kind="basis", values=1, head_values=0, bytes=4, wire_bytes=9
        ),
    ]
    with Record.create(tmp_path / "run", MANIFEST) as record:
        record.start(state_of(0), sent)
        record.start(state_of(0), sent)
        assert len(record.rows("traffic.jsonl")) == 1


def test_a_clients_state_that_cannot_be_read(record: Record) -> None:
    (path,) = (record.folder / "clients").glob("*/round-0002.safetensors")
    path.write_bytes(b"torn")
    with pytest.raises(RunError, match=r"what a client keeps between rounds, cannot be read"):
        record.client_states(record.latest())


def test_a_client_whose_update_was_not_used_keeps_its_state(record: Record) -> None:
    """Its state after a round is not written unless the round's update was used."""
    result = result_of(3)
    result = replace(result, state=replace(result.state, accepted={"a/b": 2}))
    record.commit(result, {"round": 3}, {"a/b": {"x": torch.ones(3)}}, keep=2)
    (own,) = record.client_states(record.latest())["a/b"].items()
    assert own[0] == 2 and torch.equal(own[1]["x"], torch.ones(2))


def test_the_lock(record: Record) -> None:
    with pytest.raises(UserError, match="in use by another fedsb process"):
        Record.open(record.folder)
    record.__exit__(None)
    Record.open(record.folder).__exit__(None)


def test_a_name_that_exists_is_refused(record: Record) -> None:
    before = (record.folder / "manifest.json").read_bytes()
    record.__exit__(None)
    with pytest.raises(UserError, match=r"contains an unfinished run\. Resume it with `fedsb resume"):
        Record.create(record.folder, {**MANIFEST, "run": "new"})
    assert (record.folder / "manifest.json").read_bytes() == before


def test_a_start_that_is_refused_leaves_the_folder_free(record: Record) -> None:
    """Also while the error is alive, which keeps its frames."""
    record.__exit__(None)
    with pytest.raises(UserError, match="contains an unfinished run") as error:
        Record.create(record.folder, {**MANIFEST, "run": "new"})
    Record.open(record.folder).__exit__(None)
    with Record.open(record.folder), pytest.raises(UserError, match="in use") as held:
        Record.open(record.folder)
    Record.open(record.folder).__exit__(None)
    assert error and held


def test_a_start_that_the_user_made_fail_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError), Record.create(tmp_path / "run", MANIFEST):
        raise UserError("rank")
    assert not (tmp_path / "run").exists()


def test_a_failed_start_in_a_folder_of_the_users_takes_only_its_own(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError), Record.create(tmp_path / "run", MANIFEST):
        raise UserError("rank")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_failure_after_the_first_checkpoint_deletes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError), Record.create(tmp_path / "run", MANIFEST) as record:
        record.start(state_of(0), [])
        raise UserError("later")
    assert (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize("folder", ["rows.csv", "rows.csv/run"])
def test_a_folder_that_cannot_be_made_is_the_users_to_change(tmp_path: Path, folder: str) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n")
    with pytest.raises(UserError, match=r"cannot make the run's folder .*rows.csv.* Choose another place: --set out="):
        Record.create(tmp_path / folder, MANIFEST)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is not a run directory"),
        ("", "cannot be read"),
        ("[]", "is not a JSON object"),
        ("{}", "is not the manifest of a fedsb run"),
    ],
)
def test_no_manifest_worth_the_name(tmp_path: Path, content: str | None, said: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(MANIFEST))
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        read_manifest(tmp_path / "run")
    assert content is not None or str(tmp_path / "other") in str(caught.value)


def test_a_ledger_with_a_torn_last_line(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").write_text('{"round": 1}\n{"round": 2')
    assert read_rows(tmp_path / "rounds.jsonl") == [{"round": 1}]
    assert read_rows(tmp_path / "missing.jsonl") == []


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def torn(path: Path, content: bytes, *, private: bool = False) -> None:
        path.write_bytes(content[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr("fedsb.utils.files.write", torn)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


HOSTILE = ["../x", "../../x", "/etc", "", ".", "..", "a/b", "a\\b", "a\nb", "x" * 5000, "[/]", "ü ß", "a_b", "\0", "🙂"]


def test_hostile_names_make_harmless_folders() -> None:
    names = [safe_name(client) for client in HOSTILE]
    assert len(set(names)) == len(HOSTILE)
    for name in names:
        assert name and Path(name).name == name and name not in (".", "..") and not name.startswith(".")
        assert len(name.encode()) < 250
    assert safe_name("site 0") == "site 0"


def test_hostile_client_names_round_trip(tiny_config: dict[str, Any], tables: Any, tmp_path: Path) -> None:
    """As values of the client column: a run whose clients keep state is stopped, resumed, and equals a whole run."""
    names = ["../x", "/etc", ".", "a/b", "[/red]:smile:"]
    rows = [json.loads(line) for line in tables[0].read_text().splitlines()]
    rows = [{**row, "client": names[i % len(names)]} for i, row in enumerate(rows)]
    config = set_all(
        tiny_config,
        data={"train": str(write_rows(tmp_path / "hostile.jsonl", rows))},
        method={"name": "local", "rank": 2},
        train={**tiny_config["train"], "persist_optimizer_state": True},
        rounds=2,
    )
    whole = federate(load_config(set_all(config, out=str(tmp_path / "whole"))))

    class Stop(Silent):
        def round(self, row: Any, rounds: int) -> None:
            raise KeyboardInterrupt

    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "runs")}
    with pytest.raises(KeyboardInterrupt):
        federate(load_config(config), Stop())
    broken = resume(tmp_path / "runs" / "tiny")
    assert adapter_bytes(broken.folder) == adapter_bytes(whole.folder)
    assert len(adapter_bytes(whole.folder)) == len(names)
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "runs")} == before
    assert [client["name"] for client in read_manifest(broken.folder)["clients"]] == names


# --- a folder that is deleted ---


@pytest.mark.parametrize("method", [{"name": "fed-sb", "rank": 4}, {"name": "fedsa-lora", "rank": 2}])
def test_a_folder_that_is_deleted_while_the_run_goes_on(
    cli: Callable[..., Said], tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    """No part of it is made again, and there is only one message."""
    folder, commit = tmp_path / "runs" / "tiny", Record.commit

    def deleted(self: Record, result: RoundResult, *arguments: Any, **options: Any) -> None:
        if result.state.round == 2:
            shutil.rmtree(self.folder)
        commit(self, result, *arguments, **options)

    monkeypatch.setattr(Record, "commit", deleted)
    said = cli("run", write_toml(tmp_path / "my.toml", set_all(tiny_config, method=method)))
    assert said.code == 2 and f"{folder} was deleted or moved during the run" in said.err
    assert f"{folder} does not exist. If it was deleted or moved during the run, start the run again." in said.err
    assert "kept" not in said.err and "room" not in said.err
    assert not folder.exists()


def test_a_folder_that_is_gone_is_not_a_full_disk(record: Record) -> None:
    shutil.rmtree(record.folder)
    with pytest.raises(RunError, match="was deleted or moved in the meantime") as said:
        record.append("rounds.jsonl", [{"round": 1}])
    assert "space" not in str(said.value) and "kept" not in str(said.value)


# --- a full disk ---


@contextmanager
def no_more_than(size: int) -> Iterator[None]:
    """Limits every file to `size` bytes, so that writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def check_refused(said: Said, folder: Path) -> None:
    assert said.code == 2
    assert "the disk is full" in said.err and "Traceback" not in said.err
    if (folder / "manifest.json").exists():
        assert f"fedsb resume {folder}" in said.err
    else:
        assert f"{folder} does not exist. If it was deleted or moved during the run, start the run again." in said.err


@pytest.mark.parametrize("room", [4, 40, 80, 112])
def test_a_full_disk(
    small_disk: Path, room: int, cli: Callable[..., Said], tiny_config: dict[str, Any], tmp_path: Path, unbroken: Path
) -> None:
    """Full at four places of the run; with free space, it resumes to the same adapter."""
    toml = write_toml(tmp_path / "tiny.toml", set_all(tiny_config, out=str(small_disk)))
    folder = small_disk / "tiny"
    filler = small_disk / "filler"
    filler.write_bytes(bytes((1024 - room) << 10))
    check_refused(cli("run", toml), folder)
    assert not list(folder.rglob(".*")), "a temporary file takes room on a full disk"
    filler.unlink()
    said = cli("resume", folder) if (folder / "manifest.json").exists() else cli("run", toml)
    assert said.code == 0, said.err
    assert adapter_bytes(folder) == adapter_bytes(unbroken)


@pytest.mark.parametrize("size", [1000, 20_000, 30_000])
def test_a_file_that_cannot_grow(
    size: int, cli: Callable[..., Said], tiny_config: dict[str, Any], tmp_path: Path, unbroken: Path
) -> None:
    toml = write_toml(tmp_path / "tiny.toml", tiny_config)
    folder = tmp_path / "runs" / "tiny"
    with no_more_than(size):
        said = cli("run", toml)
    check_refused(said, folder)
    said = cli("resume", folder) if (folder / "manifest.json").exists() else cli("run", toml)
    assert said.code == 0, said.err
    assert adapter_bytes(folder) == adapter_bytes(unbroken)
