"""The ledger: on disk before it returns, whole after any crash, never reset, and enough to recompute epsilon."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsb.privacy.accounting import RELATION, Release, epsilon
from fedsb.privacy.ledger import Ledger, merged, read_ledger
from fedsb.utils.errors import RunError, UserError

STEP = Release(sigma=0.861, q=0.0128, count=46)
BASIS = Release(sigma=4.0, what="basis")
WHOSE = {"run": "f00d", "client": "site-a"}


def started(folder: Path) -> Ledger:
    return Ledger.create(folder / "ledger.jsonl", unit="example", **WHOSE)


def taken_up(path: Path) -> Ledger:
    return Ledger(path, **WHOSE)


def after(folder: Path, rounds: int) -> Path:
    """A closed ledger of a basis and so many rounds."""
    with started(folder) as ledger:
        ledger.charge(BASIS, round=0, clip=3.0)
        for round in range(1, rounds + 1):
            ledger.charge(STEP, round=round, clip=0.5)
    return ledger.path


def recomputed(path: Path, delta: float) -> float:
    """The ledger's epsilon by the file and dp-accounting alone."""
    import dp_accounting as dp

    accountant = dp.pld.PLDAccountant(value_discretization_interval=3e-4)
    for line in path.read_text().splitlines()[1:]:
        row = json.loads(line)
        event = dp.PoissonSampledDpEvent(row["q"], dp.GaussianDpEvent(row["sigma"]))
        accountant.compose(event, row["count"])
    return float(accountant.get_epsilon(delta))


def test_a_line_for_each_charge(tmp_path: Path) -> None:
    path = after(tmp_path, 2)
    header, *lines = (json.loads(line) for line in path.read_text().splitlines())
    assert header == {"ledger": 1, **WHOSE, "unit": "example", "relation": RELATION}
    assert [line.pop("time")[-6:] for line in lines] == ["+00:00"] * 3
    assert lines == [
        {**WHOSE, "round": 0, "what": "basis", "q": 1.0, "sigma": 4.0, "clip": 3.0, "count": 1},
        {**WHOSE, "round": 1, "what": "training", "q": 0.0128, "sigma": 0.861, "clip": 0.5, "count": 46},
        {**WHOSE, "round": 2, "what": "training", "q": 0.0128, "sigma": 0.861, "clip": 0.5, "count": 46},
    ]
    assert [entry.round for entry in read_ledger(path)] == [0, 1, 2]


def test_epsilon_is_recomputed_from_the_file_alone(tmp_path: Path) -> None:
    path = after(tmp_path, 6)
    with taken_up(path) as ledger:
        assert ledger.releases() == (BASIS, Release(sigma=0.861, q=0.0128, count=276))
        printed = ledger.epsilon(1e-5)
        assert ledger.epsilon(1e-5, "rdp") > printed
    assert printed == epsilon(merged(read_ledger(path)), 1e-5)
    assert 0 <= printed - recomputed(path, 1e-5) < 0.005


def test_nothing_charged_is_nothing_spent(tmp_path: Path) -> None:
    with started(tmp_path) as ledger:
        assert ledger.releases() == ()
        assert ledger.epsilon(1e-5) == 0
        ledger.charge(Release(sigma=0.0), round=1, clip=math.inf)
        assert ledger.epsilon(1e-5) == math.inf
    assert taken_up(ledger.path).epsilon(1e-5) == math.inf


def test_a_charge_is_on_the_disk_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced last is the whole line, through the file's own descriptor."""
    ledger = started(tmp_path)
    synced: list[tuple[bytes, Path]] = []
    sync = os.fsync

    def watched(descriptor: int) -> None:
        sync(descriptor)
        synced.append((ledger.path.read_bytes(), Path(f"/proc/self/fd/{descriptor}").readlink()))

    monkeypatch.setattr(os, "fsync", watched)
    for round in (1, 2):
        ledger.charge(STEP, round=round, clip=0.5)
        content, name = synced[-1]
        assert len(synced) == round
        assert content == ledger.path.read_bytes()
        assert content.endswith(b"\n") and content.count(b"\n") == round + 1
        assert name == ledger.path


def test_a_round_that_is_repeated_is_charged_again(tmp_path: Path) -> None:
    path = after(tmp_path, 3)
    with taken_up(path) as ledger:
        ledger.charge(STEP, round=3, clip=0.5)
        assert ledger.releases() == (BASIS, Release(sigma=0.861, q=0.0128, count=4 * 46))
    assert [entry.round for entry in read_ledger(path)] == [0, 1, 2, 3, 3]


def test_cut_off_at_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is left, whole lines count, a torn one does not, and the next charge stands on a line of its own."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    content = after(tmp_path, 2).read_bytes()
    ends = [at for at in range(len(content)) if content[at : at + 1] == b"\n"]
    path = tmp_path / "cut.jsonl"
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = sum(end <= size for end in ends) - 1  # a line that lacks only its newline is whole
        if whole < 0:
            with pytest.raises(RunError, match="cannot read line 1"):
                taken_up(path)
            with pytest.raises(RunError, match="cannot read line 1"):
                read_ledger(path)
            assert path.read_bytes() == content[:size]
            continue
        assert len(read_ledger(path)) == whole
        assert path.read_bytes() == content[:size]
        with taken_up(path) as ledger:
            assert path.read_bytes() == content[: ends[whole] + 1]
            ledger.charge(STEP, round=9, clip=0.5)
        assert [entry.round for entry in read_ledger(path)] == [*range(whole), 9]


def test_a_torn_line_of_zeros(tmp_path: Path) -> None:
    """Some file systems lengthen a file before its content is there."""
    path = after(tmp_path, 2)
    with path.open("ab") as file:
        file.write(bytes(40))
    assert len(read_ledger(path)) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": 1.5}, "q = 1.5"),
        ({"q": math.nan}, "q = nan"),
        ({"sigma": -1.0}, "sigma = -1.0"),
        ({"sigma": "1.0"}, ""),
        ({"count": 0}, "0 releases"),
        ({"count": -46}, "-46 releases"),
        ({"count": 1.5}, "count = 1.5"),
        ({"clip": 0.0}, "clip = 0.0"),
        ({"round": None}, "round = None"),
        ({"client": "site-b"}, "it belongs to 'site-b' in run f00d"),
        ({"run": "beef"}, "it belongs to 'site-a' in run beef"),
        ({"refund": True}, "refund"),
    ],
)
def test_a_line_that_cannot_be_is_an_error(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = after(tmp_path, 3)
    lines = path.read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), **changes})
    broken = "\n".join(lines) + "\n"
    path.write_text(broken)
    for attempt in (taken_up, read_ledger):
        with pytest.raises(RunError, match=f"cannot read line 3 .*{words}.*never recreates it"):
            attempt(path)
    assert path.read_text() == broken


@pytest.mark.parametrize("line", ["", "{", "[]", "3", "\x00\x00", '{"run": "f00d"}'])
def test_a_line_that_is_none_is_an_error(tmp_path: Path, line: str) -> None:
    path = after(tmp_path, 3)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], line, *lines[3:], ""]))
    with pytest.raises(RunError, match="cannot read line 4"):
        taken_up(path)


@pytest.mark.parametrize("header", ["", "{}", '{"ledger": 2, "run": "f00d", "client": "site-a"}', '{"ledger": 1}'])
def test_a_header_that_is_none_is_an_error(tmp_path: Path, header: str) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text(header + "\n")
    with pytest.raises(RunError, match="cannot read line 1"):
        taken_up(path)


def test_it_is_of_one_run_and_one_client(tmp_path: Path) -> None:
    path = after(tmp_path, 1)
    for other in ({**WHOSE, "run": "beef"}, {**WHOSE, "client": "site-b"}):
        with pytest.raises(UserError, match="is the ledger of 'site-a' in run f00d, not of"):
            Ledger(path, **other)


def test_it_is_never_started_anew(tmp_path: Path) -> None:
    path = after(tmp_path, 1)
    content = path.read_bytes()
    with pytest.raises(UserError, match="already exists"):
        started(tmp_path)
    assert path.read_bytes() == content
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        taken_up(path)
    with pytest.raises(RunError, match="cannot read the ledger"):
        read_ledger(path)
    assert not path.exists()


def test_one_process_holds_it(tmp_path: Path) -> None:
    with started(tmp_path) as ledger, pytest.raises(UserError, match="in use by another process"):
        taken_up(ledger.path)
    taken_up(ledger.path).close()


def test_deleted_while_the_run_goes_on(tmp_path: Path) -> None:
    ledger = started(tmp_path)
    ledger.path.rename(tmp_path / "elsewhere")
    ledger.charge(STEP, round=1, clip=0.5)  # still on the disk
    (tmp_path / "elsewhere").unlink()
    with pytest.raises(RunError, match="was deleted or replaced"):
        ledger.charge(STEP, round=2, clip=0.5)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A charge that failed is an error, as is every later one; what it left counts when the file is taken up again."""
    ledger = started(tmp_path)
    ledger.charge(STEP, round=1, clip=0.5)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="the disk is full"):
            ledger.charge(STEP, round=2, clip=0.5)
    with pytest.raises(RunError, match="is closed"):
        ledger.charge(STEP, round=2, clip=0.5)
    with taken_up(ledger.path) as again:
        assert again.releases() == (Release(sigma=0.861, q=0.0128, count=92),)


def test_a_disk_that_takes_a_few_bytes_at_a_time(tmp_path: Path) -> None:
    class Slow:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            return int(self.file.write(bytes(data[:7])))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    ledger = started(tmp_path)
    ledger._file = Slow(ledger._file)  # type: ignore[assignment]
    ledger.charge(STEP, round=1, clip=0.5)
    assert [entry.count for entry in read_ledger(ledger.path)] == [46]


def test_alike_releases_become_one(tmp_path: Path) -> None:
    with started(tmp_path) as ledger:
        for release in (BASIS, STEP, Release(sigma=0.9, q=0.0128), BASIS, STEP):
            ledger.charge(release, round=1, clip=1.0)
        assert ledger.releases() == (
            Release(sigma=4.0, count=2, what="basis"),
            Release(sigma=0.861, q=0.0128, count=92),
            Release(sigma=0.9, q=0.0128),
        )


def test_a_copy_has_every_line_once(tmp_path: Path) -> None:
    """Also of equal lines: a round that was charged twice in one second."""
    entry = read_ledger(after(tmp_path, 1))
    with Ledger.create(tmp_path / "copy.jsonl", unit="example", **WHOSE) as copy:
        for own in (entry[:1], entry, entry, [*entry, entry[-1]], [*entry, entry[-1]]):
            copy.copy(own)
            assert read_ledger(copy.path) == tuple(own)
        assert copy.releases() == merged(own)
        with pytest.raises(ValueError, match="it belongs to 'site-b'"):
            copy.copy([replace(entry[0], client="site-b")])
    assert read_ledger(copy.path) == tuple(own)


def test_names_with_anything_in_them(tmp_path: Path) -> None:
    whose = {"run": "r", "client": 'Sankt "Anna"\n\udcff {}'}
    with Ledger.create(tmp_path / "ledger.jsonl", unit="client", **whose) as ledger:
        ledger.charge(STEP, round=1, clip=1.0)
    with Ledger(ledger.path, **whose) as ledger:
        assert len(ledger.releases()) == 1
