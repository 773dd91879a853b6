"""What a site does with a coordinator's requests, as engines/notes.py lists them. The site's rules stand before each.

Everything that it must remember is on its disk: a site that was killed answers the next request as if nothing had been.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsb.config import load_config
from fedsb.engines.notes import Note, pack_note, read_note
from fedsb.environment import versions
from fedsb.errors import UserError
from fedsb.federation.payload import Payload, unpack
from fedsb.federation.tensors import to_tensors
from fedsb.methods import build_method
from fedsb.models.load import tokenizer_fingerprint
from fedsb.site.outbox import Outbox
from fedsb.site.participant import Identity, Participant
from fedsb.site.settings import SITE, SiteConfig, load_site, refuse_payload, refuse_run
from fedsb.site.store import Store

SAME = ("fedsb", "torch", "transformers")  # versions that must be the coordinator's: others compute other numbers


class SiteHandle:
    """A `Handle` (channel.py) of the site whose folder this is."""

    def __init__(self, folder: Path, settings: SiteConfig, identity: Identity) -> None:
        self.folder, self.settings, self.identity = folder, settings, identity
        self.outbox = Outbox(folder / "outbox.jsonl")
        self.part: Participant | None = None
        self.verbs: dict[str, Callable[[Note], Note]] = {
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
        """Raises UserError for what this site's rules refuse or what does not fit, RunError for what failed."""
        note = read_note(request)
        if note.verb not in self.verbs:
            raise UserError(f"this site knows no request {note.verb!r:.40}: is the coordinator of another version?")
        return pack_note(self.verbs[note.verb](note))

    def look(self, note: Note) -> Note:
        config = load_config(note.facts["config"]).config
        refuse_run(self.settings.allow, config, build_method(config.method.name, config.method.options))
        refuse_versions(note.facts["versions"])
        run = str(note.facts["run"])
        self.part = Participant(self._folder(run), self.settings, self.identity, config, run)
        self.part.store.save_facts({"config": note.facts["config"], "run": run})
        table = self.part.table
        return self._say("look", labels=self.part.labels, rows=len(table.rows), fingerprint=table.fingerprint)

    def open(self, note: Note) -> Note:
        part = self._part(note)
        part.open(note.facts["label_names"])
        self._remember(part, label_names=note.facts["label_names"])
        refuse_base(note.facts, part)
        site = part.site
        shown = {"labels": site.labels if self.settings.allow.losses and not part.config.privacy.on else None}
        return self._say("open", rows=site.rows, held_out=len(site.held_out), cut=part.cut, unused=part.unused, **shown)

    def start(self, note: Note) -> Note:
        part = self._part(note)
        self._remember(part, rows=note.facts["rows"])
        return self._say("start", holds=part.start(note.facts["rows"]))

    def sums(self, note: Note) -> Note:
        part = self._part(note)
        envelope, rows = part.basis_sums()
        return self._send("sums", envelope, rows=rows, entries=part.entries())

    def basis(self, note: Note) -> Note:
        return self._say("basis", holds=self._part(note).basis(note.parts[0]))

    def hold(self, note: Note) -> Note:
        return self._say("hold", holds=self._part(note).hold(to_tensors(unpack(note.parts[0]).tensors)))

    def round(self, note: Note) -> Note:
        part = self._part(note)
        done = part.round(note.parts[0], note.facts["rank"])
        if done is None:
            return self._say("behind", holds=part.holds)
        after, sending = done
        facts: dict[str, Any] = {"entries": part.entries()}
        if self.settings.allow.losses and part.promise.shows("loss"):
            facts["loss"] = after.loss
        if part.sums is None:
            return self._send("round", sending.envelope, **facts)
        refuse_payload(self.settings.allow, unpack(sending.envelope), len(sending.envelope))
        return self._say("round", left=part.sum_fault(), **facts)

    def sum(self, note: Note) -> Note:
        part = self._part(note)
        phase = str(note.facts["phase"])
        message = part.sum(phase, list(note.facts["cohort"]), note.parts[0] if note.parts else b"")
        self.outbox.note(f"sum: {phase}", message, run=part.run)
        return Note("sum", {}, (message,))

    def finish(self, note: Note) -> Note:
        part = self._part(note)
        held_out = len(part.site.held_out)
        score, path = part.finish(note.parts[0], note.facts["card"])
        self.part = None
        told = score if self.settings.allow.losses and part.promise.shows("scores") else None
        return self._say("finish", score=told, rows=held_out, entries=part.entries(), adapter=path.name)

    # --- the inside ---

    def _part(self, note: Note) -> Participant:
        """The run that the request is of; one that this site was in when it was stopped is taken up again."""
        run = str(note.facts["run"])
        if self.part is None or self.part.run != run:
            self.part = self._again(run)
        return self.part

    def _again(self, run: str) -> Participant:
        facts = Store(self._folder(run)).facts()
        if facts is None:
            raise UserError(f"this site was never asked into the run {run!r:.40}")
        config = load_config(facts["config"]).config
        refuse_run(self.settings.allow, config, build_method(config.method.name, config.method.options))
        part = Participant(self._folder(run), self.settings, self.identity, config, run)
        if "label_names" in facts:
            part.open(facts["label_names"])
        if "rows" in facts:
            part.start(facts["rows"])
        return part

    def _folder(self, run: str) -> Path:
        if not run.isalnum():
            raise UserError(f"{run!r:.40} is no run's id")
        return self.folder / "runs" / run

    def _remember(self, part: Participant, **facts: Any) -> None:
        part.store.save_facts({**(part.store.facts() or {}), **facts})

    def _say(self, verb: str, **facts: Any) -> Note:
        note = Note(verb, facts)
        self.outbox.note(verb, pack_note(note), facts=sorted(key for key, value in facts.items() if value is not None))
        return note

    def _send(self, verb: str, envelope: bytes, **facts: Any) -> Note:
        payload: Payload = unpack(envelope)
        refuse_payload(self.settings.allow, payload, len(envelope))
        assert self.part is not None
        self.outbox.note(verb, envelope, payload, run=self.part.run, epsilon=self.part.spent())
        return Note(verb, facts, (envelope,))


def open_handle(folder: Path) -> SiteHandle:
    """What `fedsb join` keeps running: of a site's folder with its site.toml and the join file that it keeps."""
    from fedsb.deployment.join_file import KEPT, read_join_file

    join = read_join_file(folder / KEPT)
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(join.identity))
    directory = {name: bytes.fromhex(public) for name, public in join.directory.sites.items()}
    return SiteHandle(folder, load_site(folder / SITE), Identity(name=join.site, key=key, directory=directory))


def refuse_versions(theirs: Mapping[str, str]) -> None:
    """Raises UserError where a package is of another version than the coordinator's; a build's own mark aside."""
    ours = versions()
    other = [
        f"{name} {ours[name]} here, {theirs.get(name, 'none')} at the coordinator"
        for name in SAME
        if ours[name].partition("+")[0] != theirs.get(name, "none").partition("+")[0]
    ]
    if other:
        raise UserError("other versions than the coordinator's: " + "; ".join(other) + ". Install the same ones")


def refuse_base(theirs: Mapping[str, Any], part: Participant) -> None:
    """Raises UserError for another base model or tokenizer than the coordinator's."""
    ours = {"model": part.bench.base.fingerprint, "tokenizer": tokenizer_fingerprint(part.tokenizer)}
    for what, name in ours.items():
        if theirs[what] != name:
            raise UserError(
                f"another {what} than the coordinator's: {name} here ({part.bench.base.name}), {theirs[what]} there. "
                "Say where the right one is with model = 'FOLDER' in site.toml"
            )
