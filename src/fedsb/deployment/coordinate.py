"""The coordinator's program: one run over a channel. The same call starts and resumes a run.

FEDERATION/runs/NAME.json     the settings of the run, as given
FEDERATION/runs/NAME/         the run directory, as for any run
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from fedsb.channels.serialized import SerializedChannel
from fedsb.config.load import ResolvedConfig, load_config
from fedsb.config.nested import difference
from fedsb.config.schema import Config
from fedsb.deployment.registry import read_federation
from fedsb.methods.base import Method
from fedsb.protocol.channel import Transport
from fedsb.protocol.requirements import refuse_what_needs_weights
from fedsb.reporting.run_directory import read_manifest
from fedsb.reporting.terminal import Terminal
from fedsb.runs.run import federate, resume
from fedsb.server.opened import OpenedFederation, open_sites
from fedsb.utils.errors import UserError
from fedsb.utils.files import write_atomic

PROGRAM = "fedsb.deployment.coordinate:coordinate"


def run_folder(federation: Path, loaded: ResolvedConfig) -> Path:
    """Returns where a coordinator keeps this run."""
    return federation / "runs" / loaded.config.name


def prepare(federation: Path, loaded: ResolvedConfig) -> Path:
    """Writes the settings of a run and returns its folder, for `coordinate`.

    Raises UserError if the run already exists with different settings.
    """
    folder = run_folder(federation, loaded)
    asked = {**loaded.given, "out": str(folder.parent), "engine": {**loaded.given.get("engine", {}), "name": "flower"}}
    path = _asked(folder)
    config = load_config(asked).config  # all faults now, before any process starts
    refuse_what_needs_weights(config, config.method)
    if path.exists() and (folder / "manifest.json").exists():
        before = load_config(json.loads(path.read_text())).config
        if lines := difference(before.model_dump(mode="json"), config.model_dump(mode="json")):
            raise UserError(
                f"{folder} was started with other settings: give this run another name (--set name=other), or serve "
                "the configuration that it was started with. They differ in\n  " + "\n  ".join(lines)
            )
    write_atomic(path, json.dumps(asked, indent=1).encode())
    return folder


def coordinate(transport: Transport, folder: Path) -> None:
    """Raises UserError and RunError as `federate`."""
    federation = read_federation(folder.parent.parent)
    directory = {name: bytes.fromhex(site.identity) for name, site in federation.sites.items()}

    begun = read_manifest(folder) if any((folder / "checkpoints").glob("round-*")) else None

    def open_federation(config: Config, method: Method, run: str) -> OpenedFederation:
        channel = SerializedChannel(transport, config.engine.name)
        return open_sites(config, method, run, channel, directory, display.note, begun)

    with Terminal() as display:
        if (folder / "manifest.json").exists():
            resume(folder, display, open_federation=open_federation)
        else:
            asked = load_config(json.loads(_asked(folder).read_text()))
            asked = replace(asked, origin=dict.fromkeys(asked.origin, "as served"))
            federate(asked, display, open_federation)


def _asked(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")
