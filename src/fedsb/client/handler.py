"""What a site does with a coordinator's requests, as engines/notes.py lists them. The site's rules stand before each.

Everything that it must remember is on its disk: a site that was killed answers the next request as if nothing had been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedsb.client.outbox import Outbox
from fedsb.client.policy import SiteConfig, refuse_payload, refuse_run
from fedsb.client.session import Identity, Participant
from fedsb.client.store import Store
from fedsb.config.load import load_config
from fedsb.config.schema import Config
from fedsb.methods import build_method
from fedsb.models.load import tokenizer_fingerprint
from fedsb.protocol.messages import (
    Behind,
    Facts,
    Finished,
    Held,
    Looked,
    Note,
    Opened,
    Phase,
    Started,
    Summed,
    Told,
    Trained,
    read_note,
)
from fedsb.protocol.payload import unpack
from fedsb.protocol.tensors import to_tensors
from fedsb.secagg.messages import SumError
from fedsb.utils.environment import versions
from fedsb.utils.errors import RefusalError
from fedsb.utils.formatting import bytes_text

OPENING = ("look", "open", "start")  # the requests that need no policy yet
SAME = ("fedsb", "torch", "transformers")  # versions that must be the coordinator's: others compute other numbers


class SiteHandle:
    """A `Handle` (channel.py) of the site whose folder this is."""

    def __init__(
        self,
        folder: Path,
        settings: SiteConfig,
        identity: Identity,
        tell: Callable[[str], None] = lambda _: None,  # who watches: what left
    ) -> None:
        self.folder, self.settings, self.identity, self.tell = folder, settings, identity, tell
        self.outbox = Outbox(folder / "outbox.jsonl")
        self.part: Participant | None = None
        self.verbs: dict[str, Callable[[Note], Facts]] = {
            "look": self.look,
            "open": self.open,
            "start": self.start,
            "sums": self.sums,
            "basis": self.basis,
            "hold": self.hold,
            "round": self.round,
            "sum": self.sum,
            "finish": self.finish,
        }

    def __call__(self, request: bytes) -> bytes:
        """Raises RefusalError for what this site's rules refuse, UserError for what it has that does not fit."""
        note = read_note(request)
        if note.verb not in self.verbs:
            raise RefusalError(f"this site knows no request {note.verb!r:.40}: is the coordinator of another version?")
        try:
            answer = self._leave(note, self.verbs[note.verb](note))
        except SumError:  # nothing has changed by it
            raise
        except Exception:  # what is in memory may be ahead of the disk, or half made: taken up from there the next time
            self._let_go()
            raise
        self.tell(f"{str(note.facts['run'])[:12]}  {_in_words(note)}: {bytes_text(len(answer))} leave")
        return answer

    def look(self, note: Note) -> Facts:
        refuse_versions(note.facts["versions"])  # first: another version may not even read the settings
        config, run = self._allowed(note.facts["config"]), str(note.facts["run"])
        self._let_go()
        part = Participant(self._folder(run), self.settings, self.identity, config, run)
        self._remember(part, config=note.facts["config"], run=run, data=part.fingerprint)
        self.part = part
        rows = None if part.config.privacy.on else len(part.table.rows)
        return Looked(labels=part.labels, rows=rows, fingerprint=part.fingerprint)

    def open(self, note: Note) -> Facts:
        part = self._part(note)
        classes = {"label_names": note.facts["label_names"], "class_names": note.facts.get("class_names")}
        self._remember(part, **classes)
        part.open(**classes)
        refuse_base(note.facts, part)
        site = part.site
        private = part.config.privacy.on
        return Opened(
            rows=site.rows,
            held_out=len(site.held_out),
            cut=None if private else part.cut,
            unused=None if private else part.unused,
            labels=site.labels if self.settings.allow.tells and not private else None,
        )

    def start(self, note: Note) -> Facts:
        part = self._part(note)
        self._known(part, rows=note.facts["rows"])
        holds = part.start(note.facts["rows"])
        self._remember(part, rows=note.facts["rows"])
        return Started(holds=holds)

    def sums(self, note: Note) -> Facts:
        part = self._part(note)
        envelope, rows = part.basis_sums()
        return Summed(rows=rows, entries=part.entries(), parts=(envelope,))

    def basis(self, note: Note) -> Facts:
        return Told(holds=self._part(note).basis(note.parts[0]))

    def hold(self, note: Note) -> Facts:
        return Held(holds=self._part(note).hold(to_tensors(unpack(note.parts[0]).tensors)))

    def round(self, note: Note) -> Facts:
        refuse_versions(note.facts["versions"])  # a coordinator may have come back as another
        part = self._part(note)
        done = part.round(note.parts[0], note.facts["rank"])
        if done is None:
            return Behind(holds=part.holds)
        loss = done.loss if self.settings.allow.tells and part.policy.shows("loss") else None
        if part.sums is None:
            return Trained(entries=part.entries(), loss=_finite(loss), parts=(done.envelope,))
        refuse_payload(self.settings.allow, unpack(done.envelope), len(done.envelope))
        if why := part.sums.fault():
            self.tell(f"{part.run[:12]}  leaves the sum: {why}")
            why = "its change is not finite, or above server.secagg_clip; its own terminal says more"
        return Trained(entries=part.entries(), loss=_finite(loss), left=why)

    def sum(self, note: Note) -> Facts:
        sums, message = self._part(note).sums, note.parts[0] if note.parts else b""
        if sums is None:
            raise RefusalError("server.secure_aggregation = false: this run has no secure sums")
        return Phase(parts=(sums.answer(str(note.facts["phase"]), list(note.facts["cohort"]), message),))

    def finish(self, note: Note) -> Facts:
        part = self._part(note)
        held_out = len(part.site.held_out)
        tells = self.settings.allow.tells and part.policy.shows("scores")
        score = part.finish(note.parts[0], note.facts["card"], tells=tells)
        entries = part.entries()
        self._let_go()
        self.tell(f"{part.run[:12]}  the final adapter is in {part.folder / 'adapter'}")
        return Finished(score=score, held_out=held_out, entries=entries)

    # --- the inside ---

    def _part(self, note: Note) -> Participant:
        """The run that the request is of; one that this site was in when it was stopped is taken up again."""
        run = str(note.facts["run"])
        if self.part is None or self.part.run != run:
            self._let_go()
            self.part = self._again(run)
        if note.verb not in OPENING:
            _ = self.part.policy  # raises where it is not in force
        return self.part

    def _let_go(self) -> None:
        """Of the run that is in memory, and of its ledger."""
        if self.part is not None:
            self.part.close()
        self.part = None

    def _again(self, run: str) -> Participant:
        facts = Store(self._folder(run)).facts()
        if facts is None:
            raise RefusalError(f"this site was never asked into the run {run!r:.40}")
        config = self._allowed(facts["config"])
        part = Participant(self._folder(run), self.settings, self.identity, config, run)
        self._known(part, data=part.fingerprint)
        if "label_names" in facts:
            part.open(facts["label_names"], facts.get("class_names"))
        if "rows" in facts:
            part.start(facts["rows"])
        return part

    def _allowed(self, settings: Any) -> Config:
        """A run's settings. Raises RefusalError where this site's rules are against them."""
        config = load_config(settings).config
        refuse_run(self.settings.allow, config, build_method(config.method.name, config.method.options))
        return config

    def _folder(self, run: str) -> Path:
        if not run.isalnum():
            raise RefusalError(f"{run!r:.40} is no run's id")
        return self.folder / "runs" / run

    def _known(self, part: Participant, **facts: Any) -> dict[str, Any]:
        """What this site was told of the run before. Raises RefusalError where it was another thing."""
        known = part.store.facts() or {}
        if other := [key for key, value in facts.items() if key in known and known[key] != value]:
            raise RefusalError(f"this run began here with other {', '.join(other)}; a run keeps what it began with")
        return known

    def _remember(self, part: Participant, **facts: Any) -> None:
        part.store.save_facts({**self._known(part, **facts), **facts})

    def _leave(self, note: Note, answer: Facts) -> bytes:
        """What leaves this site: within its rules, and in the outbox before it goes."""
        data, run = answer.pack(), str(note.facts.get("run"))
        what = f"sum: {note.facts['phase']}" if answer.verb == Phase.verb else answer.verb
        if answer.verb == Phase.verb or not answer.parts:
            self.outbox.note(what, data, run=run)
            return data
        payload = unpack(answer.parts[0])
        refuse_payload(self.settings.allow, payload, len(answer.parts[0]))
        spent = self.part.spent() if self.part is not None else None
        self.outbox.note(what, answer.parts[0], payload, run=run, epsilon=spent)
        return data


def _in_words(note: Note) -> str:
    """What was asked for."""
    if note.verb == "sum":
        return f"sum, {note.facts['phase']}"
    if note.verb == "round" and note.parts:
        return f"round {unpack(note.parts[0]).round + 1}"
    return note.verb


def _finite(loss: float | None) -> float | None:
    """A loss that is no number is not told: the update shows what is wrong."""
    return loss if loss is not None and math.isfinite(loss) else None


def refuse_versions(theirs: Mapping[str, str]) -> None:
    """Raises RefusalError where a package is of another version than the coordinator's; a build's own mark aside."""
    ours = versions()
    other = [
        f"{name} {ours[name]} here, {theirs.get(name, 'none')} at the coordinator"
        for name in SAME
        if ours[name].partition("+")[0] != theirs.get(name, "none").partition("+")[0]
    ]
    if other:
        raise RefusalError("other versions than the coordinator's: " + "; ".join(other) + ". Install the same ones")


def refuse_base(theirs: Mapping[str, Any], part: Participant) -> None:
    """Raises RefusalError for another base model or tokenizer than the coordinator's."""
    ours = {"model": part.trainer.base.fingerprint, "tokenizer": tokenizer_fingerprint(part.tokenizer)}
    for what, name in ours.items():
        if theirs[what] != name:
            raise RefusalError(
                f"another {what} than the coordinator's: {name} here, {theirs[what]} there. The site says where the "
                "right one is with model = 'FOLDER' in its site.toml"
            )
