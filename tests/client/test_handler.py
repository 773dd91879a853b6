"""A site refuses what its rules do not allow, and records what left it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsb.client import checks
from fedsb.client.policy import fingerprint, load_site
from fedsb.config.load import load_config
from fedsb.privacy.ledger import read_ledger
from fedsb.protocol.messages import BasisGradient, SetShared, read_request
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.run import federate
from fedsb.utils.errors import RefusalError, RunError, UserError
from laws.test_channels import federation, merged, remote_of
from support.sites import Federation

PRIVATE = {
    "privacy": {"unit": "example", "epsilon": 5.0, "clip_norm": 1.0, "delta": 1e-3},
    "clients": {"holdout_fraction": 0.0},
    "basis": {"share_samples": 0},
}


def run(tiny_config: dict[str, Any], sites: Federation, **changes: Any) -> Path:
    return federate(
        load_config(merged(remote_of(tiny_config, {}), changes)), open_federation=sites.open_federation
    ).folder


def allowing(folder: Path, **allow: Any) -> Federation:
    sites = federation(folder)
    return Federation(folder / "sites", sites.rows, {"allow": allow})


@pytest.mark.parametrize(
    ("allow", "said"),
    [
        ({"methods": ["fedit"]}, "method.name = 'fed-sb', allowed are fedit"),
        ({"models": ["minilm"]}, "allowed are minilm"),
        ({"rounds": 2}, "rounds = 3, allowed are 2"),
        ({"epsilon": 3.0}, "allowed is 'example' with epsilon up to 3"),
        ({"sum_clients": 3}, "server.secure_aggregation = false, allowed are sums of 3 clients or more"),
        ({"tensors": ["classifier.*"]}, "refuse to send bert.encoder"),
        ({"megabytes": 0.0001}, "allowed are 0.0001 MB"),
    ],
)
def test_a_site_refuses_what_it_does_not_allow(
    allow: dict[str, Any], said: str, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    sites = allowing(tmp_path, **allow)
    with pytest.raises(RunError, match="this site's rules") as refused:
        run(tiny_config, sites)
    assert said in str(refused.value)
    assert all(name in str(refused.value) for name in sites.rows)
    for name in sites.rows:  # nothing left that holds a value of a model
        assert not [row for row in read_rows(sites.folder / name / "outbox.jsonl") if "tensors" in row]


def test_a_site_refuses_an_epsilon_above_its_own(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"it spends epsilon .*; allowed is 3"):
        run(tiny_config, allowing(tmp_path, epsilon=3.0, delta=1e-3), **PRIVATE)


def test_a_round_that_a_site_will_not_send_is_charged(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """Its size is known when it has trained: the ledger may say too much, never too little."""
    sites = allowing(tmp_path, megabytes=0.0001)
    with pytest.raises(RunError, match=r"allowed are 0.0001 MB"):
        run(tiny_config, sites, **PRIVATE)
    for name in sites.rows:
        (ledger,) = (sites.folder / name).glob("runs/*/privacy/*.jsonl")
        assert [entry.round for entry in read_ledger(ledger)] == [1]


def test_epsilon_adds_up_over_runs(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    sites = allowing(tmp_path, epsilon=6.0, delta=1e-3)
    run(tiny_config, sites, **PRIVATE, name="first")
    with pytest.raises(RunError, match="with all runs before it; allowed is 6"):
        run(tiny_config, sites, **PRIVATE, name="second")


def test_no_site_runs_code_that_a_model_writes(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no site runs what a model writes"):
        run(tiny_config, federation(tmp_path), task={"run_code": True})


def test_a_site_refuses_a_sum_of_too_few(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="it is of 2 clients at least, allowed are 3 or more"):
        run(tiny_config, allowing(tmp_path, sum_clients=3), server={"secure_aggregation": True})


def test_what_left_is_in_the_outbox(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    sites = federation(tmp_path)
    folder = run(tiny_config, sites)
    for name in sites.rows:
        left = [row for row in read_rows(sites.folder / name / "outbox.jsonl") if row["what"] == "train"]
        assert [row["round"] for row in left] == [1, 2, 3]
        up = [row for row in read_rows(folder / "traffic.jsonl") if row["client"] == name and row["direction"] == "up"]
        assert [row["values"] for row in left] == [row["values"] for row in up]
        assert all(sum(len(shape) > 0 for shape in row["tensors"].values()) for row in left)


def test_losses_and_scores_stay_where_they_are_not_allowed(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    sites = allowing(tmp_path, losses=False)
    folder = run(tiny_config, sites)
    assert [row["loss"] for row in read_rows(folder / "rounds.jsonl")] == [None] * 3
    result = json.loads((folder / "result.json").read_text())
    assert [client["score"] for client in result["clients"]] == [None] * 3


def test_each_site_keeps_its_ledger_and_the_coordinator_a_copy(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    sites = federation(tmp_path)
    folder = run(tiny_config, sites, **PRIVATE)
    for name in sites.rows:
        (own,) = (sites.folder / name).glob("runs/*/privacy/*.jsonl")
        entries = read_ledger(own)
        assert [entry.round for entry in entries] == [1, 2, 3]
        assert read_ledger(folder / "privacy" / own.name) == entries
    spent = [row["epsilon"] for row in read_rows(folder / "rounds.jsonl")]
    assert spent == sorted(spent)
    assert 0 < spent[-1] <= 5.0
    assert json.loads((folder / "manifest.json").read_text())["not_private"] is None


@pytest.mark.parametrize("secure", [False, True])
def test_a_client_as_the_unit(tiny_config: dict[str, Any], tmp_path: Path, secure: bool) -> None:
    sites = federation(tmp_path)
    folder = run(
        tiny_config,
        sites,
        privacy={"unit": "client", "noise_multiplier": 1.0, "clip_norm": 0.5, "delta": 1e-2},
        server={"weighting": "uniform", "secure_aggregation": secure},
        basis={"share_samples": 0},
    )
    rows = read_rows(folder / "rounds.jsonl")
    assert all(not row["dropped"] for row in rows)
    assert rows[-1]["epsilon"] > rows[0]["epsilon"] > 0


def test_other_versions_are_refused(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "versions", lambda: {"fedsb": "0.0.1", "torch": "1.0", "transformers": "5.0"})
    with pytest.raises(RunError, match=r"fedsb 0.0.1 here, .* at the coordinator; torch 1.0 here"):
        run(tiny_config, federation(tmp_path))


def test_another_base_model_is_refused(tiny_config: dict[str, Any], tmp_path: Path, tiny_bert: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    other = AutoModel.from_pretrained(tiny_bert)
    other.encoder.layer[0].output.dense.weight.data += 0.01
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "other")
    sites = federation(tmp_path)
    wrong = Federation(tmp_path / "sites", sites.rows, {"model": str(tmp_path / "other")})
    with pytest.raises(RunError, match="A different model from the coordinator's"):
        run(tiny_config, wrong)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("site 1", ""),
        ("site 0", "'site 1' has the key .*, and not the one in allow.peers"),
        (None, "'site 1' is not in allow.peers"),
    ],
)
def test_a_secure_sum_with_pinned_peers_alone(
    told: str | None, said: str, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    sites = federation(tmp_path)
    peers = {name: fingerprint(key).upper() for name, key in sites.directory.items() if name != "site 1"}
    if told is not None:
        peers["site 1"] = fingerprint(sites.directory[told])
    sites.settings = {"allow": {"peers": peers}}
    sites.kill_all()
    if not said:
        run(tiny_config, sites, server={"secure_aggregation": True})
        return
    with pytest.raises(RunError, match=said):
        run(tiny_config, sites, server={"secure_aggregation": True})


def test_a_sites_own_column_names(
    tiny_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = federation(tmp_path)
    rows = {name: [{"note": row["text"], "kind": row["label"]} for row in own] for name, own in sites.rows.items()}
    renamed = Federation(tmp_path / "renamed", rows, {"columns": {"text": "note", "label": "kind"}})
    run(tiny_config, renamed)
    with pytest.raises(RunError, match="data or settings do not fit"):
        run(tiny_config, Federation(tmp_path / "wrong", rows, {"columns": {"text": "note"}}), name="wrong")
    assert "there are: kind, text" in capsys.readouterr().out


def test_a_site_that_was_never_asked_says_so(tmp_path: Path) -> None:
    handle = federation(tmp_path).restarted("site 0")
    with pytest.raises(RefusalError, match="never asked to join the run"):
        handle(BasisGradient(run="abc", round=0).pack())
    with pytest.raises(RefusalError, match="is not the id of a run"):
        handle(BasisGradient(run="../../x", round=0).pack())
    unknown = b'{"fields":{},"parts":[],"verb":"boo"}'
    with pytest.raises(
        RefusalError, match=r"Unknown request 'boo'\. The coordinator may run a different fedsb version"
    ):
        handle(len(unknown).to_bytes(4, "big") + unknown)


@pytest.mark.parametrize(
    "data", [b"", b"\x00\x00\x00\x05ab", b"\xff\xff\xff\xff", SetShared(run="a", parts=(b"x",)).pack()[:-1]]
)
def test_bytes_that_are_not_a_message(data: bytes) -> None:
    with pytest.raises(ValueError, match="Not a message of fedsb"):
        read_request(data)


def test_site_toml_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    with pytest.raises(UserError, match="is not there"):
        load_site(path)
    path.write_text("data = 'rows.jsonl'\n[allow]\nround = 3\nepsilon = -1\n")
    with pytest.raises(UserError, match="did you mean 'rounds'") as found:
        load_site(path)
    assert "allow.epsilon" in str(found.value)
