"""The server of a run: it starts the clients, runs the rounds, and ends the run. The same on every channel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsb.adapters.basis import Basis
from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.data.tasks.base import Example
from fedsb.methods.averaging import ServerOptimizer
from fedsb.methods.base import Method, State
from fedsb.privacy.ledger import Entry
from fedsb.protocol import schedule
from fedsb.protocol.compressor import build_compressor
from fedsb.protocol.messages import Finish, FinishReply, Start
from fedsb.protocol.payload import Payload, PayloadError, pack
from fedsb.protocol.requirements import client_ranks, open_secure_sums, privacy_policy_of
from fedsb.protocol.traffic import TrafficCounter, TrafficRecord
from fedsb.secagg.fixed_point import Doubles
from fedsb.server.basis import BasisRound
from fedsb.server.exchange import Exchange, reason_of
from fedsb.server.opened import OpenedFederation
from fedsb.server.replies import Replies
from fedsb.server.round import ServerRound, open_secagg
from fedsb.server.shared_state import SharedStateSync
from fedsb.server.spool import Spool
from fedsb.server.step import FederatedStep
from fedsb.server.validation import Dropped, update_rules, validate_updates
from fedsb.training.basis import draw_samples
from fedsb.training.gradients import captured_share
from fedsb.training.resolved import gradient_budget, share_rows
from fedsb.training.score import Score
from fedsb.utils.tensors import Tensors


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """The result of a round."""

    state: State
    cohort: Sequence[str]
    replies: Replies
    dropped: Sequence[Dropped]
    traffic: Sequence[TrafficRecord]


class Server:
    """The server of a run, over an opened federation.

    Args:
        note: receives lines for the user.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        run: str,
        opened: OpenedFederation,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config, self.method, self.run, self.opened, self.note = config, method, run, opened, note
        self.clients, self.data, self.trainer, self.channel = (
            opened.clients,
            opened.data,
            opened.trainer,
            opened.channel,
        )
        names = [client.name for client in self.clients]
        self.local = self.trainer.local
        self.ranks, rank_settings = client_ranks(config, method, self.trainer.shapes, names)
        self.rows = {client.name: client.rows for client in self.clients}
        self.policy = privacy_policy_of(config, method, self.rows, self.local)
        self.secure_sums = open_secure_sums(config, self.policy, run, self.rows)
        self.compressor = build_compressor(config, method, run)
        self.exchange = Exchange(self.channel, run, config.engine.deadline_s, note)
        self.secagg = open_secagg(self.exchange, self.secure_sums, opened.directory)
        self.counter = TrafficCounter(self.trainer.head.keys())
        self.shared_state = SharedStateSync(self.exchange, self.counter)
        self.optimizer_step = FederatedStep(self.local, self.trainer.adapted.head_keys)
        self.optimizer = ServerOptimizer(**config.server.optimizer_settings)
        self.share_rows, reason = share_rows(config, self.trainer.shapes)
        self.settings: tuple[ResolvedSetting, ...] = (
            *self.trainer.settings,
            *(
                []
                if self.share_rows or config.basis.share_samples == 0
                else [ResolvedSetting(key="basis.share_samples", value=0, reason=reason)]
            ),
            *self.data.choices,
            *rank_settings,
            *opened.settings,
            *self.policy.choices,
            *(self.secure_sums.settings_shown if self.secure_sums else ()),
        )

    # --- the life of a run ---

    def start(self) -> tuple[State, Basis | None, list[TrafficRecord]]:
        """Starts the clients and makes the basis. Returns the first state, the basis, and what travelled."""
        for name, reply in self.exchange.all(Start(run=self.run, rows=self.rows)).items():
            self.shared_state.by_client[name] = reply.shared
        basis, round = None, BasisRound(self, None)
        if self.method.adapter == "core":
            basis = round.make()
        state = self.trainer.start_state(basis)
        if basis is None or not basis.R0:
            state = self.compressor.start(state)
        traffic = [*round.traffic, *self.shared_state.agree(state.shared, 0, residual=False)]
        return state, basis, traffic

    def with_captured_share(self, basis: Basis | None) -> Basis | None:
        """Returns the basis with its captured share of the clients' gradients, if their rows may be read."""
        config = self.config
        count = self.share_rows
        if basis is None or not count or self.policy or not self.channel.spec.holds_rows:
            return basis
        captured = captured_share(
            self.trainer.adapted,
            self.trainer.task,
            self.trainer.head,
            basis,
            self._samples(count, from_the_end=True),
            config.train.batch_size,
            gradient_budget(config, self.trainer.adapted.device),
            self.method.total_rank // self.method.rank,
        )
        return replace(basis, captured=captured)

    def refresh(self, state: State) -> tuple[State, list[TrafficRecord]]:
        """Returns the state with a new basis, made at the current state, and the traffic for it."""
        round = BasisRound(self, state)
        round.send_state()
        basis = round.make()
        new = self.method.refresh(state, self.trainer.shapes, basis, self.config.seed)
        traffic = [*round.traffic, *self.shared_state.agree(new.shared, state.round + 1, residual=True)]
        return new, traffic

    def run_round(
        self, state: State, *, cohort: Sequence[str] | None = None, score: bool = False, spool: Path | None = None
    ) -> RoundResult:
        """Runs the round that starts at `state`: sample, broadcast, train, validate, aggregate.

        Args:
            cohort: takes the place of the sampled clients, whatever server.min_clients says.
            score: whether the clients report the score of their own trained model.
            spool: a folder with room for all updates.

        Raises RunError where fewer than server.min_clients updates are good.
        """
        config, method = self.config, self.method
        traffic: list[TrafficRecord] = []
        if state.round in schedule.refreshes(config, method):
            state, traffic = self.refresh(state)
        settings = config.server
        if cohort is not None or self.secure_sums:  # a sum is one update, and ensures itself that enough are in it
            settings = settings.model_copy(update={"min_clients": 1})
        missed = frozenset[str]()
        if cohort is None:
            cohort = schedule.sample(list(self.rows), state.round, config)
            missed = frozenset(cohort) - frozenset(schedule.sample(list(self.rows), max(state.round - 1, 0), config))
        view = self.compressor.client_view(method, state)
        replies = Replies()
        round = ServerRound(self, state, view, missed=missed if state.round else frozenset(), score=score)
        rules = update_rules(
            method,
            view,
            settings,
            self.run,
            round.shared_hash,
            ranks=round.ranks,
            judge_norms=config.privacy.unit != "client",
            rows=self.rows,
            steps={name: self.local.steps_for(rows) for name, rows in self.rows.items()},
            part=self.compressor.part(state.round) if self.secagg is None else None,
        )
        if self.secagg is None:
            updates, dropped = validate_updates(
                round.each(round.answers(cohort), replies), rules, Spool(spool), replies.dropped
            )
            used: Sequence[str] = [update.client for update in updates]
            moments: Tensors = {}
        else:
            payload, used, moments = self._summed(round, cohort, replies)
            updates, dropped = validate_updates([payload], rules, Spool(spool), replies.dropped)
        after = method.aggregate(view, self.policy.add_noise(updates, state.round), self.optimizer)
        after = replace(after, server={**after.server, **moments})
        settled = self.compressor.settle(method, state, view, after)
        settled = replace(settled, average=self._averaged(state, settled))
        return RoundResult(
            state=replace(settled, accepted={**state.accepted, **dict.fromkeys(used, settled.round)}),
            cohort=cohort,
            replies=replies,
            dropped=[*replies.dropped, *dropped],
            traffic=[*traffic, *replies.traffic],
        )

    def _averaged(self, before: State, after: State) -> Tensors:
        """Returns the mean of the trained tensors after the last rounds, those of server.average_last."""
        rounds = self.config.rounds
        first = rounds - math.floor(rounds * self.config.server.average_last)  # the last round before them
        if after.round <= first:
            return {}
        count = after.round - first
        return {key: before.average[key].lerp(x, 1 / count) if count > 1 else x for key, x in after.tensors.items()}

    def result(self, state: State) -> State:
        """Returns the state whose model is scored and exported: with the average in place of the last tensors."""
        own = state.average
        held = {key: x for key, x in own.items() if key in state.shared}  # a factor that clients hold
        return replace(state, tensors={**state.tensors, **own}, shared={**state.shared, **held}) if own else state

    def _summed(
        self, round: ServerRound, cohort: Sequence[str], replies: Replies
    ) -> tuple[tuple[str, bytes], Sequence[str], Tensors]:
        """Returns (the sum of a round as one update, the clients in it, the moments of a step with shared noise)."""
        from fedsb.protocol.secure_sum import SUM

        terms, found, shared = round.summed(cohort, replies)
        moments: Tensors = {}
        if terms.step is None:
            vector = shared.baseline_vector + (found.values / found.weight).astype(np.float32)
        else:
            gradient = self.mean_gradient(terms.step.q, found.values, found.survivors)
            sent, moments = self.optimizer_step.take(shared, gradient, round.state.server)
            vector = shared.layout.flatten(sent).numpy()
        return (SUM, terms.payload(vector, found.weight, shared.layout)), found.survivors, moments

    def mean_gradient(self, q: float, total: Doubles, clients: Sequence[str]) -> Tensor:  # (P,)
        """Returns the noised sum of a step over the number of rows that these clients are expected to draw.

        That number is public, unlike the number of rows that they have drawn.
        """
        return torch.from_numpy(total / (q * sum(self.rows[name] for name in clients)))

    def finish(self, state: State, card: Mapping[str, str]) -> dict[str, Score]:
        """Ends the run at every client: it receives the final model and scores it. Returns the clients' scores."""
        tensors = self.method.broadcast(state, missed_last_round=True)
        payload = pack(Payload.of(tensors, kind="broadcast", run=self.run, round=state.round))
        request = Finish(run=self.run, card=dict(card), parts=(payload,))
        scores: dict[str, Score] = {}
        last = {name: request.model_copy(update={"state_round": state.accepted.get(name, 0)}) for name in self.rows}
        for name, reply in self.exchange.each(last, patient=True, what="The end of the run"):
            try:
                if not isinstance(reply, FinishReply):
                    raise PayloadError(reason_of(reply))
                self.copy_ledger(name, reply.entries)
            except PayloadError as error:
                self.note(f"{name} may not have the final adapter: {error}")
                continue
            if reply.score is not None:
                scores[name] = Score(value=reply.score, count=reply.held_out)
        return scores

    # --- for the rounds ---

    @property
    def probes(self) -> list[Example]:
        """Some examples to compare an exported adapter on."""
        return (self.data.test or self.clients[0].train)[:4]

    def entries_since(self, name: str, round: int) -> int:
        """Returns the round from which on entries of a client's own ledger may be unknown here, in this round.

        It is not later than the round, which may be a repeated one, charged again.
        """
        if self.policy.unit != "example":
            return 0
        return min(self.policy.mechanisms[name].ledger.last_round + 1, round)

    def copy_ledger(self, name: str, entries: Sequence[Mapping[str, Any]], since: int = 0) -> None:
        """Copies the entries of a client's own ledger, so that epsilon is known here too.

        `entries` are those of round `since` and later ones.

        Raises PayloadError for entries that are not those of this client.
        """
        if self.policy.unit == "example" and entries:
            try:
                self.policy.mechanisms[name].ledger.copy((Entry(**entry) for entry in entries), since)
            except (TypeError, ValueError) as error:
                raise PayloadError(f"the entries of its ledger are not valid: {error}") from error

    def pooled_rows(self, count: int, *, from_the_end: bool = False) -> list[Example]:
        """Returns `count` rows of all clients together; only where they are in this process."""
        return [row for own in self._samples(count, from_the_end=from_the_end).values() for row in own]

    def _samples(self, count: int, *, from_the_end: bool) -> dict[str, list[Example]]:
        total, seed = sum(self.rows.values()), self.config.seed
        return {
            client.name: draw_samples(client, total, count, seed, from_the_end=from_the_end) for client in self.clients
        }
