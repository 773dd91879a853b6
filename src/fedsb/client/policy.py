"""A site's settings and its policy, from site.toml. A coordinator cannot change any of them."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from fedsb.config.faults import explain
from fedsb.config.schema import Config
from fedsb.config.section import Count, Positive, Rate, Section
from fedsb.data.readers import FileFormat
from fedsb.methods.base import Method
from fedsb.privacy.accounting import Release
from fedsb.privacy.mechanism import Cap
from fedsb.privacy.plan import PrivacyPlan, default_delta
from fedsb.privacy.policy import refuse_what_would_leak
from fedsb.protocol.payload import Payload
from fedsb.protocol.requirements import refuse_what_facts_forbid, refuse_what_needs_one_place
from fedsb.utils.errors import ConfigError, RefusalError, UserError

SITE = "site.toml"  # its name in a site's folder
FEW, MANY = 10, 0.5  # labels, and labels a row, up to which a column is taken for one of classes


class AllowConfig(Section):
    """A site's policy. A setting that is left out sets no limit."""

    methods: list[str] | None = Field(None, description="by name, as in `fedsb ls methods`")
    models: list[str] | None = Field(None, description="base models, by the run's model.name, or NAME@REVISION")
    columns: list[str] | None = Field(None, description="of this site's rows that a run may read, by their names here")
    labels: list[str | int | bool] | None = Field(
        None, description="classes that may leave; a run with other classes is refused"
    )
    rounds: Positive | None = Field(None, description="of one run")
    epsilon: Rate | None = Field(
        None,
        description="of all runs together, for a row of this site, against all others together; others are refused",
    )
    epsilon_shared: Rate | None = Field(
        None, description="the same, if no more sites collude with the coordinator than a run with shared noise states"
    )
    delta: Rate | None = Field(
        None, description="for that epsilon; default: 1e-5, or a tenth of one over the rows if less"
    )
    tensors: list[str] | None = Field(None, description="that may leave, as patterns of names: ['*.R', 'classifier.*']")
    megabytes: Rate | None = Field(None, description="of one message that leaves, in 1e6 bytes")
    sum_clients: Count = Field(0, description="at least, in secure aggregation; 0: single updates may leave")
    peers: dict[str, str] | None = Field(
        None, description="the only sites in secure aggregation, each with the fingerprint that the site itself states"
    )
    losses: bool | None = Field(
        None,
        description="whether the training loss and the site's own score may leave; default: unless epsilon or "
        "sum_clients is set",
    )

    @property
    def tells(self) -> bool:
        """True if a loss or a score may leave."""
        bounded = self.epsilon is not None or self.epsilon_shared is not None or self.sum_clients
        return not bounded if self.losses is None else self.losses

    @property
    def epsilons(self) -> dict[str, tuple[float, bool]]:
        """The limits of epsilon that are set, each with whether only the site's own share of the noise counts."""
        found = {"epsilon": (self.epsilon, True), "epsilon_shared": (self.epsilon_shared, False)}
        return {key: (limit, alone) for key, (limit, alone) in found.items() if limit is not None}


class SiteConfig(Section):
    data: str = Field(description="this site's rows: a file or 'hub:owner/name'")
    split: str = Field("train", description="of a Hub data set")
    revision: str | None = Field(None, description="of a Hub data set: branch, tag or commit")
    columns: dict[str, str] = Field({}, description="this site's name of a column: { text = 'note' }")
    model: str | None = Field(None, description="where the base model is here; default: where the run says")
    device: str = "auto"
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = Field(None, description="of .csv and .tsv")
    quoting: Literal["auto", "standard", "none"] = Field("auto", description="of .csv and .tsv, as data.quoting")
    encoding: str | None = Field(None, description="of the file; default: UTF-8")
    header: list[str] = Field([], description="the names of the columns of a .csv or .tsv without a header")
    allow: AllowConfig = AllowConfig()

    @property
    def form(self) -> FileFormat:
        """The format of this site's file."""
        return FileFormat(
            delimiter=self.delimiter, quoting=self.quoting, encoding=self.encoding, columns=tuple(self.header)
        )


def load_site(path: Path) -> SiteConfig:
    """Loads site.toml. Raises UserError if it is missing or not valid TOML, ConfigError with all faults in it."""
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
    """Checks a run before any work. Raises RefusalError with everything that this site does not allow.

    The checks for leaks are repeated here, because a malicious coordinator would leave them out.
    """
    faults = []
    for refuse in (refuse_what_facts_forbid, refuse_what_would_leak, refuse_what_needs_one_place):
        try:
            refuse(config, method)
        except UserError as error:
            faults.append(str(error))
    if allow.methods is not None and config.method.spec.id not in allow.methods:
        faults.append(f"method.name = {config.method.spec.id!r}, allowed are {', '.join(allow.methods) or 'none'}")
    model = config.model.name + (f"@{config.model.revision}" if config.model.revision else "")
    if allow.models is not None and model not in allow.models:
        faults.append(f"the base model {model!r}, allowed are {', '.join(allow.models) or 'none'}")
    if allow.rounds is not None and config.rounds > allow.rounds:
        faults.append(f"rounds = {config.rounds}, allowed are {allow.rounds}")
    if allow.epsilons and config.privacy.unit != "example":
        limits = " and ".join(f"{key} up to {limit:g}" for key, (limit, _) in allow.epsilons.items())
        faults.append(f"privacy.unit = {config.privacy.unit!r}, allowed is 'example' with {limits}")
    if allow.sum_clients and not config.server.secure_aggregation:
        faults.append(f"server.secure_aggregation = false, allowed are sums of {allow.sum_clients} clients or more")
    if config.privacy.release and not allow.tells:
        faults.append(f"privacy.release = {list(config.privacy.release)}: neither losses nor scores may leave")
    labels = {config.task.label} if config.task.kind == "classification" else set()
    if other := sorted(set(config.data.exclude) - labels):
        faults.append(
            f"data.exclude = {', '.join(other)}: the number of rows that remain would reveal how many have these values"
        )
    if config.task.run_code:
        faults.append("task.run_code = true: no site runs what a model writes")
    if faults:
        raise RefusalError("this site's rules (site.toml) refuse the run: " + "; ".join(faults))


def refuse_columns(site: SiteConfig, read: Iterable[str]) -> None:
    """Checks the columns before rows are read. Raises RefusalError for one that is not allowed.

    `read` contains the run's names of the columns.
    """
    if site.allow.columns is None:
        return
    own = [site.columns.get(name, name) for name in read]
    if other := [name for name in own if name not in site.allow.columns]:
        raise RefusalError(
            f"this site's rules (site.toml) refuse the run: it reads {', '.join(other)}, allowed are "
            f"{', '.join(site.allow.columns) or 'none'}"
        )


def refuse_labels(allow: AllowConfig, labels: Sequence[str | int | bool], rows: int) -> None:
    """Checks the labels of `rows` rows before they leave. Raises RefusalError, whose text contains no label."""
    if allow.labels is None and len(labels) > max(FEW, rows * MANY):
        raise RefusalError(
            "the run's label column has a value of its own in nearly every row here, and all of a run's classes are "
            "sent: if they are classes, name them in allow.labels of site.toml"
        )
    if allow.labels is not None and not set(labels) <= set(allow.labels):
        raise RefusalError(
            "this site's rules (site.toml) refuse the run: in its label column there are values here that are none of "
            "allow.labels; which, is not said"
        )


def caps_of(allow: AllowConfig, plan: PrivacyPlan, before: Iterable[Release]) -> tuple[Cap, ...]:
    """Returns the caps that this site's ledger enforces at each release, because a run can deviate from its plan.

    `before` was released in other runs. Raises RefusalError if the plan alone exceeds a cap.
    """
    delta, before, caps = allow.delta or default_delta("example", [plan.rows])[0], tuple(before), []
    for key, (limit, alone) in allow.epsilons.items():
        cap = Cap(epsilon=limit, delta=delta, before=before, alone=alone)
        total = cap.total(plan.releases())
        if total > limit:
            own = replace(cap, before=()).total(plan.releases())
            how = advice = ""
            if plan.shared is not None and alone:
                how = ", which counts this site's own share of the noise alone,"
                shared = replace(cap, before=(), alone=False).total(plan.releases())
                advice = (
                    f". Against the coordinator alone the run spends {shared:.4g}: allow.epsilon_shared limits that, "
                    f"and then allow.epsilon can be raised or left out"
                )
            raise RefusalError(
                f"this site's rules (site.toml) refuse the run: by allow.{key}{how} it spends epsilon {own:.4g} at "
                f"this site's delta of {delta:g}, {total:.4g} with all runs before it; allowed is {limit:g}{advice}"
            )
        caps.append(cap)
    return tuple(caps)


def refuse_sum(allow: AllowConfig, clients: int) -> None:
    if clients < allow.sum_clients:
        raise RefusalError(
            f"this site's rules (site.toml) refuse the sum: it is of {clients} clients at least, allowed are "
            f"{allow.sum_clients} or more: raise the run's server.min_clients"
        )


def refuse_peers(allow: AllowConfig, cohort: Mapping[str, bytes]) -> None:
    """Checks a cohort (name -> identity key) before a key is sent to it.

    Raises RefusalError for a key that differs from the pinned one.
    """
    if allow.peers is None:
        return
    for name, key in cohort.items():
        found, pinned = fingerprint(key), allow.peers.get(name)
        if pinned is None or pinned.replace(" ", "").lower() != found.replace(" ", ""):
            why = "is not in allow.peers" if pinned is None else f"has the key {found}, and not the one in allow.peers"
            raise RefusalError(f"this site's rules (site.toml) refuse the sum: {name!r} {why}")


def fingerprint(identity: bytes) -> str:
    """Returns half of the SHA-256 of a site's public identity key in groups of four, for people to compare."""
    digest = hashlib.sha256(identity).hexdigest()[:32]
    return " ".join(digest[at : at + 4] for at in range(0, 32, 4))


def refuse_payload(allow: AllowConfig, payload: Payload, size: int) -> None:
    """Raises RefusalError for a message that must not leave."""
    if allow.megabytes is not None and size > allow.megabytes * 1e6:
        raise RefusalError(
            f"this site's rules (site.toml) refuse to send {size / 1e6:.3g} MB, allowed are {allow.megabytes:g} MB"
        )
    if allow.tensors is not None:
        names = [name for name, _ in payload.layout.shapes]
        other = [name for name in names if not any(fnmatch(name, pattern) for pattern in allow.tensors)]
        if other:
            raise RefusalError(
                f"this site's rules (site.toml) refuse to send {', '.join(other[:3])}"
                + (f" and {len(other) - 3} more" if len(other) > 3 else "")
                + f"; allowed are {', '.join(allow.tensors) or 'none'}"
            )
