"""Federated fine-tuning of language models at a fraction of the bytes that LoRA sends.

    from pathlib import Path
    import fedsb

    result = fedsb.federate(fedsb.load_config(Path("my.toml"), ["train.lr=0.02"]))
    print(result.score, result.adapter)
    print(fedsb.predict(result.folder, [{"text": "a new text"}]))

On one machine, without a federation, Fed-SB's adapter is a PEFT tuner:

    model = get_peft_model(model, fedsb.LoraSBConfig(r=64, basis="weights"))

Names are loaded when they are first used, so that importing fedsb is quick. What is not listed here is not promised.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsb.adapters.peft_tuner import LoraSBConfig, save_as_lora
    from fedsb.adapters.peft_update import update_basis_
    from fedsb.config import load_config
    from fedsb.errors import ConfigError, RunError, UserError
    from fedsb.methods.contract import Facts, Method, State, Traffic, Update
    from fedsb.predictions import predict
    from fedsb.report import summary, write_report
    from fedsb.run import Display, Result, federate, resume

__version__ = "0.1.0"

_HOMES = {
    "LoraSBConfig": "fedsb.adapters.peft_tuner",
    "save_as_lora": "fedsb.adapters.peft_tuner",
    "update_basis_": "fedsb.adapters.peft_update",
    "load_config": "fedsb.config",
    "ConfigError": "fedsb.errors",
    "RunError": "fedsb.errors",
    "UserError": "fedsb.errors",
    "Facts": "fedsb.methods.contract",
    "Method": "fedsb.methods.contract",
    "State": "fedsb.methods.contract",
    "Traffic": "fedsb.methods.contract",
    "Update": "fedsb.methods.contract",
    "predict": "fedsb.predictions",
    "summary": "fedsb.report",
    "write_report": "fedsb.report",
    "Display": "fedsb.run",
    "Result": "fedsb.run",
    "resume": "fedsb.run",
    "federate": "fedsb.run",
}

__all__ = [
    "ConfigError",
    "Display",
    "Facts",
    "LoraSBConfig",
    "Method",
    "Result",
    "RunError",
    "State",
    "Traffic",
    "Update",
    "UserError",
    "federate",
    "load_config",
    "predict",
    "resume",
    "save_as_lora",
    "summary",
    "update_basis_",
    "write_report",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedsb' has no attribute {name!r}; there are: {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
