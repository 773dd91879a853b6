"""The report of small runs written by hand: 2 clients, 2 rounds, a basis; a message holds 10 values, 4 of the head."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedsb.reporting import charts
from fedsb.reporting.report import RunFiles, summary, write_report
from fedsb.utils import formatting
from fedsb.utils.errors import UserError

NAMES = ("site-a", "site-b")
HOSTILE = "<script>alert('x')</script>\"&"
VOID = {"meta", "br"}


def price(label: str, up: int, *, this_run: bool = False) -> dict[str, Any]:
    sizes = {"one_off_bytes": 200, "up_bytes": up, "down_bytes": 2 * up, "total_bytes": 200 + 3 * up}
    return {"label": label, "this_run": this_run, **sizes, "total_bytes_without_head": 7}


def manifest(**changes: Any) -> dict[str, Any]:
    return {
        "fedsb": "0.1.0",
        "name": "quickstart",
        "created": "2026-11-21T03:00:00Z",
        "settings": [{"key": "method.rank", "value": 32, "reason": "my.toml"}],
        "versions": {"python": "3.11.7"},
        "git": None,
        "seed": 0,
        "model": {"name": "minilm", "path": "/m", "parameters": 1000, "adapted_layers": 36, "trained_values": 10},
        "data": {"train": {"origin": "built-in", "rows": 50, "fingerprint": "sha256:ab"}, "test": None},
        "task": {"kind": "classification", "metric": "accuracy", "higher_is_better": True, "label_names": ["X", "Y"]},
        "clients": [
            {"name": "site-a", "rows": 40, "held_out_rows": 4, "labels": {"X": 36, "Y": 4}, "unseen": False},
            {"name": "site-b", "rows": 10, "held_out_rows": 1, "labels": {"Y": 10}, "unseen": True},
        ],
        "method": {"id": "fed-sb", "paper": "Fed-SB, arXiv 2502.15436", "travels": "R"},
        "basis": {
            "kind": "core",
            "looks_at": "private data",
            "up": 0,
            "down": 25,
            "captured_share": 0.125,
            "seconds": 0.4,
            "peak_memory_bytes": 2048,
        },
        "prices": [
            price("fed-sb (rank 32)", 100, this_run=True),
            price("fedit (rank 4)", 900),
            price("flora (rank 4)", 2000),
        ],
        "before": {"score": 0.1, "majority": 0.25},
        "rounds": 2,
        "not_private": "no privacy plan in this run",
    } | changes


def message(round_: int, client: str, direction: str) -> dict[str, Any]:
    if round_ == 0:
        kind, values, head, envelope = "basis", 25, 0, 10
    else:
        kind, values, head, envelope = "round", 10, 4, 10
    sizes = {"values": values, "head_values": head, "bytes": 4 * values, "wire_bytes": 4 * values + envelope}
    return {"round": round_, "client": client, "direction": direction, "kind": kind, **sizes}


TRAFFIC = [
    *(message(0, name, "down") for name in NAMES),
    *(message(1, name, way) for name in NAMES for way in ("down", "up")),
    *(message(2, "site-a", way) for way in ("down", "up")),
]
ROUNDS: list[dict[str, Any]] = [
    {"round": 1, "loss": 1.5, "score": 0.5, "cohort": NAMES, "dropped": [], "seconds": 40},
    {
        "round": 2,
        "loss": 0.5,
        "score": 0.75,
        "cohort": ["site-a"],
        "dropped": [{"client": "site-b", "reason": "holds NaN"}],
        "seconds": 50,
    },
]
RESULT = {
    "score": 0.75,
    "loss": 0.5,
    "clients": [
        {"name": "site-a", "score": 0.9, "rows": 4, "rounds": 2, "unseen": False},
        {"name": "site-b", "score": 0.5, "rows": 1, "rounds": 0, "unseen": True},
    ],
    "adapter": "runs/quickstart/adapter",
    "load": "model = PeftModel.from_pretrained(base, 'runs/quickstart/adapter')",
}


def write_run(
    path: Path,
    *,
    about: dict[str, Any],
    rounds: list[dict[str, Any]] = ROUNDS,
    traffic: list[dict[str, Any]] = TRAFFIC,
    result: dict[str, Any] | None = RESULT,
) -> Path:
    (path / "manifest.json").write_text(json.dumps(about))
    (path / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rounds))
    (path / "traffic.jsonl").write_text("".join(json.dumps(row) + "\n" for row in traffic))
    if result is not None:
        (path / "result.json").write_text(json.dumps(result))
    return path


class Page(HTMLParser):
    """Fails on tags that do not close; collects headings, text, and every table row as a list of cells."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open += [] if tag in VOID else [tag]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if "h2" in self.open:
            self.headings.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data.replace(formatting.GLUE, " ")

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row[0].startswith(name))


def test_headline_by_hand(tmp_path: Path) -> None:
    found = summary(write_run(tmp_path, about=manifest()))
    assert found["bytes"] == {
        "federation": {
            "with_head": {"one_off": 200, "up": 120, "down": 120, "total": 440},
            "without_head": {"one_off": 200, "up": 72, "down": 72, "total": 344},
            "wire": {"one_off": 220, "up": 150, "down": 150, "total": 520},
        },
        "per_client": {
            "with_head": {"one_off": 100, "up": 60, "down": 60, "total": 220},
            "without_head": {"one_off": 100, "up": 36, "down": 36, "total": 172},
            "wire": {"one_off": 110, "up": 75, "down": 75, "total": 260},
        },
    }
    assert (found["finished"], found["rounds"], found["rounds_planned"]) == (True, 2, 2)
    assert (found["score"], found["before"], found["majority"]) == (0.75, 0.1, 0.25)


def test_every_section_with_its_numbers(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path, about=manifest())))
    assert page.headings == [
        "Score and loss by round",
        "Bytes sent",
        "Bytes of other methods",
        "Scores by client",
        "Rows by client and label",
        "Dropped updates",
        "Method and basis",
        "Load the adapter",
        "Settings",
        "Versions and data",
    ]
    assert page.row("All clients")[1:] == ["200 B", "120 B", "120 B", "440 B"]
    assert page.row("fedit") == ["fedit (rank 4)", "2.90 kB", "5.80 ×", "200 B", "900 B", "1.80 kB", "7 B"]
    assert page.row("Never took part") == ["Never took part", "1", *["50.0 %"] * 4, "0.0 points"]
    assert ["site-b", "holds NaN", "2"] in page.rows
    assert ["site-a", "40", "4", "36", "4"] in page.rows
    text = page.source.replace(formatting.GLUE, " ")
    assert "50.0 points above the majority class (25.0 %)" in text
    assert "65.0 points above the model before federation (10.0 %)" in text
    assert "FedIT would have sent 2.90 kB, 5.80 times as many" in text
    assert "The rounds took 1 min 30 s." in text
    assert "12.5 % of its squared norm" in text


def test_nothing_is_loaded_from_outside(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path, about=manifest())))
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "image", "use", "object"})
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\(|@import", page.source)
    assert [path.name for path in tmp_path.glob("*report*")] == ["report.html"]


def test_hostile_names_are_text(tmp_path: Path) -> None:
    about = manifest(name=HOSTILE, settings=[{"key": HOSTILE, "value": [HOSTILE], "reason": HOSTILE}])
    for client in about["clients"]:
        client.update(name=HOSTILE + client["name"], labels={HOSTILE: client["rows"]})
    clients = [{**client, "name": HOSTILE} for client in RESULT["clients"]]  # type: ignore[attr-defined]
    rounds = [{**ROUNDS[0], "dropped": [{"client": HOSTILE, "reason": HOSTILE}]}]
    page = Page(
        write_report(
            write_run(tmp_path, about=about, rounds=rounds, result={**RESULT, "clients": clients, "load": HOSTILE})
        )
    )
    assert "script" not in page.tags and "<script" not in page.source
    assert [HOSTILE, HOSTILE, "1"] in page.rows


def test_unfinished_run_with_gaps(tmp_path: Path) -> None:
    rounds = [
        {**ROUNDS[0], "round": r, "loss": loss, "score": None} for r, loss in ((1, 2.0), (2, float("nan")), (3, 1.0))
    ]
    write_run(tmp_path, about=manifest(rounds=9), rounds=rounds, result=None)
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"round": 4, "lo')  # torn by a kill
    found = summary(tmp_path)
    json.dumps(found, allow_nan=False)
    assert (found["finished"], found["rounds"], found["score"]) == (False, 3, None)
    page = Page(write_report(tmp_path))
    assert "after 3 of 9 rounds" in page.source
    assert "1 line of the run’s files could not be read" in page.source
    assert "The line has gaps where" in page.source
    assert "Load the adapter" not in page.headings and "Scores by client" not in page.headings
    assert "nan" not in page.source.lower()


def test_unfinished_score_is_the_last_one_known(tmp_path: Path) -> None:
    rounds = [ROUNDS[0], {**ROUNDS[1], "score": None}]
    assert summary(write_run(tmp_path, about=manifest(), rounds=rounds, result=None))["score"] == 0.5


@pytest.mark.parametrize("clients, labels", [(99, 40), (99, 0), (1, 1), (0, 0)])
def test_any_size_makes_a_page(tmp_path: Path, clients: int, labels: int) -> None:
    who = [
        {
            "name": f"c{i}",
            "rows": i,
            "held_out_rows": 0,
            "labels": {f"l{k}": i for k in range(labels)} or None,
            "unseen": False,
        }
        for i in range(clients)
    ]
    task = {"kind": "next_token", "metric": "nats_per_token", "higher_is_better": False, "label_names": None}
    scores = [{"name": f"c{i}", "score": 3.0, "rows": 1, "rounds": 1, "unseen": False} for i in range(clients)]
    about = manifest(clients=who, task=task, basis=None, prices=[], before={"score": 4.0, "majority": None}, rounds=1)
    run = write_run(
        tmp_path, about=about, rounds=ROUNDS[:1], traffic=[], result={**RESULT, "score": 3.0, "clients": scores}
    )
    page = Page(write_report(run))
    assert f"1.000{formatting.GLUE}nats/token below the model before" in page.source
    assert ("Rows by client and label" in page.headings) == (clients > 0)
    assert "Bytes sent" not in page.headings
    assert "Bytes of other methods" not in page.headings


def test_only_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "bare"}')
    assert Page(write_report(tmp_path)).headings == ["Versions and data"]


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_not_a_run_directory(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        write_report(tmp_path)


def test_numbers_as_text() -> None:
    sizes = [0, 999, 1000, 156696, 1_253_888, 15_000_000, 999_600_000, float("nan"), None]
    shown = [formatting.bytes_text(n).replace(formatting.GLUE, " ") for n in sizes]
    assert shown == ["0 B", "999 B", "1.00 kB", "157 kB", "1.25 MB", "15.0 MB", "1.00 GB", "–", "–"]
    assert [formatting.seconds_text(s).replace(formatting.GLUE, " ") for s in (0.41, 11.2, 90, 3660)] == [
        "0.41 s",
        "11 s",
        "1 min 30 s",
        "1 h 01 min",
    ]


def test_ticks_are_round_and_inside() -> None:
    axis = charts.Axis(low=0.0, high=10.0, start=0.0, end=100.0)
    assert axis.ticks(formatting.plain_text) == [(0.0, "0"), (50.0, "5"), (100.0, "10")]
    assert charts.Axis(low=1, high=3, start=0, end=100).ticks(formatting.plain_text, least_step=1) == [
        (0.0, "1"),
        (50.0, "2"),
        (100.0, "3"),
    ]


@pytest.mark.parametrize(
    ("rows", "result", "epsilon"),
    [
        ([], None, None),
        ([{"round": 1}], None, None),
        ([{"round": 1, "epsilon": 1.0}, {"round": 2, "epsilon": 2.0}], None, 2.0),
        ([{"round": 1, "epsilon": 2.0}], {"epsilon": 1.5}, 1.5),
        ([{"round": 1, "epsilon": 2.0}], {}, 2.0),  # of a version without it
        ([{"round": 1}], {"epsilon": None}, None),
    ],
)
def test_the_epsilon_of_a_finished_run_is_that_of_its_result(
    rows: list[dict[str, Any]], result: dict[str, Any] | None, epsilon: float | None
) -> None:
    """A row may state an upper bound."""
    assert RunFiles(manifest={}, rounds=rows, traffic=[], result=result, unreadable=0).epsilon == epsilon
