"""The command line of a federation: one command does one thing, and an option that it does not use is refused."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Said
from fedsb.deployment import create_federation
from fedsb.deployment.federation import read_federation


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    create_federation(tmp_path / "fed", ["a", "b"], ["localhost"])
    return Path("fed")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("serve fed --add c --revoke b", ["--add", "--revoke"]),
        ("serve fed my.toml --add c --renew", ["--add", "--renew"]),
        ("serve fed my.toml --renew", ["--renew` does not use CONFIG", "`fedsb serve FEDERATION CONFIG`"]),
        ("serve fed my.toml --revoke b", ["--revoke` does not use CONFIG"]),
        ("serve new my.toml --init --host h", ["--init` does not use CONFIG"]),
        ("serve new --init --host h --listen ::", ["--init` does not use --listen"]),
        ("serve fed --add c --site d", ["--add` does not use --site", "`fedsb serve FEDERATION --init`"]),
        ("serve fed --sign --set rounds=3", ["--sign` does not use --set"]),
        ("serve fed my.toml --host h", ["does not use --host", "--init`", "--renew`"]),
        ("serve fed --renew --port 3", ["--renew` does not use --port"]),
        ("join fed/joins/a.join --data r.jsonl --config my.toml", ["does not use --config", "--dry-run`"]),
        ("join c.site --new --dry-run", ["--new", "--dry-run"]),
        ("join c.site --new --data r.jsonl", ["--new` does not use --data"]),
        ("join fed/joins/a.join --directory fed/directory.json --data r.jsonl", ["--directory` does not use --data"]),
        ("status fed --port 1", ["does not use --port", "--web`"]),
        ("status fed --web --json", ["--web` does not use --json"]),
        ("status fed --web --watch", ["--watch", "--web"]),
        ("eval run --lm-eval gsm8k --data x.jsonl", ["--lm-eval` does not use --data"]),
        ("eval run --lm-eval gsm8k --backend vllm", ["--lm-eval` does not use --backend"]),
    ],
)
def test_what_a_command_does_not_use_is_refused_by_name_before_anything_is_done(
    cli: Callable[..., Said], folder: Path, arguments: str, named: list[str]
) -> None:
    before = contents(folder.parent)
    said = cli(*arguments.split())
    assert (said.code, said.out) == (1, "")
    for name in named:
        assert name in said.err
    assert contents(folder.parent) == before


def test_each_action_alone(cli: Callable[..., Said], folder: Path) -> None:
    assert cli("serve", folder, "--add", "c").code == 0
    assert cli("serve", folder, "--revoke", "b").code == 0
    assert cli("serve", folder, "--renew", "--host", "10.0.0.5").code == 0
    federation = read_federation(folder)
    assert list(federation.members) == ["a", "c"] and federation.hosts == ["localhost", "10.0.0.5"]
    assert cli("serve", folder, "--sign").code == 0
    said = cli("serve", "new", "--init", "--site", "x", "--host", "::1", "--port", "1234")
    assert said.code == 0 and read_federation(Path("new")).address == "[::1]:1234"
    said = cli("serve", folder)
    assert said.code == 1 and "fedsb serve fed my.toml" in said.err


def test_revoking_without_the_authoritys_key_says_that_the_directory_must_be_signed(
    cli: Callable[..., Said], folder: Path
) -> None:
    (folder / "ca.key").rename("elsewhere")
    said = cli("serve", folder, "--revoke", "b")
    assert said.code == 0 and "b is revoked" in said.out
    assert "fed/directory.json still lists b" in said.out and "fedsb serve fed --sign" in said.out
    assert "Do not send it out" in said.out
    assert "b" in json.loads((folder / "directory.json").read_text())["sites"]
    Path("elsewhere").rename(folder / "ca.key")
    assert cli("serve", folder, "--sign").code == 0
    assert "b" not in json.loads((folder / "directory.json").read_text())["sites"]
    said = cli("serve", folder, "--revoke", "a")
    assert said.code == 0 and "still lists" not in said.out and "Send the new fed/directory.json" in said.out


def test_a_newer_directory_needs_no_rows(cli: Callable[..., Said], folder: Path) -> None:
    cli("serve", folder, "--add", "c")
    said = cli("join", folder / "joins" / "a.join", "--directory", folder / "directory.json")
    assert said.code == 0 and "a knows 3 sites: a, b, c" in said.out


def test_a_serve_that_is_refused_because_another_one_runs_writes_nothing(
    cli: Callable[..., Said], folder: Path
) -> None:
    """`fedsb status` takes what was asked for last for what is being run."""
    Path("my.toml").write_text("name = 'other'\nrounds = 14\n")
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = cli("serve", folder, "my.toml")
    assert said.code == 1 and "fed is in use by another process" in said.err
    assert "continues the run" not in said.err
    assert not (folder / "runs").exists()


def test_a_site_that_is_stopped_says_so(
    cli: Callable[..., Said], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    Path("rows.jsonl").write_text('{"text": "x", "label": "y"}\n')
    monkeypatch.setattr("fedsb.deployment.supervisor.Supervisor.watch", interrupted)
    said = cli("join", folder / "joins" / "a.join", "--data", "rows.jsonl")
    assert said.code == 130 and "a is stopped. The same command lets it take part again." in said.err
