"""Models by their Hub names: their configs, the shapes that ship with fedsb, and advice if a model cannot be loaded.

`shapes.json` contains the published numbers from which an architecture is built on the meta device, so that a run can
be priced offline, without weights and without an account. Training always reads the model's own config.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from safetensors import SafetensorError

from fedsb.utils.errors import NotAvailableError, UserError

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")  # their names on the Hub
SHIPPED = "auto: the published shapes that ship with fedsb, because its own config is not on this machine"


def read_config(name: str, revision: str | None, labels: dict[str, Any]) -> Any:
    """Returns the model's own config. Raises UserError as `hub_errors` does."""
    from transformers import AutoConfig

    with hub_errors(name):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False, **labels)


def config_for_shapes(name: str, revision: str | None, labels: dict[str, Any]) -> tuple[Any, str | None]:
    """Returns (a config from which to build the architecture, the reason if it is not the model's own).

    A known model's own config is read if it is in the Hub's cache, and the network is not used: the shapes are the
    same. Raises UserError as `hub_errors` does.
    """
    from transformers import AutoConfig

    known = None if revision is not None or Path(name).is_dir() else shipped_config(name, labels)
    if known is None:
        return read_config(name, revision, labels), None
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False, **labels), None
    except (OSError, ValueError):
        return known, SHIPPED


def read_generation_config(model: Any, name: str, revision: str | None) -> None:
    """Sets the model's own generation config, as loading its weights does. Without one, the model stays unchanged."""
    from transformers import GenerationConfig

    if model.can_generate():
        with suppress(OSError, TypeError):
            model.generation_config = GenerationConfig.from_pretrained(name, revision=revision)


def shipped_config(name: str, labels: dict[str, Any]) -> Any | None:
    """Returns the config of a model whose shapes ship with fedsb; None for other models."""
    from transformers import AutoConfig

    for first, entry in shipped_shapes().items():
        if name in (first, *entry["also"]):
            facts = dict(entry["config"])
            return AutoConfig.for_model(facts.pop("model_type"), **facts, **labels)
    return None


def shipped_shapes() -> dict[str, Any]:
    """Returns by Hub name: "config", the numbers of the architecture, and "also", models of the same shapes."""
    shapes: dict[str, Any] = json.loads((files("fedsb.models") / "shapes.json").read_text())
    return shapes


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Raises an error with advice if a model cannot be loaded inside.

    Raises NotAvailableError for a Hub name that cannot be fetched, UserError for an unusable folder or model.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        said = str(error).strip()
        first = said.splitlines()[0].rstrip(" :") if said else type(error).__name__
        start = f"Cannot load the model {name!r}: {first}\n    "
        if "trust_remote_code" in said:
            raise UserError(
                f"{name!r} comes with its own Python code, which fedsb never runs, because it could read and send "
                "anything that this user can. Choose a model whose architecture is part of transformers."
            ) from error
        if "Unrecognized configuration class" in said:
            raise UserError(
                f"transformers has no class for this task for the model {name!r}: {first}. Choose a different model or "
                "task.kind."
            ) from error
        asks = re.search("sentencepiece|tiktoken", said, re.IGNORECASE)
        if asks and importlib.util.find_spec("sentencepiece") is None:
            raise UserError(
                f"The tokenizer of {name!r} is a SentencePiece model, and the package that reads it is not installed. "
                "Install it: pip install 'fedsb[sentencepiece]'"
            ) from error
        if isinstance(error, ImportError):
            raise UserError(f"{start}A package is missing. Install the package that the message names.") from error
        if "gated repo" in said.lower():
            raise NotAvailableError(
                f"{start}Its owner requires that you accept a licence. Do so at https://huggingface.co/{name}, signed "
                "in, then set HF_TOKEN to a token of that account (or: hf auth login)."
            ) from error
        if Path(name).is_dir():
            raise UserError(
                f"{start}A model's folder contains config.json, its weights (model.safetensors) and its tokenizer "
                f"(tokenizer.json, tokenizer_config.json). There are: {_files(Path(name))}. If a file is missing or "
                "incomplete, fetch the model again."
            ) from error
        raise (NotAvailableError if isinstance(error, OSError) else UserError)(
            f"{start}Without a network, give a local folder (--set model.name=FOLDER), or fill the Hub's cache on "
            "another machine and point HF_HOME at it (with HF_HUB_OFFLINE=1). A gated model needs HF_TOKEN."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hides progress bars and load reports, whose content is in the table of settings.

    Also hides the warning of bitsandbytes, which PEFT imports, that faster kernels are not installed.
    """
    from transformers.utils import logging

    level, kernels = logging.get_verbosity(), getLogger("bitsandbytes")
    before = kernels.level
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kernels.setLevel(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
        kernels.setLevel(before)


WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def has_weights(name: str, revision: str | None) -> bool:
    """Returns whether a model's weights are in its folder, or in the Hub's cache, without using the network."""
    if Path(name).is_dir():
        return any((Path(name) / file).is_file() for file in WEIGHTS)
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(name, file, revision=revision) for file in WEIGHTS)
    return any(isinstance(path, str) for path in found)


def licence_of(name: str, revision: str | None) -> tuple[str | None, list[Path]]:
    """Returns (the licence that a model's card names, None if unknown; its files of licence texts).

    `name` is a folder or a Hub name. A file of the Hub that is neither cached nor fetched counts as missing.
    """
    if Path(name).is_dir():
        files = [path for path in sorted(Path(name).iterdir()) if path.is_file()]
    else:
        files = [path for file in ("README.md", *LICENCE_FILES) if (path := _from_hub(name, file, revision))]
    card = next((path for path in files if path.name == "README.md"), None)
    texts = [path for path in files if path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))]
    return None if card is None else _licence_in(card), texts


def _from_hub(name: str, file: str, revision: str | None) -> Path | None:
    """Returns a file of the Hub; None if it does not exist or there is no network."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except (OSError, ValueError):
        return None


def _licence_in(card: Path) -> str | None:
    """Returns the value of "license" in a model card's metadata."""
    from huggingface_hub import metadata_load

    try:
        licence = (metadata_load(card) or {}).get("license")
    except Exception:  # a YAML parser may refuse hand-written metadata in many ways
        return None
    return licence if isinstance(licence, str) else None


def refuse_no_model(folder: Path) -> None:
    """Raises UserError for a folder without a config.json."""
    if (folder / "config.json").is_file():
        return
    if inner := sorted(folder.glob("*/config.json")):
        hint = f"There is one in {inner[0].parent}. Name that folder."
    elif (folder / "adapter_config.json").is_file():
        hint = "It contains an adapter. Name the base model that the adapter was trained on."
    else:
        hint = "Put the model there, or name the folder that contains it."
    raise UserError(
        f"model.name = '{folder}' is a folder without a model: it has no config.json. There are: {_files(folder)}. "
        f"{hint} A model's folder contains config.json, model.safetensors, tokenizer.json and tokenizer_config.json. "
        "If you mean a model of the Hub, run fedsb in a directory without a folder of that name."
    )


def _files(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join([*names[:12], *(["..."] if len(names) > 12 else [])]) or "no files"


def stay_offline_without_network() -> None:
    """Sets HF_HUB_OFFLINE if the Hub's host has no address, which avoids a minute of retries.

    Call it before huggingface_hub is imported, which reads the variable once. With a proxy nothing is set, because the
    proxy resolves addresses itself.
    """
    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    if any(os.environ.get(name) for name in ("HF_HUB_OFFLINE", *proxies)):
        return
    try:
        socket.getaddrinfo(urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname, 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
