"""A site in one run: the base model, its rows, its policy, and its part of every round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsb.adapters.adapted import Shapes, Tensors
from fedsb.adapters.basis import Basis, basis_hash
from fedsb.adapters.residual import is_delta
from fedsb.client.policy import SiteConfig, cap_of, refuse_columns, refuse_labels
from fedsb.client.round import ClientRound, at_rank
from fedsb.client.secure_sum import SecAggSession
from fedsb.client.store import Answer, Pending, Store
from fedsb.config.schema import Config
from fedsb.data.clients import build_task, prepare_client_data, remote_client
from fedsb.data.tables import load_client_table
from fedsb.methods import build_method
from fedsb.methods.base import State
from fedsb.models.tokenizer import load_tokenizer
from fedsb.privacy.accounting import Release
from fedsb.privacy.ledger import read_ledger
from fedsb.privacy.policy import PrivacyPolicy, build_privacy_policy
from fedsb.privacy.statement import epsilon_spent
from fedsb.protocol.compressor import build_compressor, read_change
from fedsb.protocol.payload import Payload, PayloadError, unpack
from fedsb.protocol.schedule import participation
from fedsb.protocol.tensors import change_of, to_tensors
from fedsb.runs.artifacts import write_adapters
from fedsb.server.validation import fault_of_shapes
from fedsb.training.basis import core_sums, inner_basis, outer_basis, whole_basis
from fedsb.training.joint import Member
from fedsb.training.resolved import local_training, open_sums
from fedsb.training.trainer import Trainer
from fedsb.utils.errors import RefusalError
from fedsb.utils.files import keyed_fingerprint, safe_name

LARGEST = 1e6  # of the values that a site is told
ORTHONORMAL = 1e-3  # by which the entries of A A' and B'B may differ from those of the identity


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who a site is in its federation, and whom it believes to be the others."""

    name: str
    key: Ed25519PrivateKey
    directory: Mapping[str, bytes]  # name -> Ed25519 public key of every site


class Participant:
    """Of a run that this site takes part in. Raises UserError for data, or a base model, that do not fit."""

    def __init__(self, folder: Path, settings: SiteConfig, identity: Identity, config: Config, run: str) -> None:
        self.settings, self.identity, self.run = settings, identity, run
        own = {"name": settings.model or config.model.name, "device": settings.device}
        self.config = config.model_copy(update={"model": config.model.model_copy(update=own)})
        self.method = build_method(config.method.name, config.method.options)
        self.link, self.local = build_compressor(config, self.method, run), local_training(config)
        self.store, self.folder = Store(folder), folder
        self.tokenizer = load_tokenizer(self.config.model)
        self.task = build_task(self.config, self.tokenizer)
        refuse_columns(settings, self.task.needs)
        self.table = table = load_client_table(
            self.config,
            self.task,
            settings.data,
            settings.columns,
            allowed=settings.allow.columns,
            revision=settings.revision,
            split=settings.split,
            form=settings.form,
        )
        self.labels = self.task.labels_in(table.rows)
        refuse_labels(settings.allow, self.labels, len(table.rows))
        self.sums: SecAggSession | None = None
        self._promise: PrivacyPolicy | None = None

    def close(self) -> None:
        """Lets go of the ledger."""
        if self._promise is not None:
            self._promise.close()
        self._promise = None

    @property
    def policy(self) -> PrivacyPolicy:
        """In force from the start on. Raises RefusalError before it: until then nothing is made of a row."""
        if self._promise is None:
            raise RefusalError(
                "this site has not started this run, so nothing protects its rows: ask it to start first"
            )
        return self._promise

    @property
    def fingerprint(self) -> str:
        """The fingerprint of this site's rows in this run. Only this site can make it, so it confirms no guess."""
        key = self.identity.key.private_bytes_raw()
        return keyed_fingerprint(key, f"{self.run} {self.table.fingerprint}")

    # --- before the first round ---

    def open(self, label_names: list[str], class_names: list[str] | None = None) -> None:
        """Reads rows and base model; the classes are those of all sites."""
        if class_names is not None and len(class_names) != len(label_names):
            raise RefusalError(f"The coordinator sends {len(class_names)} names for {len(label_names)} classes.")
        self.task.take_classes({"label_names": label_names, "class_names": class_names})
        self.site, self.cut, self.unused = prepare_client_data(self.config, self.task, self.identity.name, self.table)
        self.trainer = Trainer(self.config, self.method, self.tokenizer, self.task)
        self.trainer.check_rows([*self.site.train, *self.site.held_out])

    def start(self, rows: Mapping[str, int]) -> str | None:
        """Makes the policy and the ledger, and what is held in common; its hash, None where a basis has to come."""
        self.close()
        if rows.get(self.identity.name) != self.site.rows:
            raise RefusalError(
                "this site has another number of rows than the coordinator says; if its file has changed since the run "
                "began, bring back the old one, or begin a new run"
            )
        sites, held = [remote_client(name, count) for name, count in rows.items()], self.store.common()
        steps, rounds = {name: self.local.steps_for(rows[name]) for name in rows}, participation(rows, self.config)
        policy = build_privacy_policy(self.config, self.method, rows, steps, self.local.rows_a_step, rounds)
        cap = None
        if policy.unit == "example":
            plan = policy.plans[self.identity.name]
            policy.plans = {self.identity.name: plan}
            cap = cap_of(self.settings.allow, plan, self._released_before())
        sums = open_sums(self.config, policy, self.run, sites)
        own = None if sums is None else SecAggSession(sums, self.store, self.identity, self.settings.allow)
        if own is not None and held is None:
            own.keys(list(rows))  # before it has trained for a sum that it would leave
        policy.open_ledgers(self.folder, self.run, new=held is None, cap=cap)
        self.rows, self.sums, self._promise = rows, own, policy
        if held is not None:
            return self._hold(held)
        if self.method.adapter == "core" and self.config.basis.kind not in ("random", "weights"):
            return None
        return self.hold(self._state(self._derived() if self.method.adapter == "core" else None).shared)

    def basis_sums(self) -> tuple[bytes, float]:
        """Returns the envelope of this site's S of a `core` basis, and the number of rows in it.

        It is made once: a second request gets the stored one. Raises RefusalError for a basis of another kind.
        """
        if self.method.adapter != "core" or self.config.basis.kind != "core":
            raise RefusalError(f"basis.kind = {self.config.basis.kind!r} looks at no row of a site")
        if (stored := self.store.basis_sums()) is not None:
            return stored
        mechanisms = self.policy.row_mechanisms()
        own, rows = core_sums(
            self.config.basis,
            self.trainer.adapted,
            self.task,
            self.site,
            sum(self.rows.values()),
            self.trainer.head,
            self._outer(),
            mechanisms[self.identity.name] if mechanisms else None,
            seed=self.config.seed,
            round=0,
            batch_size=self.config.train.batch_size,
        )
        envelope = self.link.basis("up", self.identity.name, 0, own, self.link.codec)
        self.store.save_basis_sums(envelope, rows)
        return envelope, rows

    def basis(self, envelope: bytes) -> str:
        """Takes the basis as it was told to all sites; the hash of what is held in common from now on."""
        told = to_tensors(unpack(envelope).tensors)
        kind = self.config.basis.kind
        A, B = inner_basis(told, self._outer()) if kind == "core" else whole_basis(told, self.trainer.shapes)
        return self.hold(self._state(Basis(kind=kind, A=A, B=B)).shared)

    def hold(self, common: Tensors) -> str:
        """Takes `common` as what is held in common at the start.

        Raises RefusalError for values out of range, and for a basis that is not orthonormal.
        """
        refuse_values(common)
        if self.method.adapter == "core":
            refuse_basis(common, self.trainer.shapes)
        self.store.save_common(common)
        return self._hold(common)

    @property
    def holds(self) -> str:
        """The hash of what is held in common."""
        return self._hashed[1]

    # --- a round ---

    def round(self, envelope: bytes, rank: int | None) -> Answer | None:
        """Trains for one round and returns what this site sends; None if it lacks what the broadcast adds to.

        A round is done once. A request for the same broadcast gets the stored answer; another broadcast for a round
        that was done, or a round that the run does not have, raises RefusalError.
        """
        payload = unpack(envelope)
        if not 0 <= payload.round < self.config.rounds:
            raise RefusalError(f"round {payload.round + 1} of a run of {self.config.rounds}")
        if (heard := self._hear(payload, envelope)) is None:
            return None
        common, message, held_tensors = heard
        if self._hash(common) != payload.basis:
            return None
        turn = ClientRound(at_rank(self.method, rank), common, message, payload.round, payload.basis)
        kept, after = self.store.kept(payload.round), payload.round + 1
        with fitting():  # before a row is drawn for it
            before = turn.member(self.site, kept)
            self._check(before.tensors)
            told = basis_hash(turn.method.init_client(common, message, {}, payload.round)) + f" {rank}"
        refuse_values(before.tensors)
        answer = self._answer(payload.round, told)
        if answer is None:
            answer, own = self._train(turn, before, kept)
            changed = {key: x for key, x in common.items() if x is not self._start.get(key)}
            self.store.save_round(after, own, changed, held_tensors, answer)
        self._heard = after, common, held_tensors
        if answer.change is not None:
            self.store.save_pending(Pending(payload.round, turn.basis, turn.against, answer.change))
        return answer

    def _answer(self, round: int, told: str) -> Answer | None:
        """Returns the stored answer to this broadcast; None if there is none yet. Raises RefusalError if the round was
        done for another broadcast: a second update of the same rows would let a coordinator compare the two."""
        if (known := self.store.answered(round)) is None:
            self.store.save_answered(round, told)
            return None
        if known != told:
            raise RefusalError(
                f"round {round + 1} was done here for another broadcast, and a site does each round once. If the "
                "coordinator lost its newest checkpoint, start a new run"
            )
        return self.store.answer(round + 1)

    def _train(self, turn: ClientRound, before: Member, kept: Tensors) -> tuple[Answer, Tensors]:
        """Returns what this site sends after its training, and what it keeps."""
        (after,) = self.trainer.train_group(turn.method, [before], self.local, turn.round, self.policy)
        sending = turn.sending(
            before,
            after,
            self.site.rows,
            kept,
            link=self.link,
            policy=self.policy,
            keep_optimizer=self.local.keep_optimizer,
        )
        change = None if self.sums is None else change_of(sending.tensors, turn.unmoved)
        return Answer(sending.envelope, after.loss, change), sending.kept

    # --- the end ---

    def finish(self, envelope: bytes, facts: Mapping[str, str], *, tells: bool) -> float | None:
        """The final model's score on this site's held-out rows; it is kept here as a plain adapter.

        Where no score may be told no row is looked at: that the request failed would tell of one.
        """
        payload = unpack(envelope)
        message = to_tensors(payload.tensors)
        common = self.method.update_shared(self._start, message)
        with fitting():
            tensors = self.method.init_client(common, message, {}, payload.round)
            self._check(tensors)
        score = self.trainer.evaluate(tensors, self.site.held_out).value if self.site.held_out and tells else None
        write_adapters(self.trainer, {self.folder / "adapter": tensors}, facts, self.site.train[:4] if tells else [])
        del self.trainer  # its layers are the base's own again
        return score

    def _released_before(self) -> list[Release]:
        """In other runs, of this site's rows."""
        ledger = Path("privacy") / f"{safe_name(self.identity.name)}.jsonl"
        others = [path for path in self.folder.parent.glob(f"*/{ledger}") if path != self.folder / ledger]
        return [entry.release for path in sorted(others) for entry in read_ledger(path)]

    def entries(self) -> list[dict[str, Any]]:
        """What this site's ledger says."""
        if self.policy.unit != "example":
            return []
        path = self.folder / "privacy" / f"{safe_name(self.identity.name)}.jsonl"
        return [vars(entry) for entry in read_ledger(path)]

    def spent(self) -> float | None:
        """Epsilon of this site's rows so far, by its ledger; None where it makes no policy of its own."""
        return epsilon_spent(self.policy) if self.policy.unit == "example" else None

    # --- the inside ---

    def _check(self, tensors: Tensors) -> None:
        """Raises PayloadError for tensors with other names or shapes than this run's."""
        found = {key: tuple(x.shape) for key, x in tensors.items()}
        if fault := fault_of_shapes(found, self.trainer.adapted.sizes(tensors)):
            raise PayloadError(fault)

    def _hear(self, payload: Payload, envelope: bytes) -> tuple[Tensors, Tensors, Tensors] | None:
        """(what is held in common from now on, the message, what the next change is added to)."""
        message, before = to_tensors(payload.tensors), self._after(payload.round)
        coded = payload.codec != "float32"
        if before is None:
            if coded or any(is_delta(key) for key in message):
                return None
            before = self._start, {}
        common, last = before
        if coded:
            message = read_change(last, envelope)
        added_to = {**last, **message} if self.link.codec != "float32" else {}
        return self.method.update_shared(common, message), message, added_to

    def _after(self, rounds: int) -> tuple[Tensors, Tensors] | None:
        """(common, what a change is added to) as they were after so many rounds."""
        if self._heard[0] == rounds:
            return self._heard[1:]
        found = self.store.round(rounds)
        return None if found is None else (self._with(found[1]), found[2])

    def _with(self, changed: Tensors) -> Tensors:
        return {**self._start, **changed}

    def _hold(self, common: Tensors) -> str:
        known = (
            self._state(None).tensors if self.method.adapter == "factors" else {}
        )  # a core's start comes with a round
        self._start, self._heard = common, (0, common, known)
        self._hashed = common, basis_hash(common)
        return self._hashed[1]

    def _hash(self, common: Tensors) -> str:
        """Made anew only where a tensor has changed."""
        known, name = self._hashed
        if known.keys() != common.keys() or any(known[key] is not x for key, x in common.items()):
            name = basis_hash(common)
            self._hashed = (common, name)
        return name

    def _state(self, basis: Basis | None) -> State:
        """As the coordinator starts."""
        return self.method.start(self.trainer.shapes, basis, self.trainer.head, self.config.seed)

    def _derived(self) -> Basis:
        return self.trainer.make_basis(self.trainer.head, self.local, self.site.rows)

    def _outer(self) -> dict[str, Any]:
        rank = self.method.total_rank
        return outer_basis(self.config.basis, self.trainer.adapted, rank, self.config.seed, 0)


def refuse_values(tensors: Tensors) -> None:
    """Raises RefusalError for what a coordinator sent, if it holds values that are not finite or out of range."""
    for key, x in tensors.items():
        if x.is_floating_point() and x.numel() and not float(x.abs().max()) <= LARGEST:
            raise RefusalError(
                f"a broadcast holds values of {key!r} that are NaN, infinite or above {LARGEST:g}. It was discarded. "
                "The coordinator may lower its learning rate"
            )


def refuse_basis(common: Tensors, shapes: Shapes) -> None:
    """Raises RefusalError if a layer's B or A is missing, of another shape, or not orthonormal.

    A basis of another scale would scale every row's gradient.
    """
    for layer, (m, n) in shapes.items():
        B, A = common.get(f"{layer}.B"), common.get(f"{layer}.A")
        if A is None or B is None or A.ndim != 2 or A.shape[1] != n or B.shape != (m, len(A)):
            raise RefusalError(f"a basis whose tensors do not fit layer {layer!r}. It is not from this run")
        for gram in (A @ A.T, B.T @ B):
            if not float((gram - torch.eye(len(A))).abs().max()) <= ORTHONORMAL:
                raise RefusalError(
                    f"a basis that is not orthonormal in layer {layer!r}. This site accepts only orthonormal ones"
                )


@contextmanager
def fitting() -> Iterator[None]:
    """Raises RefusalError where a broadcast has other names or shapes than this run's."""
    try:
        yield
    except (ValueError, KeyError, RuntimeError) as error:
        raise RefusalError(f"a broadcast that is none of this run's: {type(error).__name__}: {error}") from error
