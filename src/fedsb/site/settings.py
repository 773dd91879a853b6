"""site.toml: what a site holds and what it allows. The site is its own master: no coordinator sets any of it."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

from pydantic import Field, ValidationError

from fedsb.config import explain
from fedsb.errors import ConfigError, UserError
from fedsb.federation.payload import Payload
from fedsb.methods.contract import Method
from fedsb.privacy.setup import Promise
from fedsb.settings import Config, Count, Positive, Rate, Section

SITE = "site.toml"  # its name in a site's folder


class AllowConfig(Section):
    """What a site takes part in. What is not set is not limited."""

    methods: list[str] | None = Field(None, description="by name, as in `fedsb ls methods`")
    rounds: Positive | None = Field(None, description="of one run")
    epsilon: Rate | None = Field(None, description="of one run, for this site's rows; a run without privacy is refused")
    tensors: list[str] | None = Field(None, description="that may leave, as patterns of names: ['*.R', 'classifier.*']")
    megabytes: Rate | None = Field(None, description="of one message that leaves, in 1e6 bytes")
    sum_clients: Count = Field(0, description="of a secure sum, at least; 0: single updates may leave")
    losses: bool = Field(True, description="whether the training loss and the site's own score may leave")


class SiteConfig(Section):
    data: str = Field(description="this site's rows: a file or 'hub:owner/name'")
    columns: dict[str, str] = Field({}, description="this site's name of a column: { text = 'note' }")
    model: str | None = Field(None, description="where the base model is here; default: where the run says")
    device: str = "auto"
    allow: AllowConfig = AllowConfig()


def load_site(path: Path) -> SiteConfig:
    """Raises UserError for a file that is not there or no TOML, ConfigError with every fault in it."""
    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; it says where this site's rows are: data = 'rows.jsonl'") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as TOML: {error}") from error
    try:
        return SiteConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error.errors(), SiteConfig)) from error


def refuse_run(allow: AllowConfig, config: Config, method: Method) -> None:
    """Before anything of a run is done. Raises UserError with all that this site does not take part in."""
    faults = []
    if allow.methods is not None and config.method.name not in allow.methods:
        faults.append(f"method.name = {config.method.name!r}, allowed are {', '.join(allow.methods) or 'none'}")
    if allow.rounds is not None and config.rounds > allow.rounds:
        faults.append(f"rounds = {config.rounds}, allowed are {allow.rounds}")
    if allow.epsilon is not None and not config.privacy.on:
        faults.append(f"privacy.unit = 'none', allowed is a promise with epsilon up to {allow.epsilon:g}")
    if allow.sum_clients and not config.server.secure_sum:
        faults.append(f"server.secure_sum = false, allowed are sums of {allow.sum_clients} clients or more")
    if method.facts.pools_data or not method.facts.global_model:
        faults.append(f"{method.facts.id} does not make one model of all sites")
    if faults:
        raise UserError("this site's rules (site.toml) refuse the run: " + "; ".join(faults))


def refuse_promise(allow: AllowConfig, promise: Promise) -> None:
    """Once every site's rows are known. Raises UserError where the run would spend more than this site allows."""
    spends = max((plan.epsilon() for plan in promise.plans.values()), default=0.0)
    if allow.epsilon is not None and spends > allow.epsilon:
        raise UserError(
            f"this site's rules (site.toml) refuse the run: it spends epsilon {spends:.4g}, allowed is "
            f"{allow.epsilon:g}"
        )


def refuse_sum(allow: AllowConfig, clients: int) -> None:
    if clients < allow.sum_clients:
        raise UserError(
            f"this site's rules (site.toml) refuse the sum: it is of {clients} clients at least, allowed are "
            f"{allow.sum_clients} or more"
        )


def refuse_payload(allow: AllowConfig, payload: Payload, size: int) -> None:
    """Raises UserError for a message that must not leave."""
    if allow.megabytes is not None and size > allow.megabytes * 1e6:
        raise UserError(
            f"this site's rules (site.toml) refuse to send {size / 1e6:.3g} MB, allowed are {allow.megabytes:g} MB"
        )
    if allow.tensors is not None:
        other = [name for name in payload.tensors if not any(fnmatch(name, pattern) for pattern in allow.tensors)]
        if other:
            raise UserError(
                f"this site's rules (site.toml) refuse to send {', '.join(other[:3])}"
                + (f" and {len(other) - 3} more" if len(other) > 3 else "")
                + f"; allowed are {', '.join(allow.tensors) or 'none'}"
            )
