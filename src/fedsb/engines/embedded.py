"""The embedded engine: every client in this process, trained jointly, with the base model in memory once.

Nothing to set up. Messages still go through the envelope, byte for byte as they would over a network, and are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Literal

import torch

from fedsb.adapters.adapted import AdaptedModel, Tensors, find_targets
from fedsb.adapters.basis import Basis, basis_hash
from fedsb.adapters.layer import RoutingError
from fedsb.data.sites import Site, open_data
from fedsb.data.tasks.base import Example, pad_token
from fedsb.engines import Answer, Replies, Reply, Score, Sent, mean_of
from fedsb.engines.resolved import auto_cohort_size, local_training, open_sums, public_rows, targets_choice
from fedsb.errors import UserError
from fedsb.federation.basis_round import build_basis
from fedsb.federation.codec import Codec
from fedsb.federation.cohort import Member, join_tensors, train_together
from fedsb.federation.facts import client_ranks, refuse_what_facts_forbid
from fedsb.federation.gradients import load_nothing
from fedsb.federation.link import link_of, unmoved
from fedsb.federation.payload import Payload, unpack
from fedsb.federation.scoring import forward, measured
from fedsb.federation.tensors import to_arrays, to_tensors, under, within
from fedsb.methods.contract import Method, State
from fedsb.models.heads import head_start
from fedsb.models.load import load_base, load_tokenizer, matmul_precision
from fedsb.privacy.setup import promise_of, refuse_what_would_leak
from fedsb.settings import Choice, Config


class EmbeddedEngine:
    """Clients, data and base model of a configuration, in this process.

    Raises UserError, at the start, for whatever is wrong with the data, the model, or their fit.
    """

    def __init__(self, config: Config, method: Method, run: str) -> None:
        self.config = config
        self.method = method
        self.run = run
        refuse_what_facts_forbid(config, method)
        refuse_what_would_leak(config, method)
        self.tokenizer = load_tokenizer(config.model)
        self.data = open_data(config, self.tokenizer)
        self.task = self.data.task
        self.base = load_base(
            config.model,
            auto_class=self.task.auto_class,
            num_labels=len(self.task.label_names),
            pad_token=pad_token(self.tokenizer),
        )
        targets = find_targets(self.base.model, config.model.targets, self.base.head)
        self.adapted = AdaptedModel(
            self.base.model, kind=method.adapter, targets=targets, head=self.base.head, scale=method.scale
        )
        self.shapes = self.adapted.shapes
        self.head = head_start(self.adapted.head_tensors(), config.seed)
        self.sites: list[Site] = [self.data.pooled()] if method.facts.pools_data else self.data.taking_part
        self.local = local_training(config, clients=len(self.data.taking_part) if method.facts.pools_data else 1)
        self.promise = promise_of(config, method, self.sites, self.local)
        self.ranks, rank_choices = client_ranks(config, method, self.shapes, [site.name for site in self.sites])
        self.cohort_size, reason = self._choose_cohort_size()
        self.sums = open_sums(config, self.promise, run, self.sites)
        self.choices = (
            *self.base.choices,
            targets_choice(config, targets),
            *self.data.choices,
            *rank_choices,
            Choice(key="engine.cohort_size", value=self.cohort_size, reason=reason),
            *self.promise.choices,
            *(self.sums.choices if self.sums else ()),
        )

    # --- the verbs of an engine ---

    def build_basis(self, method: Method, state: State | None = None) -> tuple[Basis | None, list[Sent]]:
        """Makes B and A as the configuration asks, with what travelled for it; None for a method without a basis.

        With a `state`, they are made at the point that it has reached, which every site is told first.
        """
        sent: list[Sent] = []
        if method.adapter != "core":
            return None, sent
        round = 0 if state is None else state.round

        link = link_of(self.config, method, self.run)

        def send(direction: Literal["up", "down"], client: str, tensors: Tensors, codec: Codec = link.codec) -> Tensors:
            envelope = link.basis(direction, client, round, tensors, codec)
            if not method.facts.pools_data:  # the data are where the server is: nothing travels
                sent.append(
                    self._count(envelope, round + 1 if state is not None else 0, client, direction, kind="basis")
                )
            return to_tensors(unpack(envelope).tensors)

        start = self.head
        if state is not None:
            for site in self.sites:
                send("down", site.name, state.tensors, codec="float32")  # all must fold the same
            start = {**method.fold(state), **{key: state.tensors[key] for key in self.head}}
        basis = build_basis(
            self.config.basis,
            method,
            self.adapted,
            self.task,
            self.sites,
            start,
            public=public_rows(self.config, self.task),
            eta=self.local.lr * self.local.lr_factor(round, 0, self.local.steps_for(self.sites[0].rows))
            if self.config.basis.eta == "auto"
            else self.config.basis.eta,
            sign=self.local.optimizer == "adamw",
            seed=self.config.seed,
            round=round,
            batch_size=self.config.train.batch_size,
            send=send,
            guards=self.promise.of_rows(),
        )
        return basis, sent

    def train(
        self,
        method: Method,
        state: State,
        cohort: Sequence[str],
        kept: Mapping[str, Tensors],
        late: Set[str] = frozenset(),
    ) -> Replies:
        """One round: broadcast, local training, upload. `kept` is the clients' own state, theirs alone."""
        sites = {site.name: site for site in self.sites}
        ranks = {**self.ranks, **state.ranks}
        link = link_of(self.config, method, self.run)
        heard = link.heard(method, state)
        common = basis_hash(heard.common)
        messages: dict[tuple[bool, int | None], tuple[bytes, Tensors]] = {}  # clients that are told the same share them
        members: list[Member] = []
        for name in cohort:
            told = (name in late, ranks.get(name))
            if told not in messages:
                messages[told] = link.down(method, state, heard, basis=common, late=told[0], rank=told[1])
            message, own = messages[told][1], kept.get(name, {})
            received = at_rank(method, told[1]).receive(heard.common, message, within("method", own), state.round)
            members.append(
                Member(name=name, examples=sites[name].train, tensors=received, moments=within("optimizer", own))
            )

        def replies() -> Iterator[Answer]:
            due = self.config.eval.gap and self.config.eval.due(state.round + 1, self.config.rounds)
            before = {member.name: member for member in members}
            bases: dict[tuple[bool, int | None], Tensors] = {}  # what they would send that had not trained
            secure = self.sums.round(state.round, cohort, common) if self.sums else None
            for after in self._train(method, state, members, ranks):
                site, told = sites[after.name], (after.name in late, ranks.get(after.name))
                mine, (told_bytes, message) = at_rank(method, told[1]), messages[told]
                up, own = mine.upload(before[after.name].tensors, after.tensors, state.round)
                if told not in bases:
                    bases[told] = unmoved(mine, heard.common, message, state.round)
                up, base = self.promise.bounded(up, bases[told]), bases[told]
                payload = Payload(
                    kind="update",
                    run=self.run,
                    round=state.round,
                    client=after.name,
                    samples=site.rows,
                    basis=common,
                    tensors=to_arrays(up),
                )
                update, lost = link.up(method, payload, base, kept.get(after.name, {}))
                moments = under("optimizer", after.moments) if self.local.keep_optimizer else {}
                travelled = {"down": told_bytes, "up": update} if not method.facts.pools_data else {}
                reply = Reply(
                    client=after.name,
                    envelope=update,
                    kept=under("method", own) | moments | lost,
                    loss=after.loss if self.promise.shows("loss") else None,
                    own=self.evaluate(after.tensors, site.held_out).value if due and site.held_out else None,
                    sent=[self._count(data, state.round + 1, after.name, way) for way, data in travelled.items()],
                )
                if secure is None:
                    yield reply
                else:
                    secure.put(reply, up, base)
            if secure is not None:
                yield from secure.add_up()

        return Replies(replies())

    def _train(
        self, method: Method, state: State, members: Sequence[Member], ranks: Mapping[str, int]
    ) -> Iterator[Member]:
        """Trains the members, those of one rank together, `cohort_size` in one forward."""
        for rank in dict.fromkeys(ranks.get(member.name) for member in members):
            alike, own = [m for m in members if ranks.get(m.name) == rank], at_rank(method, rank)
            for start in range(0, len(alike), self.cohort_size):
                group = alike[start : start + self.cohort_size]
                with matmul_precision(self.config.model.matmul):
                    done = train_together(
                        self.adapted,
                        self.task,
                        group,
                        own.trainable(group[0].tensors, state.round),
                        self.local,
                        seed=self.config.seed,
                        round=state.round,
                        penalty=own.penalty,
                        guards=self.promise.of_rows(),
                    )
                yield from done

    def score(self, method: Method, state: State, kept: Mapping[str, Tensors]) -> Score | None:
        """The metric on the test rows, of the global model or the mean over the clients' own; None without rows."""
        if not self.data.test or not (self.data.test_is_public or self.promise.shows("scores")):
            return None
        if method.facts.global_model:
            return self.evaluate(method.model(state), self.data.test)
        scores = {
            site.name: self.evaluate(self.tensors_of(method, state, kept, site.name), self.data.test)
            for site in self.sites
        }
        return mean_of(scores)

    def score_sites(self, method: Method, state: State, kept: Mapping[str, Tensors]) -> dict[str, Score]:
        """The metric on each client's held-out rows, by its own model or the global one; unseen clients included."""
        scores: dict[str, Score] = {}
        if not self.promise.shows("scores"):
            return scores
        for site in self.data.sites:
            if site.held_out and (method.facts.global_model or not site.unseen):
                scores[site.name] = self.evaluate(self.tensors_of(method, state, kept, site.name), site.held_out)
        return scores

    def tensors_of(self, method: Method, state: State, kept: Mapping[str, Tensors], client: str) -> Tensors:
        """The model that a client ends with: the global one, or its own."""
        if method.facts.global_model:
            return method.model(state)
        own = within("method", kept.get(client, {}))
        return method.receive(state.common, method.broadcast(state), own, state.round)

    # --- the inside ---

    @torch.no_grad()
    def probe(self, tensors: Tensors) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Some inputs and the model's logits for them, to compare an exported adapter with."""
        self._load_one(tensors)
        logits, batch = forward(self.adapted.model, self.task, (self.data.test or self.sites[0].train)[:4])
        return {key: value for key, value in batch.items() if key != "labels"}, logits

    def evaluate(self, tensors: Tensors, examples: Sequence[Example]) -> Score:
        """The task's metric over the examples, with one client's tensors in the adapter."""
        self._load_one(tensors)
        with matmul_precision(self.config.model.matmul):
            found = measured(self.adapted.model, self.task, examples, self.config.eval.batch_size)
        return Score(value=found.pop(self.task.metric), count=len(examples), beside=found)

    def _load_one(self, tensors: Tensors) -> None:
        self.adapted.load(join_tensors(self.adapted, [tensors]))

    def _count(
        self, envelope: bytes, round: int, client: str, direction: str, kind: Literal["round", "basis"] = "round"
    ) -> Sent:
        payload = unpack(envelope)
        return Sent(
            round=round,
            client=client,
            direction="up" if direction == "up" else "down",
            kind=kind,
            values=payload.values,
            head_values=sum(array.size for key, array in payload.tensors.items() if key in self.head),
            bytes=payload.values_bytes,
            wire_bytes=len(envelope),
        )

    def _choose_cohort_size(self) -> tuple[int, str]:
        """(clients in one forward, reason). A model whose rows cannot be routed gets 1.

        Raises UserError where more were asked for and the rows cannot be routed.
        """
        wanted = self.config.engine.cohort_size
        if wanted == 1 or len(self.sites) == 1:
            return 1, "as asked" if wanted == 1 else "there is one client"
        fault = self._routing_fault()
        if fault is not None:
            if wanted != "auto":
                raise UserError(f"engine.cohort_size = {wanted}: {fault}")
            return 1, f"auto: {fault}"
        if wanted != "auto":
            return wanted, "as asked"
        return auto_cohort_size(self.config, self.adapted.device)

    def _routing_fault(self) -> str | None:
        """Why this model's layers cannot tell the clients' rows apart, tried on two rows; None where they can."""
        load_nothing(self.adapted, self.head)
        example = self.sites[0].train[0]
        self.adapted.routing.rows = 2
        try:
            with torch.no_grad():
                forward(self.adapted.model, self.task, [example, example])
        except RoutingError as error:
            return str(error)
        finally:
            self.adapted.routing.rows = None
        return None


def at_rank(method: Method, rank: int | None) -> Method:
    """A client's own method; None: its rank is the method's."""
    return method if rank is None else method.at(rank)
