"""The state of a folder, in every view, for each of the ways in which a deployment can be."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography")

from fedsb.deployment.federation import create_federation, revoke
from fedsb.deployment.join_file import store_join_file
from fedsb.deployment.monitoring import health, metrics, show, state_of
from fedsb.deployment.monitoring.web import open_web
from fedsb.utils.errors import UserError
from fedsb.utils.files import json_lines

NOW = float(int(time.time()))  # as whole as the stamps of the logs


def round_of(number: int, *, dropped: str | None = None) -> dict[str, Any]:
    drops = [{"client": dropped, "reason": "late: no answer within 60 s"}] if dropped else []
    row = {"round": number, "loss": 2.0 / number, "score": 0.1 * number, "cohort": ["a", "b"], "dropped": drops}
    return {**row, "up_bytes": 200, "down_bytes": 200, "seconds": 4.0}


def sent(round: int, client: str, direction: str) -> dict[str, Any]:
    row = {"round": round, "client": client, "direction": direction, "kind": "round", "values": 25, "head_values": 0}
    return {**row, "bytes": 100, "wire_bytes": 120}


@pytest.fixture
def coordinator(tmp_path: Path) -> Path:
    """Three of five rounds are done, b was dropped from the second, and this process is all of its processes."""
    folder = tmp_path / "fed"
    create_federation(folder, ["a", "b", "c"], ["localhost"], 23456)
    revoke(folder, "c")
    run = folder / "runs" / "trec"
    (run / "checkpoints").mkdir(parents=True)
    run.with_suffix(".json").write_text(json.dumps({"name": "trec", "rounds": 5}))
    config = {"rounds": 5, "method": {"name": "fed-sb"}, "engine": {"deadline_s": 3600.0}}
    clients = [{"name": "a", "rows": 10}, {"name": "b", "rows": 10}]
    manifest = {"run": "abc", "name": "trec", "config": config, "clients": clients, "task": {"metric": "accuracy"}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    rounds = [round_of(1), round_of(2, dropped="b"), round_of(3)]
    (run / "rounds.jsonl").write_bytes(json_lines(rounds) + b'{"round": 4, "lo')  # torn
    ways = [(n, name, way) for n in (1, 2, 3) for name in ("a", "b") for way in ("up", "down")]
    ledger = [sent(*way) for way in ways if way != (2, "b", "up")]
    (run / "traffic.jsonl").write_bytes(json_lines(ledger))
    seen = {"requests": 9, "bytes_in": 400, "bytes_out": 300}
    wire = {"a": {**seen, "last_seen": NOW - 2}, "b": {**seen, "last_seen": NOW - 600}}
    (folder / "traffic.json").write_text(json.dumps(wire))
    log(folder, "server", ["asked", "answered", "asked"], site="a")
    alive(folder, "superlink", "server")
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (join,) = create_federation(tmp_path / "co", ["a"], ["localhost"], 23456)
    folder = tmp_path / "a"
    store_join_file(join, folder)
    (folder / "site.toml").write_text("data = 'rows.jsonl'\n[allow]\nrounds = 9\n")
    lines = [
        {"time": "2026-01-01T00:00:00+00:00", "what": "round", "round": n, "bytes": 50, "sha256": "x"} for n in (1, 2)
    ]
    (folder / "outbox.jsonl").write_bytes(json_lines(lines))
    rounds = folder / "runs" / "abc" / "rounds"
    rounds.mkdir(parents=True)
    (rounds / "round-0002.safetensors").touch()
    facts = {"run": "abc", "config": {"name": "trec", "rounds": 5, "method": {"name": "fed-sb"}}}
    (rounds.parent / "run.json").write_text(json.dumps(facts))
    log(folder, "node", ["trouble", "active"])
    alive(folder, "worker", "node")
    return folder


def alive(folder: Path, *children: str) -> None:
    (folder / "pids.json").write_text(json.dumps(dict.fromkeys(("supervisor", *children), os.getpid())))


def log(folder: Path, process: str, events: list[str], **facts: Any) -> None:
    path = folder / "logs" / f"{process}.jsonl"
    path.parent.mkdir(exist_ok=True)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(NOW - 30))
    path.write_bytes(json_lines([{"time": stamp, "level": "info", "event": event, **facts} for event in events]))


def text_of(state: dict[str, Any]) -> str:
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=140)
    console.print(show.view(state))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def dead() -> int:
    """A process id that nobody has."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_coordinator_at_work(coordinator: Path) -> None:
    state = state_of(coordinator, NOW)
    run = state["run"]
    assert (run["state"], run["rounds"], run["rounds_planned"], run["left_seconds"]) == ("running", 3, 5, 8.0)
    a, b, c = state["sites"]
    assert [site["state"] for site in (a, b, c)] == ["working", "offline", "revoked"]
    assert (a["rounds"], b["rounds"], b["dropped"]) == (3, 2, [{"round": 2, "reason": "late: no answer within 60 s"}])
    assert (a["bytes"], b["bytes"]) == ({"up": 300, "down": 300}, {"up": 200, "down": 300})
    assert state["health"] == {
        "ok": True,
        "faults": [],
        "silence": [],
        "warnings": ["b is offline. Its last contact was 10 min 00 s ago."],
    }
    json.dumps(state)
    shown = text_of(state)
    assert "trec: 3 of 5 rounds, running, about 8 s left" in shown
    assert "b, round 2: late: no answer within 60 s" in shown


def test_a_site_at_work(site: Path) -> None:
    state = state_of(site, NOW)
    assert state["reached"]["yes"] and state["health"]["ok"]
    assert (state["run"]["name"], state["run"]["rounds"]) == ("trec", 2)
    assert state["outbox"]["kinds"] == {"round": {"messages": 2, "bytes": 100}}
    assert state["rules"] == {"data": "rows.jsonl", "rounds": 9}
    assert "rounds = 9" in text_of(state)


def test_no_key_is_in_any_view(site: Path, coordinator: Path) -> None:
    for folder in (site, coordinator):
        state = state_of(folder)
        assert "PRIVATE KEY" not in json.dumps(state)
    join = json.loads((site / "site.join").read_text())
    assert join["identity"] not in json.dumps(state_of(site))


def test_stopped_killed_failed_and_finished_are_told_apart(coordinator: Path) -> None:
    pids = json.loads((coordinator / "pids.json").read_text())
    (coordinator / "pids.json").write_text(json.dumps({**pids, "server": dead()}))
    assert "server (pid" in state_of(coordinator)["health"]["faults"][0]
    (coordinator / "pids.json").write_text(json.dumps(dict.fromkeys(pids, dead())))
    assert state_of(coordinator)["health"]["faults"] == [health.KILLED]
    (coordinator / "pids.json").unlink()
    assert "stopped after round 3 of 5" in state_of(coordinator)["health"]["faults"][0]
    assert state_of(coordinator)["run"]["state"] == "stopped"
    (coordinator / "runs" / "trec" / "result.json").write_text(json.dumps({"score": 0.5}))
    state = state_of(coordinator)
    assert state["run"]["state"] == "finished" and state["health"]["ok"]


SERVE = "import sys; from pathlib import Path; from fedsb.deployment import serve\n"
SERVE += "serve(Path(sys.argv[1]), sys.argv[2], listen='127.0.0.1', port=0)"


def serve_in_a_process(folder: Path, program: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SERVE, str(folder), program], stderr=subprocess.PIPE, text=True)


def test_the_reason_of_a_serve_that_failed_is_shown_until_the_next_one(coordinator: Path) -> None:
    """Through the real supervisor: its program does not exist, and the reason that it gives is what `status` shows."""
    pytest.importorskip("flwr")
    (coordinator / "pids.json").unlink()
    ended = serve_in_a_process(coordinator, "nowhere:run")
    assert ended.wait(120) == 1
    state = state_of(coordinator)
    assert state["run"]["state"] == "failed"
    (fault,) = state["health"]["faults"]
    assert fault.startswith("The last command failed: 'nowhere:run' cannot be imported: No module named 'nowhere'")
    assert ended.stderr is not None and fault.removeprefix("The last command failed: ") in ended.stderr.read()
    stopped = serve_in_a_process(coordinator, "time:sleep")
    wait_for(coordinator / "pids.json")
    stopped.send_signal(signal.SIGINT)
    stopped.wait(120)
    assert state_of(coordinator)["run"]["state"] == "stopped"
    assert "stopped after round 3 of 5" in state_of(coordinator)["health"]["faults"][0]


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)


def test_a_run_that_was_refused_does_not_hide_the_one_before(coordinator: Path) -> None:
    """A second `serve` writes what it was asked for, and may then be refused, stopped, or fail to start."""
    (coordinator / "pids.json").unlink()
    (coordinator / "runs" / "trec" / "result.json").write_text(json.dumps({"score": 0.5}))
    later = coordinator / "runs" / "cola.json"
    later.write_text(json.dumps({"name": "cola", "rounds": 14}))
    os.utime(later, (time.time() + 60,) * 2)
    log(coordinator, "supervisor", ["started", "ended"], how="failed", reason="b: its rules refuse this run")
    state = state_of(coordinator)
    assert (state["run"]["name"], state["run"]["state"], state["run"]["rounds"]) == ("trec", "finished", 3)
    assert state["health"] == {
        "ok": True,
        "faults": [],
        "silence": [],
        "warnings": ["Run cola did not start: b: its rules refuse this run"],
    }
    (coordinator / "runs" / "trec" / "result.json").unlink()
    state = state_of(coordinator)
    assert state["run"]["state"] == "stopped"
    assert [kind for kind in ("faults", "warnings") if state["health"][kind]] == ["faults", "warnings"]
    assert "trec was stopped after round 3 of 5" in state["health"]["faults"][0]
    alive(coordinator, "superlink", "server")
    assert state_of(coordinator)["run"]["state"] == "waiting for the sites"
    assert state_of(coordinator)["run"]["name"] == "cola"


def test_a_first_run_that_was_refused_is_a_fault(tmp_path: Path) -> None:
    create_federation(tmp_path / "fed", ["a"], ["localhost"])
    (tmp_path / "fed" / "runs").mkdir()
    (tmp_path / "fed" / "runs" / "cola.json").write_text(json.dumps({"name": "cola", "rounds": 14}))
    log(tmp_path / "fed", "supervisor", ["started", "ended"], how="failed", reason="a: its rules refuse this run")
    state = state_of(tmp_path / "fed")
    assert (state["run"]["name"], state["run"]["state"]) == ("cola", "failed")
    assert state["health"]["faults"] == ["The last command failed: a: its rules refuse this run"]
    log(tmp_path / "fed", "supervisor", ["started", "ended"], how="stopped")
    assert "cola was stopped before its first round ended" in state_of(tmp_path / "fed")["health"]["faults"][0]


@pytest.mark.skipif(not Path("/proc").exists(), reason="only there is a process's start known")
def test_a_number_that_another_process_got_since_is_not_taken_for_alive(coordinator: Path) -> None:
    old = NOW - 10 * 86400
    os.utime(coordinator / "pids.json", (old, old))  # written long before this process began
    assert state_of(coordinator)["health"]["faults"] == [health.KILLED]


def test_silence_is_no_fault_and_yet_not_health(coordinator: Path, site: Path) -> None:
    found = state_of(coordinator, time.time() + 1000)["health"]  # NOW may be long ago in a slow run
    assert not found["ok"] and not found["faults"] and "No site connected for" in found["silence"][0]
    log(site, "node", ["active", "trouble"])
    found = state_of(site, NOW)["health"]
    assert found["ok"] and "has not been reached for 30 s" in found["warnings"][0]
    assert not state_of(site, NOW + 1000)["health"]["ok"]


def test_a_refused_request_of_a_site_is_a_warning(coordinator: Path) -> None:
    """For example if two machines have one site's keys. Requests of unknown clients are normal, and are not shown."""
    log(coordinator, "superlink", ["refused"], reason="the request is not signed", address="192.0.2.7")
    before = state_of(coordinator, NOW)["health"]["warnings"]
    log(coordinator, "superlink", ["refused"], site="b", reason="its node is already connected")
    found = state_of(coordinator, NOW)["health"]
    assert found["ok"] and len(found["warnings"]) == len(before) + 1
    assert found["warnings"][0] == "A request was refused 30 s ago: site b, its node is already connected."
    assert not [line for line in state_of(coordinator, NOW + 400)["health"]["warnings"] if "was refused" in line]


def test_a_certificate_that_ends_is_said_in_time(coordinator: Path) -> None:
    found = state_of(coordinator, NOW + 710 * 86400)["health"]
    assert "The server's certificate expires in 20 days" in found["warnings"][0]
    assert "fedsb federation renew" in state_of(coordinator, NOW + 740 * 86400)["health"]["faults"][0]


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither the folder of a coordinator"):
        state_of(tmp_path)
    (tmp_path / "manifest.json").touch()
    with pytest.raises(UserError, match="fedsb report"):
        state_of(tmp_path)


def test_metrics_are_lines_that_prometheus_reads(coordinator: Path, site: Path) -> None:
    import re

    sample = re.compile(r'^fedsb_[a-z_]+(\{([a-z]+="([^"\\\n]|\\.)*",?)+\})? -?[0-9.e+-]+$')
    for folder in (coordinator, site):
        lines = metrics.exposition(state_of(folder, NOW)).splitlines()
        assert all(line.startswith("# ") or sample.match(line) for line in lines)
        names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
        assert len(names) == len(set(names))
    text = metrics.exposition(state_of(coordinator, NOW))
    for line in (
        "fedsb_round 3.0",
        "fedsb_rounds_planned 5.0",
        'fedsb_bytes_total{direction="up",site="b"} 200.0',
        'fedsb_site_dropped_total{site="b"} 1.0',
        'fedsb_site_up{site="b"} 0.0',
    ):
        assert line in text.splitlines()
    state = state_of(coordinator, NOW)
    state["run"]["name"] = 'a"b\\c\nd'
    assert r'name="a\"b\\c\nd"' in metrics.exposition(state)


@pytest.fixture
def web(coordinator: Path) -> Iterator[tuple[Path, int]]:
    with open_web(lambda: state_of(coordinator), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield coordinator, server.server_port
        server.shutdown()


def ask(port: int, path: str, host: str = "localhost", method: str = "GET") -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers={"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers.get("Content-Security-Policy", "")


def test_the_page(web: tuple[Path, int]) -> None:
    folder, port = web
    status, body, policy = ask(port, "/")
    assert status == 200 and "late: no answer within 60 s" in body
    assert "default-src 'none'" in policy and "http://" not in body and "https://" not in body  # nothing from elsewhere
    assert ask(port, "/metrics")[0] == 200 and ask(port, "/state.json")[0] == 200
    assert ask(port, "/health")[0] == 200
    (folder / "pids.json").unlink()
    status, body, _ = ask(port, "/health")
    assert status == 503 and "stopped after round 3 of 5" in body
    (folder / "federation.json").write_text("{")
    status, body, _ = ask(port, "/")
    assert status == 503 and "damaged" in body


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", "", "[::1", "10.0.0.1"])
def test_a_name_from_elsewhere_is_refused(host: str, web: tuple[Path, int]) -> None:
    assert ask(web[1], "/metrics", host)[0] == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:9444", "127.0.0.1:1", "[::1]:9444", "LOCALHOST"])
def test_this_machines_names_are_good(host: str, web: tuple[Path, int]) -> None:
    assert ask(web[1], "/health", host)[0] == 200


def test_nothing_can_be_sent_to_it(web: tuple[Path, int]) -> None:
    assert ask(web[1], "/", method="POST")[0] == 501
    assert ask(web[1], "/../ca.key")[0] == 404


def test_a_name_is_text_and_no_markup(coordinator: Path, web: tuple[Path, int]) -> None:
    rounds = coordinator / "runs" / "trec" / "rounds.jsonl"
    row = round_of(4, dropped="b")
    row["dropped"][0]["reason"] = "<script>alert(1)</script> [red]x[/]"
    rounds.write_bytes(json_lines([row]))
    assert "<script>alert" not in ask(web[1], "/")[1]
    assert "[red]x[/]" in text_of(state_of(coordinator))


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, fedsb.deployment.monitoring, fedsb.deployment.monitoring.web\n"
    code += "sys.exit(str({'torch', 'transformers', 'flwr'} & set(sys.modules)) if 'torch' in sys.modules else 0)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_exit_codes(coordinator: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsb.cli.app import main

    def code(*arguments: str) -> object:
        monkeypatch.setattr(sys, "argv", ["fedsb", "federation", "status", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    assert code(str(coordinator), "--json") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "coordinator"
    (coordinator / "pids.json").unlink()
    assert code(str(coordinator)) == 2
    assert code(str(coordinator), "--port", "1") == 1
    assert code(str(coordinator), "--web", "--json") == 1
