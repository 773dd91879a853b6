"""A federation in one process: real sites, each with a folder and a file of rows of its own, and a channel of calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsb.channels.serialized import SerializedChannel
from fedsb.client.handler import SiteHandler
from fedsb.client.policy import SiteConfig
from fedsb.client.secure_sum import Identity
from fedsb.config.schema import Config
from fedsb.deployment.worker import stored_or_computed
from fedsb.methods.base import Method
from fedsb.protocol.channel import Handle, NoResponse
from fedsb.reporting.run_directory import read_manifest
from fedsb.server.opened import OpenedFederation, open_sites


@dataclass
class Calls:
    """Asks each site as its worker does, which remembers its answers; the last site first: order must not matter."""

    handles: dict[str, Handle]
    folder: Path
    log: list[tuple[str, bytes, bytes | NoResponse]] = field(default_factory=list)

    @property
    def sites(self) -> Sequence[str]:
        return sorted(self.handles)

    def ask(
        self, requests: Mapping[str, bytes], timeout_s: float | None = None
    ) -> Iterator[tuple[str, bytes | NoResponse]]:
        for name in sorted(requests, reverse=True):
            answers = self.folder / name / "answers"
            answers.mkdir(exist_ok=True)
            answer = stored_or_computed(self.handles[name], requests[name], answers)
            self.log.append((name, requests[name], answer))
            yield name, answer


@dataclass
class Federation:
    """Sites below `folder`, by name; `settings` are of site.toml."""

    folder: Path
    rows: Mapping[str, list[dict[str, Any]]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keys = {name: Ed25519PrivateKey.generate() for name in self.rows}
        self.directory = {name: key.public_key().public_bytes_raw() for name, key in self.keys.items()}
        for name, rows in self.rows.items():
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            (self.folder / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.kill_all()

    def kill_all(self) -> None:
        """All sites at once; their folders stay."""
        self.channel = Calls({name: self.restarted(name) for name in self.rows}, self.folder)

    def restarted(self, name: str) -> SiteHandler:
        """A site as it is after a kill: with its folder and nothing else."""
        settings = SiteConfig.model_validate({"data": str(self.folder / name / "rows.jsonl"), **self.settings})
        identity = Identity(name=name, key=self.keys[name], directory=self.directory)
        return SiteHandler(self.folder / name, settings, identity)

    def taken_up(self, folder: Path) -> Callable[[Config, Method, str], OpenedFederation]:
        """As the coordinator opens it that finds a run in its folder."""

        def open_federation(config: Config, method: Method, run: str) -> OpenedFederation:
            return self._open(config, method, run, begun=read_manifest(folder))

        return open_federation

    def open_federation(self, config: Config, method: Method, run: str) -> OpenedFederation:
        return self._open(config, method, run)

    def _open(self, config: Config, method: Method, run: str, **more: Any) -> OpenedFederation:
        channel = SerializedChannel(self.channel, config.engine.name)
        return open_sites(config, method, run, channel, self.directory, **more)
