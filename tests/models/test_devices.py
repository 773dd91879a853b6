"""Where the weights of a base model are."""

from __future__ import annotations

import pytest
import torch

from fedsb.config.inputs import ModelConfig
from fedsb.models import devices
from fedsb.models.devices import device_map
from fedsb.utils.errors import UserError


def test_one_device_unless_asked() -> None:
    assert device_map(ModelConfig(), torch.device("cpu")) == {"": torch.device("cpu")}


@pytest.mark.parametrize(("count", "device"), [(0, "cpu"), (1, "cuda"), (4, "cuda:1"), (4, "cpu")])
def test_balanced_needs_several_gpus(count: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError, match=r"needs two or more GPUs.*model\.quantize = '4bit'"):
        device_map(ModelConfig(placement="balanced"), torch.device(device))


def test_balanced_needs_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config, device = ModelConfig(placement="balanced"), torch.device("cuda")
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"fedsb\[quant\]"):
        device_map(config, device)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: "found")
    assert device_map(config, device) == "balanced"


def test_the_memory_is_that_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(devices, "memory_of", lambda device: 10)
    one, all_of_them = ModelConfig(), ModelConfig(placement="balanced")
    assert devices.memory_of_all(one, torch.device("cuda")) == 10
    assert devices.memory_of_all(all_of_them, torch.device("cuda")) == 30
