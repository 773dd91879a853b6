"""The client's side of the protocol, on every channel.

A client passes through three stages, each a type of its own:

    DescribedClient   has read its table; the classes of the run are not known yet
    PreparedClient    has the classes, its tokenised rows and the base model
    StartedClient     has its privacy policy and ledger in force, and answers the requests of rounds

In one process the tables of all clients are opened together, so a client begins as PreparedClient, and all share one
trainer and one memo, so that equal results are computed once. On a site the
handler (handler.py) applies the site's policy before each request and saves the state after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedsb.adapters.layout import Layout
from fedsb.client.checks import fitting, refuse_values
from fedsb.client.memo import Memo
from fedsb.client.round import ClientRound
from fedsb.client.secure_sum import SecAggSession
from fedsb.client.shared_state import ClientSharedState
from fedsb.client.store import ClientStore, StoredRound
from fedsb.config.schema import Config
from fedsb.data.clients import ClientData, prepare_client_data
from fedsb.data.rows import Table
from fedsb.data.tasks.base import Task
from fedsb.data.tasks.tokens import Tokenizer
from fedsb.methods.base import Method
from fedsb.privacy.policy import PrivacyPolicy
from fedsb.privacy.shared import sends_moments
from fedsb.protocol.compressor import build_compressor
from fedsb.protocol.messages import (
    BasisGradient,
    CompareShared,
    CompareSharedReply,
    GetShared,
    GetSharedReply,
    NoKeys,
    Refresh,
    RefreshReply,
    Reply,
    Request,
    SecAggPhase,
    SecAggReply,
    SetBasis,
    SetBasisReply,
    SetShared,
    SetSharedReply,
    Stale,
    Train,
    TrainReply,
    finite,
)
from fedsb.protocol.payload import Payload, PayloadError, pack, unpack
from fedsb.protocol.tensors import shape_mismatch, under, within
from fedsb.training.joint import ClientTraining
from fedsb.training.trainer import Trainer
from fedsb.utils.errors import RefusalError
from fedsb.utils.tensors import Tensors

CheckUpload = Callable[[Payload, int], None]  # of the update and its size in bytes


@dataclass(frozen=True, kw_only=True)
class DescribedClient:
    """A client that has read its table."""

    name: str
    run: str
    config: Config
    method: Method
    task: Task
    tokenizer: Tokenizer
    table: Table

    @property
    def labels(self) -> list[Any]:
        return self.task.labels_in(self.table.rows)

    def prepare(self, label_names: list[str], class_names: list[str] | None) -> PreparedClient:
        """Tokenises the rows and loads the base model; the classes are those of all clients."""
        if class_names is not None and len(class_names) != len(label_names):
            raise RefusalError(f"The coordinator sends {len(class_names)} names for {len(label_names)} classes.")
        self.task.take_classes({"label_names": label_names, "class_names": class_names})
        data, cut, unused = prepare_client_data(self.config, self.task, self.name, self.table)
        trainer = Trainer(self.config, self.method, self.tokenizer, self.task)
        trainer.check_rows([*data.train, *data.held_out])
        return PreparedClient(run=self.run, data=data, trainer=trainer, memo=Memo(), cut=cut, unused=unused)


@dataclass(frozen=True, kw_only=True)
class PreparedClient:
    """A client whose rows are tokenised and whose base model is loaded."""

    run: str
    data: ClientData
    trainer: Trainer
    memo: Memo
    cut: int = 0  # rows that were shortened to the model's maximum length
    unused: int = 0  # rows that are too short or too long for the task

    def check_rows(self, rows: Mapping[str, int]) -> None:
        """Raises RefusalError if the server states a wrong number of rows for this client."""
        if rows.get(self.data.name) != self.data.rows:
            raise RefusalError(
                "The coordinator states another number of rows than this site has. If the file has changed since the "
                "run began, restore the old one, or start a new run."
            )

    def start(
        self,
        rows: Mapping[str, int],
        store: ClientStore,
        policy: PrivacyPolicy,
        secagg: SecAggSession | None,
        check_upload: CheckUpload = lambda payload, size: None,
    ) -> StartedClient:
        """Returns the client with its policy in force.

        Args:
            rows: the number of rows of each client, by name.
            check_upload: raises RefusalError for an update that must not leave.
        """
        return StartedClient(
            run=self.run,
            data=self.data,
            trainer=self.trainer,
            memo=self.memo,
            all_rows=sum(rows.values()),
            store=store,
            policy=policy,
            secagg=secagg,
            check_upload=check_upload,
        )


@dataclass(frozen=True, kw_only=True)
class LocalRound:
    """A client's part of a round, between the broadcast and its training."""

    client_round: ClientRound
    training: ClientTraining
    client_state: Tensors  # before the round
    state_round: int  # the round after which client_state was stored
    score: bool  # whether to score the trained model on the held-out rows
    cohort: Sequence[str] = ()  # of the secure sum
    done: StoredRound | None = None  # the stored answer, if this client has already answered this broadcast


@dataclass(frozen=True, kw_only=True)
class StartedClient(ClientSharedState):
    """A client in a run whose policy is in force: its shared state (shared_state.py), and its part of the rounds."""

    secagg: SecAggSession | None
    check_upload: CheckUpload

    def answer(self, request: Request[Any]) -> Reply:
        """Answers one request of a run that has started."""
        match request:
            case BasisGradient():
                return self.basis_gradient(request)
            case SetBasis():
                return SetBasisReply(shared=self.set_basis(request))
            case CompareShared():
                return CompareSharedReply(shared=self.compare_shared(request))
            case GetShared():
                return GetSharedReply(parts=(self.derived_basis(),))
            case SetShared():
                return SetSharedReply(shared=self.set_shared(unpack(request.payload).tensors))
            case Refresh():
                return RefreshReply(shared=self.refresh(request))
            case Train():
                return self.train(request)
            case SecAggPhase():
                return self.secagg_phase(request)
        raise RefusalError(f"Request {request.verb!r} is not for a client of a run that has started.")

    # --- a round ---

    def train(self, request: Train) -> TrainReply | Stale | NoKeys:
        """Trains for one round."""
        begun = self.begin(request)
        if not isinstance(begun, LocalRound):
            return begun
        if begun.done is not None:
            return self._reply(begun, begun.done)
        method, round = begun.client_round.method, begun.client_round.round
        (trained,) = self.trainer.train([begun.training], method, round, self.policy)
        return self.finish(begun, trained)

    def begin(self, request: Train) -> LocalRound | Stale | NoKeys:
        """Returns the client's round, or what this client lacks: the state to which the broadcast adds, or keys.

        A round is done once. A repeated broadcast gets the stored answer. A different broadcast for the same round, or
        a round that the run does not have, raises RefusalError.
        """
        payload = self.memo.get(("payload", request.payload), lambda: unpack(request.payload))
        if not 0 <= payload.round < self.config.rounds:
            raise RefusalError(f"Round {payload.round + 1} of a run of {self.config.rounds} rounds.")
        if (self.secagg is None) != (request.sum is None):
            on, asked = ("false", "masked") if self.secagg is None else ("true", "single")
            raise RefusalError(f"server.secure_aggregation = {on}, but the request asks for a {asked} update.")
        if self.secagg is not None and request.sum is not None:
            if not self.secagg.has_keys(request.sum.attempt):
                return NoKeys()
            self.secagg.check_sum(request.sum, payload.round)
        client_round = self._receive(payload, request)
        if client_round is None:
            return Stale(shared=self.start_view().hash)
        state = self.store.client_state(request.state_round)
        with fitting():
            tensors = client_round.start(state)
        moments = client_round.moments or within("optimizer", state)
        training = ClientTraining(name=self.data.name, examples=self.data.train, tensors=tensors, moments=moments)
        done = self._answered(client_round, request.total_rank)
        return LocalRound(
            client_round=client_round,
            training=training,
            client_state=state,
            state_round=request.state_round,
            score=request.score,
            cohort=request.sum.cohort if request.sum is not None else (),
            done=done,
        )

    def finish(self, begun: LocalRound, trained: ClientTraining) -> TrainReply:
        """Makes the update of a trained client, and stores what the client keeps."""
        if trained.share is None:
            done, state = self._update(begun, trained)
        else:
            done, state = StoredRound(payload=b"", loss=trained.loss, change=trained.share.numpy()), {}
        self.store.save_round(begun.client_round, state, done, begun.state_round)
        return self._reply(begun, done)

    def _update(self, begun: LocalRound, trained: ClientTraining) -> tuple[StoredRound, Tensors]:
        """Returns (the update of a trained client, the client's own state)."""
        client_round, method = begun.client_round, begun.client_round.method
        sent, own = method.upload(begun.training.tensors, trained.tensors, client_round.round)
        sent = self.policy.clip_update(sent, client_round.baseline)
        vector = client_round.layout.flatten(sent).numpy()
        payload = client_round.payload(self.run, self.data, client_round.layout, vector)
        compressor = build_compressor(self.config, self.method, self.run)
        baseline, change = client_round.baseline_vector, None
        if self.secagg is None:
            data, feedback = compressor.update(method, payload, baseline, begun.client_state)
        else:
            data = pack(payload)  # what is checked before its change leaves
            change, feedback = compressor.change(payload, baseline, begun.client_state)
        keeps = self.trainer.local.keep_optimizer
        state = under("method", own) | (under("optimizer", trained.moments) if keeps else {}) | feedback
        scored = begun.score and self.data.held_out and self.policy.may_release("scores")
        done = StoredRound(
            payload=data,
            loss=trained.loss,
            change=change,
            score=self.trainer.evaluate(trained.tensors, self.data.held_out).value if scored else None,
        )
        return done, state

    def secagg_phase(self, request: SecAggPhase) -> SecAggReply | NoKeys:
        """Answers one phase of secure aggregation."""
        if self.secagg is None:
            raise RefusalError("server.secure_aggregation = false: this run has no secure aggregation.")
        message = self.secagg.answer(request)
        return NoKeys() if message is None else SecAggReply(parts=(message,))

    def final_tensors(self, payload: Payload, state_round: int) -> Tensors:
        """Returns the tensors of this client's final model, from the last broadcast and its state after a round."""
        message = payload.tensors
        shared = self.method.update_shared(self.start_view().shared, message)
        own = within("method", self.store.client_state(state_round)) if self.method.spec.own_models else {}
        with fitting():
            tensors = self.method.init_client(shared, message, own, payload.round)
            self._check_tensors(tensors)
        return tensors

    # --- private ---

    def _reply(self, begun: LocalRound, done: StoredRound) -> TrainReply:
        loss = finite(done.loss) if self.policy.may_release("loss") else None
        score = finite(done.score) if self.policy.may_release("scores") else None
        if self.secagg is None:
            return TrainReply(loss=loss, score=score, parts=(done.payload,))
        assert done.change is not None
        client_round, before = begun.client_round, self.secagg.survivors(begun.client_round.round)
        if self.policy.shared_noise:  # what is sent has no other form than the masked one
            layout = Layout.of(client_round.trained)
            self.check_upload(client_round.payload(self.run, self.data, layout, done.change), 4 * layout.size)
        else:
            self.check_upload(unpack(done.payload), len(done.payload))
        # The change stays here; `left` says why, if it does not go into the sum.
        masked, left = self.secagg.mask(client_round, done.change, begun.cohort)
        return TrainReply(loss=loss, score=score, left=left, survivors=before, parts=() if left else (masked,))

    def _receive(self, payload: Payload, request: Train) -> ClientRound | None:
        keeps_view = build_compressor(self.config, self.method, self.run).keeps_view(self.method)
        if (view := self.store.view(payload.round)) is None:
            view = self.start_view()
            if view.needs_whole(payload):
                return None

        def receive() -> ClientRound | None:
            found = view.receive(self.method, payload, request.total_rank, keeps=keeps_view)
            if found is not None:  # checked once, before a row is drawn for it
                tensors = found.start({})
                self._check_tensors(tensors)
                refuse_values(tensors)
                found = replace(found, second_moments=request.second_moments)
                found.check_moments(expected=sends_moments(self.config, self.method))
            return found

        with fitting():
            return self.memo.get(("round", view, *request.parts, request.total_rank), receive)

    def _answered(self, client_round: ClientRound, total_rank: int | None) -> StoredRound | None:
        """Returns the stored answer to this broadcast. None: there is none yet; an interrupted round is trained again.

        Raises RefusalError if the round was done for another broadcast: a second update of the same rows would let a
        coordinator compare the two.
        """
        if not self.store.keeps_answers:
            return None
        round, received = client_round.round, f"{client_round.broadcast_hash} {total_rank}"
        if (known := self.store.answered(round)) is None:
            self.store.save_answered(round, received)
            return None
        if known != received:
            raise RefusalError(
                f"Round {round + 1} was done here for another broadcast, and a site does each round once. If the "
                "coordinator lost its newest checkpoint, start a new run."
            )
        done = self.store.stored_round(round + 1)
        if done is None and self.store.answered(round + 1) is not None:
            raise RefusalError(
                f"Round {round + 1} was done here, and its answer is not stored any more. A site does each round once. "
                "If the coordinator lost its newest checkpoints, start a new run."
            )
        return done

    def _check_tensors(self, tensors: Tensors) -> None:
        """Raises PayloadError for tensors with other names or shapes than those of this run."""
        found = {key: tuple(x.shape) for key, x in tensors.items()}
        if reason := shape_mismatch(found, self.trainer.adapted.sizes(tensors)):
            raise PayloadError(reason)
