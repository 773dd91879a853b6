"""The command line of a federation: a command per action, and the commands of version 0.1 as aliases of these."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Said, set_all, write_toml
from fedsb.cli.renamed import new_arguments
from fedsb.config.load import load_config
from fedsb.deployment.federation import create_federation
from fedsb.deployment.registry import read_federation
from fedsb.runs.run import federate


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
        ("federation renew fed my.toml", "my.toml"),
        ("federation revoke fed b my.toml", "my.toml"),
        ("federation create new my.toml --host h", "my.toml"),
        ("federation create new --host h --listen ::", "--listen"),
        ("federation add fed c --site d", "--site"),
        ("federation add fed", "Missing argument 'SITE'"),
        ("federation sign fed --set rounds=3", "--set"),
        ("federation serve fed", "Missing argument 'CONFIG'"),
        ("federation serve fed my.toml --host h", "--host"),
        ("federation renew fed --port 3", "--port"),
        ("site join fed/joins/a.join --data r.jsonl --config my.toml", "--config"),
        ("site keygen c.site --data r.jsonl", "--data"),
        ("site update fed/joins/a.join fed/directory.json --data r.jsonl", "--data"),
        ("federation status fed --port 1", "--port is for --web only"),
        ("site status fed --web --json", "--web cannot be combined with --watch or --json"),
        ("federation status fed --web --watch", "--web cannot be combined with --watch or --json"),
        ("eval run --lm-eval gsm8k --data x.jsonl", "--lm-eval does not use --data or --backend"),
        ("eval run --lm-eval gsm8k --backend vllm", "--lm-eval does not use --data or --backend"),
        ("serve fed --add c --revoke b", "only one of --add and --revoke"),
        ("serve fed my.toml --add c --renew", "only one of --add and --renew"),
        ("serve fed my.toml --renew", "my.toml"),
        ("serve new --init --host h --listen ::", "--listen"),
        ("serve fed --add c --site d", "--site"),
        ("join c.site --new --dry-run", "only one of --new and --dry-run"),
        ("join fed/joins/a.join --data r.jsonl --config my.toml", "--config"),
    ],
)
def test_an_option_that_a_command_does_not_use_is_refused_before_anything_is_written(
    cli: Callable[..., Said], folder: Path, arguments: str, named: str
) -> None:
    before = contents(folder.parent)
    said = cli(*arguments.split())
    assert (said.code, said.out) == (1, "") and named in said.err
    assert contents(folder.parent) == before


def test_each_action_alone(cli: Callable[..., Said], folder: Path) -> None:
    assert cli("federation", "add", folder, "c").code == 0
    assert cli("federation", "revoke", folder, "b").code == 0
    assert cli("federation", "renew", folder, "--host", "10.0.0.5").code == 0
    federation = read_federation(folder)
    assert list(federation.members) == ["a", "c"] and federation.hosts == ["localhost", "10.0.0.5"]
    assert cli("federation", "sign", folder).code == 0
    said = cli("federation", "create", "new", "--site", "x", "--host", "::1", "--port", "1234")
    assert said.code == 0 and read_federation(Path("new")).address == "[::1]:1234"


def test_keys_that_a_site_makes(cli: Callable[..., Said], folder: Path) -> None:
    said = cli("site", "keygen", "c.site")
    assert said.code == 0 and "fingerprint" in said.out and Path("c", "site.keys").exists()
    assert cli("federation", "add", folder, "c.site").code == 0
    assert json.loads((folder / "joins" / "c.join").read_text())["node_key"] == ""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("serve fed my.toml --port 1 --set rounds=2", "federation serve fed my.toml --port 1 --set rounds=2"),
        ("serve fed --init --site a.site --host h", "federation create fed --site a.site --host h"),
        ("serve fed --add c.site", "federation add fed c.site"),
        ("serve --revoke=c fed", "federation revoke fed c"),
        ("serve fed --renew --host h", "federation renew fed --host h"),
        ("serve fed --sign", "federation sign fed"),
        ("join a.join --data rows.jsonl", "site join a.join --data rows.jsonl"),
        ("join a.site --new --folder a", "site keygen a.site --folder a"),
        ("join a.join --dry-run --config my.toml", "site check a.join --config my.toml"),
        ("join a.join --directory directory.json", "site update a.join directory.json"),
        ("status fed --json", "federation status fed --json"),
        ("run my.toml --engine embedded", "run my.toml --engine in_process"),
    ],
)
def test_old_commands_are_aliases(old: str, new: str) -> None:
    arguments, notice = new_arguments(old.split())
    assert arguments == new.split()
    assert notice is not None and "was renamed to" in notice
    assert new_arguments(arguments) == (arguments, None)


def test_an_old_command_works_and_names_the_new_one_once(cli: Callable[..., Said], folder: Path) -> None:
    said = cli("serve", folder, "--add", "c")
    assert said.code == 0 and "c" in read_federation(folder).members
    assert said.err == (
        "Notice: `fedsb serve --add` was renamed to `fedsb federation add`. The old name works in this version only.\n"
    )


def test_revoking_without_the_authoritys_key_says_that_the_directory_must_be_signed(
    cli: Callable[..., Said], folder: Path
) -> None:
    (folder / "ca.key").rename("elsewhere")
    said = cli("federation", "revoke", folder, "b")
    assert said.code == 0 and "b is revoked" in said.out
    assert "fed/directory.json still lists b" in said.out and "fedsb federation sign fed" in said.out
    assert "Do not send it to the sites" in said.out
    assert "b" in json.loads((folder / "directory.json").read_text())["sites"]
    Path("elsewhere").rename(folder / "ca.key")
    assert cli("federation", "sign", folder).code == 0
    assert "b" not in json.loads((folder / "directory.json").read_text())["sites"]
    said = cli("federation", "revoke", folder, "a")
    assert said.code == 0 and "still lists" not in said.out and "Send the new fed/directory.json" in said.out


def test_a_newer_directory_needs_no_rows(cli: Callable[..., Said], folder: Path) -> None:
    cli("federation", "add", folder, "c")
    said = cli("site", "update", folder / "joins" / "a.join", folder / "directory.json")
    assert said.code == 0 and "The directory in a has 3 sites: a, b, c" in said.out


def test_a_serve_that_is_refused_because_another_one_runs_writes_nothing(
    cli: Callable[..., Said], folder: Path
) -> None:
    """`fedsb federation status` takes the last requested run for the one that is running."""
    Path("my.toml").write_text("name = 'other'\nrounds = 14\n")
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = cli("federation", "serve", folder, "my.toml")
    assert said.code == 1 and "fed is in use by a different fedsb process" in said.err
    assert "to resume" not in said.err
    assert not (folder / "runs").exists()


def test_a_serve_ends_with_the_summary_of_its_run(
    cli: Callable[..., Said], folder: Path, tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    privacy = {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "clip_norm": 0.5}
    config = set_all(tiny_config, out=str(folder / "runs"), privacy=privacy)
    toml = write_toml(Path("my.toml"), config)
    monkeypatch.setattr("fedsb.deployment.run.serve", lambda *_, **__: federate(load_config(toml)))
    said = cli("federation", "serve", folder, toml)
    assert said.code == 0 and "tiny: finished" in said.out
    assert "privacy         epsilon 8 at delta 0.001" in said.out and "fed/runs/tiny/adapter" in said.out


def test_serve_names_renamed_settings(cli: Callable[..., Said], folder: Path) -> None:
    Path("my.toml").write_text("name = 'other'\nrounds = 14\n[train]\nsteps = 3\n")
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = cli("federation", "serve", folder, "my.toml")
    assert "Notice: train.steps was renamed to train.local_steps." in said.err


def test_a_site_that_is_stopped_says_so(
    cli: Callable[..., Said], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    Path("rows.jsonl").write_text('{"text": "x", "label": "y"}\n')
    monkeypatch.setattr("fedsb.deployment.supervisor.Supervisor.watch", interrupted)
    said = cli("site", "join", folder / "joins" / "a.join", "--data", "rows.jsonl")
    assert said.code == 130 and "a is stopped. Repeat the same command to take part again." in said.err
