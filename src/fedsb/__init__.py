"""Federated fine-tuning of language models at a fraction of the bytes that LoRA sends.

    from pathlib import Path
    import fedsb

    result = fedsb.federate(fedsb.load_config(Path("my.toml"), ["train.lr=0.02"]))
    print(result.score, result.adapter)
    print(fedsb.predict(result.folder, [{"text": "a new text"}]))

On one machine, without a federation, the adapter of Fed-SB is a PEFT tuner:

    model = get_peft_model(model, fedsb.LoraSBConfig(r=64, basis="weights"))

The public API is `__all__`. Its names are imported on first use, so that `import fedsb` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsb.adapters.peft_config import LoraSBConfig
    from fedsb.adapters.peft_export import save_as_lora
    from fedsb.adapters.peft_update import update_basis_
    from fedsb.config.load import load_config
    from fedsb.methods.base import Method, MethodSpec, State, Traffic, Update
    from fedsb.reporting.report import summary, write_report
    from fedsb.runs.predictions import predict
    from fedsb.runs.run import Display, Result, federate, resume
    from fedsb.utils.errors import ConfigError, RunError, UserError

__version__ = "0.2.0"

_MODULES = {
    "LoraSBConfig": "fedsb.adapters.peft_tuner",
    "save_as_lora": "fedsb.adapters.peft_export",
    "update_basis_": "fedsb.adapters.peft_update",
    "load_config": "fedsb.config.load",
    "ConfigError": "fedsb.utils.errors",
    "RunError": "fedsb.utils.errors",
    "UserError": "fedsb.utils.errors",
    "MethodSpec": "fedsb.methods.base",
    "Method": "fedsb.methods.base",
    "State": "fedsb.methods.base",
    "Traffic": "fedsb.methods.base",
    "Update": "fedsb.methods.base",
    "predict": "fedsb.runs.predictions",
    "summary": "fedsb.reporting.report",
    "write_report": "fedsb.reporting.report",
    "Display": "fedsb.runs.run",
    "Result": "fedsb.runs.run",
    "resume": "fedsb.runs.run",
    "federate": "fedsb.runs.run",
}

__all__ = [
    "ConfigError",
    "Display",
    "LoraSBConfig",
    "Method",
    "MethodSpec",
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
    if name not in _MODULES:
        raise AttributeError(f"module 'fedsb' has no attribute {name!r}. It has: {', '.join(__all__)}")
    return getattr(import_module(_MODULES[name]), name)
