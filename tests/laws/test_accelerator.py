"""Law 13: on an accelerator no tensor of the CPU meets one of the device, and a step of training hardly waits.

The accelerator is a pretended one, see support/accelerator.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import labelled_rows, set_all, write_rows
from fedsb.config.load import load_config
from fedsb.models import load as load_module
from fedsb.runs.run import federate
from fedsb.training.scoring import forward
from laws.test_channels import METHODS as CHANNEL_METHODS
from laws.test_channels import merged
from laws.test_golden import METHODS as GOLDEN_METHODS
from support.accelerator import MixedDevicesError, accelerator
from support.server import started

PRIVATE = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-3, "clip_norm": 0.5}
RUNS: dict[str, dict[str, Any]] = {
    **CHANNEL_METHODS,
    **GOLDEN_METHODS,
    "update-basis": {"basis": {"kind": "update-pooled", "samples": 12}},
    "captured-share": {"basis": {"kind": "core", "samples": 20, "share_samples": 6}},
    "dropout": {"train": {"dropout": 0.2}},
    "checkpointing": {"model": {"activation_checkpointing": True}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "sgd": {"train": {"optimizer": "sgd"}},
    "mean-pooling": {"task": {"pooling": "mean"}},
    "gap": {"eval": {"gap": True}},
}
PRIVATE_RUNS: dict[str, dict[str, Any]] = {
    "example": {"privacy": PRIVATE},
    "example-core-basis": {
        "privacy": {"unit": "example", "epsilon": 8.0, "delta": 1e-3, "clip_norm": 0.5},
        "basis": {"kind": "core", "samples": 20},
    },
    "example-fedit": {"privacy": PRIVATE, "method": {"name": "fedit", "rank": 2}},
    "example-shared": {
        "privacy": PRIVATE,
        "server": {"secure_aggregation": True},
        "train": {"local_steps": 1},
    },
    "client": {
        "privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3, "clip_norm": 0.5},
        "server": {"weighting": "uniform"},
    },
}


def on_device(config: dict[str, Any], name: str = "device") -> dict[str, Any]:
    return merged({**config, "name": name}, {"model": {"device": "pretend"}})


def changes_of(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the change of each weight by a run's adapters, and the heads."""
    found = {}
    for path in sorted((folder / "adapter").rglob("*.safetensors")):
        tensors = load_file(path)
        for key, value in tensors.items():
            if "lora_B" in key:
                found[f"{path.parent.name} {key}"] = value @ tensors[key.replace("lora_B", "lora_A")]
            elif "lora_A" not in key:
                found[f"{path.parent.name} {key}"] = value
    return found


def test_devices_do_not_mix() -> None:
    with accelerator() as device:
        x, y = torch.ones(3, device="pretend"), torch.ones(3)
        assert (x * 2 + torch.tensor(1.0)).tolist() == [3.0, 3.0, 3.0]
        with pytest.raises(MixedDevicesError, match="Expected all tensors on one device"):
            x + y
        with pytest.raises(TypeError, match=r"Use Tensor\.cpu"):
            x.numpy()
        assert device.kernels


SPREAD: dict[str, dict[str, Any]] = {
    "fed-sb": {"method": {"name": "fed-sb", "rank": 4}, "basis": {"kind": "core", "samples": 20, "share_samples": 6}},
    "fedit-dropout": {"method": {"name": "fedit", "rank": 2}, "train": {"dropout": 0.2}},
    "fedex-lora": {"method": {"name": "fedex-lora", "rank": 2}},
    "private": {"privacy": PRIVATE, "method": {"name": "fed-sb", "rank": 4}},
}


@pytest.mark.parametrize("name", SPREAD)
def test_a_run_over_two_devices_is_the_run_on_one(
    name: str, tiny_config: dict[str, Any], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second block and the output layer are on another device, by the hooks of model.placement = "balanced"."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = {"name": str(tiny_llama), "max_seq_length": 16}
    config = merged(set_all(tiny_config, rounds=2, model=model, task={"kind": "text"}), SPREAD[name])
    here = federate(load_config({**config, "name": "here"}))
    load = load_module._load

    def spread(*arguments: Any) -> Any:
        loaded = load(*arguments)
        model = loaded.model
        for module in (model.model.layers[1], model.model.norm, model.lm_head):
            module.to("pretend")
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="pretend:0"))
        hooks.add_hook_to_module(model, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
        return loaded

    monkeypatch.setattr(load_module, "_load", spread)
    with accelerator() as device:
        there = federate(load_config({**config, "name": "there"}))
        assert device.kernels.total() > 1000
    expected, found = changes_of(here.folder), changes_of(there.folder)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if name != "private":  # whose noise differs in each run
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)


def test_waits_are_counted() -> None:
    with accelerator() as device:
        host = torch.arange(3.0)
        x, at = host.to("pretend"), torch.tensor([0, 2]).to("pretend")
        waiting: list[Callable[[], Any]] = [
            lambda: float(x.sum()),
            lambda: bool((x > 1).any()),
            lambda: x[x > 1],
            lambda: x.nonzero(),
            lambda: x.tolist(),
            lambda: x.cpu(),
            lambda: x.to("cpu", copy=True),
            lambda: torch.equal(x, x + 1),
            lambda: host.to("pretend"),
        ]
        for wait in waiting:
            device.clear()
            wait()
            assert device.waits.total() == 1
        device.clear()
        x[at].masked_fill(x[:2] > 0, 0.0).add_(torch.tensor(1.0)).sum()
        host.pin_memory().to("pretend", non_blocking=True).add_(x)
        assert not device.waits and device.kernels


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_device_is_the_run_on_the_cpu(name: str, tiny_config: dict[str, Any]) -> None:
    config = merged(set_all(tiny_config, rounds=2), RUNS[name])
    here = federate(load_config({**config, "name": "cpu"}))
    with accelerator():
        there = federate(load_config(on_device(config)))
    assert there.score == pytest.approx(here.score, abs=0.03 if name == "bfloat16" else 1e-3)
    expected, found = changes_of(here.folder), changes_of(there.folder)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        near = {"rtol": 0.05, "atol": 5e-3} if name == "bfloat16" else {"rtol": 1e-3, "atol": 1e-5}
        assert torch.allclose(found[key], value, **near), key


@pytest.mark.parametrize("name", PRIVATE_RUNS)
def test_a_private_run_on_a_device(name: str, tiny_config: dict[str, Any]) -> None:
    """Its noise is secret, so no two runs are alike."""
    with accelerator():
        federate(load_config(on_device(merged(set_all(tiny_config, rounds=2), PRIVATE_RUNS[name]))))


LANGUAGE: dict[str, dict[str, Any]] = {
    "text": {"kind": "text"},
    "instruction": {"kind": "instruction", "prompt": "text", "answer": "label"},
    "arithmetic": {"kind": "arithmetic", "prompt": "text", "answer": "label", "new_tokens": 3},
}


@pytest.mark.parametrize("kind", LANGUAGE)
def test_a_language_model_on_a_device(kind: str, tiny_config: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    rows = [row | {"label": f"The answer is: {i % 4}"} for i, row in enumerate(labelled_rows(60, 0))]
    table = write_rows(tmp_path / "rows.jsonl", rows)
    config = merged(
        set_all(tiny_config, rounds=2, data={"train": str(table), "test": str(table)}),
        {"task": LANGUAGE[kind], "model": {"name": str(tiny_llama), "max_seq_length": 56}},
    )
    here = federate(load_config({**config, "name": "cpu"}))
    with accelerator():
        there = federate(load_config(on_device(config)))
    assert there.score == pytest.approx(here.score, abs=1e-3)


# --- waits ---


def waits_of_four_steps(config: dict[str, Any], folder: Path, rows: int = 0) -> tuple[Counter[str], Counter[str]]:
    """Returns what the host waits for in four more steps of a round, and in one forward of so many rows, if any."""
    found = []
    for steps in (2, 6):
        with accelerator() as device:
            server, state = started(
                merged(on_device(config), {"train": {"local_steps": steps}}), folder / f"{steps} steps"
            )
            state = server.run_round(state).state
            device.clear()
            server.run_round(state)
            found.append(Counter(device.waits))
            device.clear()
            if rows:
                forward(server.trainer.adapted.model, server.trainer.task, server.clients[0].train[:rows])
            own = Counter(device.waits)
    found[1].subtract(found[0])
    return Counter({where: count for where, count in found[1].items() if count}), own


@pytest.mark.parametrize(
    "method", ["fed-sb", "fedit", *(pytest.param(name, marks=pytest.mark.long) for name in ("ravan", "hetlora"))]
)
@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.long), 0.2])
def test_a_step_of_training_waits_for_nothing(
    tiny_config: dict[str, Any], tmp_path: Path, method: str, together: int, dropout: float
) -> None:
    """Four more steps are four more forwards for each group of three clients, and no wait but those of transformers."""
    settings = {
        "fed-sb": {"rank": 4},
        "ravan": {"rank": 2, "blocks": 2},
        "fedit": {"rank": 2},
        "hetlora": {"rank": 4, "gamma": 0.5, "penalty_weight": 0.1},
    }
    config = merged(
        set_all(tiny_config, method={"name": method, **settings[method]}),
        {"train": {"dropout": dropout}, "engine": {"clients_per_forward": together}},
    )
    waits, own = waits_of_four_steps(config, tmp_path, 4 * together)
    assert waits == Counter({where: 4 * 3 // together * count for where, count in own.items()})
    assert all(where.startswith("transformers/") for where in own)


def test_a_step_of_a_language_model_waits_once_and_in_transformers(
    tiny_config: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    config = merged(tiny_config, {"model": {"name": str(tiny_llama)}, "task": {"kind": "text"}})
    waits, own = waits_of_four_steps(config, tmp_path, 12)  # transformers looks for packed rows, once for each forward
    assert all(where.startswith("transformers/") for where in waits) and waits.total() <= 4
    assert own.total() == 1


def test_a_private_step_waits_once_for_each_client(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    """For the check of its sum; a site has one client."""
    waits, _ = waits_of_four_steps(merged(tiny_config, {"privacy": PRIVATE}), tmp_path)
    own = {where: count for where, count in waits.items() if not where.startswith("transformers/")}
    assert sum(own.values()) == 4 * 3 and all("mechanism.py" in where for where in own)


# --- kernels ---

KERNELS: dict[str, tuple[int, dict[str, Any]]] = {  # of a step of two blocks, with a few in reserve
    "fed-sb": (445, {"method": {"name": "fed-sb", "rank": 4}}),
    "fedit": (476, {"method": {"name": "fedit", "rank": 2}}),
    "dropout": (745, {"method": {"name": "fed-sb", "rank": 4}, "train": {"dropout": 0.2}}),
    "private": (  # every row in every step
        466,
        {"method": {"name": "fed-sb", "rank": 4}, "privacy": PRIVATE, "train": {"batch_size": 90}},
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_step_launches_few_kernels(name: str, tiny_config: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    """benchmarks/training_step compares them with PEFT's."""
    budget, changes = KERNELS[name]
    alone = {"clients": {"partition": "iid", "count": 1}, "model": {"name": str(tiny_llama), "max_seq_length": 16}}
    config, found = merged(merged(tiny_config, {**alone, "task": {"kind": "text"}}), changes), []
    for steps in (2, 6):
        with accelerator() as device:
            server, state = started(
                merged(on_device(config), {"train": {"local_steps": steps}}), tmp_path / f"{steps} steps"
            )
            device.clear()
            server.run_round(state)
            found.append(device.kernels.total())
    assert (found[1] - found[0]) / 4 <= budget
