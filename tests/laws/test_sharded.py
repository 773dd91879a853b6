"""A base model that is divided among processes trains the same adapter as a whole one, to float tolerance."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import set_all, write_toml
from fedsb.channels import sharded
from fedsb.config.load import load_config
from fedsb.reporting.run_directory import read_rows
from fedsb.runs.run import federate
from fedsb.utils.errors import UserError
from laws.test_channels import merged
from laws.test_process_group import torchrun

SHARDED = "model.placement=sharded"
CORE = {"name": "fed-sb", "rank": 4}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("tiny_bert", {"method": CORE, "basis": {"kind": "random"}, "server": {"secure_aggregation": True}}),
    "weights": ("tiny_llama", {"method": CORE, "basis": {"kind": "weights"}, "task": {"kind": "text"}}),
    "update": (
        "tiny_llama",
        {
            "method": CORE,
            "basis": {"kind": "update-pooled", "samples": 12},
            "task": {"kind": "text"},
            "model": {"activation_checkpointing": True},
        },
    ),
    "fedit": ("tiny_bert", {"method": {"name": "fedit", "rank": 2}, "task": {"pooling": "mean"}}),
    "fedit-text": ("tiny_llama", {"method": {"name": "fedit", "rank": 2}, "task": {"kind": "text"}}),
}


def configured(name: str, tiny_config: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    model, changes = RUNS[name]
    config = merged(set_all(tiny_config, rounds=2), {"model": {"name": str(request.getfixturevalue(model))}})
    if name != "random":
        del config["clients"]["holdout_fraction"]
    return merged(config, changes)


def outcome(folder: Path) -> tuple[list[Any], dict[str, torch.Tensor], dict[str, Any]]:
    """The losses and scores of every round, the adapter, and the settings that were shown."""
    manifest, result = (json.loads((folder / f"{name}.json").read_text()) for name in ("manifest", "result"))
    assert result["adapter_fault"] is None
    scored = [[row["loss"], row["score"]] for row in read_rows(folder / "rounds.jsonl")]
    settings = {setting["key"]: setting for setting in manifest["settings"]}
    return scored, load_file(folder / "adapter" / "adapter_model.safetensors"), settings


SOME = ("weights",)  # in every test run; the others in `make test-long`


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SOME else pytest.mark.long) for n in RUNS])
def test_a_sharded_model_trains_the_same_adapter(
    name: str, tiny_config: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = configured(name, tiny_config, request)
    federate(load_config({**config, "name": "whole"}))
    said = torchrun(2, "run", write_toml(tmp_path / "run.toml", config), "--set", "name=parts", "--set", SHARDED)
    whole, parts = (Path(config["out"]) / folder for folder in ("whole", "parts"))
    expected, adapter, _ = outcome(whole)
    found, own, settings = outcome(parts)
    for scores, others in zip(found, expected, strict=True):
        assert scores == pytest.approx(others, rel=1e-4)
    assert own.keys() == adapter.keys()
    for key, x in adapter.items():
        torch.testing.assert_close(own[key], x, rtol=1e-3, atol=1e-5)
    assert "2 processes; this one has" in settings["model.placement"]["reason"]
    assert said.count("round") < 2 * len(found) + 8  # rank 0 alone shows the run
    loads_with_peft(config, parts, own)


def loads_with_peft(config: dict[str, Any], folder: Path, adapter: dict[str, torch.Tensor]) -> None:
    """The adapter loads onto a whole base, in a process without processes beside it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

    kind = AutoModelForSequenceClassification
    if config["task"]["kind"] == "text":
        kind = AutoModelForCausalLM
    elif config["task"].get("pooling") == "mean":
        kind = AutoModelForTokenClassification
    labels = {} if config["task"]["kind"] == "text" else {"num_labels": 3}
    model = PeftModel.from_pretrained(kind.from_pretrained(config["model"]["name"], **labels), folder / "adapter")
    loaded = {key.replace(".default", ""): x for key, x in model.state_dict().items()}
    key = next(key for key in adapter if "lora_B" in key)
    assert torch.equal(loaded[key], adapter[key])


SCRIPT = """
import sys
import torch
from transformers import AutoModelForCausalLM
from fedsb.channels.launch import gathered, join_launch, leave_launch
from fedsb.channels.sharded import blocks_of, shard
from fedsb.models.placement import device_bytes
import torch.distributed as dist

join_launch("gloo")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).requires_grad_(False)
ids = torch.arange(3, 9).unsqueeze(0)
total, logits = device_bytes(model), model(ids).logits
shard(model, (), dist.init_device_mesh("cpu", (dist.get_world_size(),)), torch.device("cpu"))
before = device_bytes(model)
again = model(inputs_embeds=torch.nn.functional.embedding(ids, model.get_input_embeddings().weight.full_tensor())
              .requires_grad_()).logits
again.sum().backward()
assert torch.equal(again, logits)
every = gathered((total, before, device_bytes(model), list(blocks_of(model))))
if dist.get_rank() == 0:
    print("FOUND", every)
del model, logits, again
leave_launch()
"""


def test_each_process_has_its_part_of_the_weights_alone(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "parts.py")]
    done = subprocess.run(
        [sys.executable, *launcher, str(tiny_llama)], capture_output=True, text=True, timeout=300, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-4000:]
    every = eval(done.stdout.split("FOUND")[1])  # what the script above printed
    total = every[0][0]
    assert sum(before for _, before, _, _ in every) == total
    for _, before, after, blocks in every:
        assert blocks == ["model.layers.0", "model.layers.1"]
        assert before == after and abs(before - total / 2) < 0.05 * total


@pytest.mark.long
def test_a_sharded_run_resumes(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    config = merged(tiny_config, {"model": {"placement": "sharded"}})
    toml = write_toml(tmp_path / "run.toml", config)
    torchrun(2, "run", toml, "--set", "name=whole")
    cut = Path(config["out"]) / "cut"
    torchrun(2, "run", toml, "--set", "name=cut", "--set", "keep_checkpoints=3")
    for path in ((cut / "result.json"), *(cut / "checkpoints" / "round-0003").glob("*")):
        path.unlink()
    (cut / "checkpoints" / "round-0003").rmdir()
    torchrun(2, "resume", cut)
    scores, adapter, _ = outcome(cut)
    expected, whole, _ = outcome(Path(config["out"]) / "whole")
    assert scores == expected
    assert all(torch.equal(adapter[key], x) for key, x in whole.items())


def test_a_fault_ends_all_processes(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    toml = write_toml(tmp_path / "run.toml", merged(tiny_config, {"model": {"placement": "sharded"}}))
    said = torchrun(2, "run", toml, "--set", "model.target_modules=['nowhere']", fails=True)
    assert "no linear layer is called 'nowhere'" in said
    folder = Path(tiny_config["out"]) / "tiny"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    said = torchrun(2, "run", toml, fails=True)
    assert f"{folder} contains an unfinished run" in said and said.count("contains an unfinished run") == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "and this command has one process. Start the run with `torchrun"),
        ({"privacy": {"unit": "example", "epsilon": 8.0, "delta": 1e-3}}, "not supported with privacy"),
        ({"model": {"quantize": "4bit"}}, "not supported with model.quantize = '4bit'"),
        ({"engine": {"name": "flower"}}, "engine.name = 'flower'"),
    ],
)
def test_what_a_sharded_model_refuses(changes: dict[str, Any], says: str, tiny_config: dict[str, Any]) -> None:
    config = merged(merged(tiny_config, {"model": {"placement": "sharded"}}), changes)
    with pytest.raises(UserError, match=says):
        federate(load_config(config))
    assert not (Path(config["out"]) / "tiny").exists()


def test_a_device_of_one_process_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.device = 'cuda:1' cannot be used.*device of its own"):
        sharded._own_device("cuda:1")


def test_more_processes_than_gpus_and_a_torch_without_nccl_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "choose_device", lambda _: (torch.device("cuda"), ""))
    monkeypatch.setattr(sharded.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(sharded.dist, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="needs NCCL"):
        sharded._own_device("auto")
    monkeypatch.setattr(sharded.dist, "is_nccl_available", lambda: True)
    with pytest.raises(UserError, match="Start at most 1 processes"):
        sharded._own_device("auto")
