"""The embedded engine: every client in this process, trained jointly, with the base model in memory once.

Nothing to set up. Messages still go through the envelope, byte for byte as they would over a network, and are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace

from fedsb.adapters.adapted import Tensors
from fedsb.adapters.basis import Basis, Pair, basis_hash
from fedsb.data.sites import Site, open_data
from fedsb.data.tasks.base import Example
from fedsb.engines import Answer, Direction, Replies, Reply, Score, Sent, mean_of
from fedsb.engines.bench import Bench
from fedsb.engines.resolved import auto_cohort_size, local_training, open_sums, public_rows
from fedsb.errors import UserError
from fedsb.federation.basis_round import core_sums, draw_samples
from fedsb.federation.codec import Codec
from fedsb.federation.cohort import Member
from fedsb.federation.facts import client_ranks, refuse_what_facts_forbid
from fedsb.federation.gradients import captured_share
from fedsb.federation.link import link_of
from fedsb.federation.payload import unpack
from fedsb.federation.tensors import to_tensors, within
from fedsb.federation.turn import Turn, at_rank
from fedsb.memory import memory_by_clients
from fedsb.methods.contract import Method, State
from fedsb.models.load import load_tokenizer
from fedsb.privacy.setup import promise_of, refuse_what_would_leak
from fedsb.settings import Choice, Config


class EmbeddedEngine(Bench):
    """Clients, data and base model of a configuration, in this process.

    Raises UserError, at the start, for whatever is wrong with the data, the model, or their fit.
    """

    def __init__(self, config: Config, method: Method, run: str) -> None:
        refuse_what_facts_forbid(config, method)
        refuse_what_would_leak(config, method)
        tokenizer = load_tokenizer(config.model)
        self.data = open_data(config, tokenizer)
        super().__init__(config, method, tokenizer, self.data.task)
        self.check_rows(self.data.test)
        for site in self.data.sites:
            self.check_rows([*site.train, *site.held_out])
        self.run = run
        self.sites: list[Site] = [self.data.pooled()] if method.facts.pools_data else self.data.taking_part
        self.local = local_training(config, clients=len(self.data.taking_part) if method.facts.pools_data else 1)
        self.promise = promise_of(config, method, self.sites, self.local)
        self.ranks, rank_choices = client_ranks(config, method, self.shapes, [site.name for site in self.sites])
        self.cohort_size, reason = self._choose_cohort_size()
        self.sums = open_sums(config, self.promise, run, self.sites)
        self.choices = (
            *self.bench_choices,
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
        config, round = self.config, 0 if state is None else state.round
        link, guards = link_of(config, method, self.run), self.promise.of_rows()
        rows = sum(site.rows for site in self.sites)

        def send(direction: Direction, client: str, tensors: Tensors, codec: Codec = link.codec) -> Tensors:
            envelope = link.basis(direction, client, round, tensors, codec)
            if not method.facts.pools_data:  # the data are where the server is: nothing travels
                sent.append(
                    self._count(envelope, round + 1 if state is not None else 0, client, direction, kind="basis")
                )
            return to_tensors(unpack(envelope).tensors)

        def tell(tensors: Tensors, codec: Codec = link.codec) -> Tensors:
            return [send("down", site.name, tensors, codec) for site in self.sites][-1]

        start = self.head
        if state is not None:
            tell(state.tensors, codec="float32")  # all must fold the same
            start = {**method.fold(state), **{key: state.tensors[key] for key in self.head}}

        def sums(outer: Mapping[str, Pair]) -> Iterator[tuple[Tensors, float]]:
            for site in self.sites:
                guard = guards[site.name] if guards else None
                own, count = core_sums(
                    config.basis,
                    self.adapted,
                    self.task,
                    site,
                    rows,
                    start,
                    outer,
                    guard,
                    seed=config.seed,
                    round=round,
                    batch_size=config.train.batch_size,
                )
                yield send("up", site.name, own), count

        def samples(count: int, *, from_the_end: bool = False) -> dict[str, list[Example]]:
            drawn = (draw_samples(site, rows, count, config.seed, from_the_end=from_the_end) for site in self.sites)
            return {site.name: examples for site, examples in zip(self.sites, drawn, strict=True)}

        seen = public_rows(config, self.task)
        if config.basis.kind == "update-pooled":
            seen = [example for own in samples(config.basis.samples).values() for example in own]
        basis = self.make_basis(start, self.local, self.sites[0].rows, seen=seen, sums=sums, tell=tell, round=round)
        if config.basis.share_samples and not self.promise:
            captured = captured_share(
                self.adapted,
                self.task,
                start,
                basis,
                samples(config.basis.share_samples, from_the_end=True),
                config.train.batch_size,
                config.basis.budget_mib << 20,
                method.total_rank // method.rank,
            )
            basis = replace(basis, captured=captured)
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
        sites, ranks = {site.name: site for site in self.sites}, {**self.ranks, **state.ranks}
        link = link_of(self.config, method, self.run)
        heard = link.heard(method, state)
        common = basis_hash(heard.common)
        turns: dict[tuple[bool, int | None], tuple[bytes, Turn]] = {}  # clients that are told the same share one
        for name in cohort:
            told = (name in late, ranks.get(name))
            if told not in turns:
                envelope, message = link.down(method, state, heard, basis=common, late=told[0], rank=told[1])
                turns[told] = envelope, Turn(at_rank(method, told[1]), heard.common, message, state.round, common)
        before = {
            name: turns[name in late, ranks.get(name)][1].member(sites[name], kept.get(name, {})) for name in cohort
        }

        def replies() -> Iterator[Answer]:
            due = self.config.eval.gap and self.config.eval.due(state.round + 1, self.config.rounds)
            secure = self.sums.here(state.round, cohort, common) if self.sums else None
            for after in self._train(method, state, list(before.values()), ranks):
                site = sites[after.name]
                down, turn = turns[after.name in late, ranks.get(after.name)]
                sending = turn.sending(
                    before[after.name],
                    after,
                    site.rows,
                    kept.get(after.name, {}),
                    link=link,
                    promise=self.promise,
                    keep_optimizer=self.local.keep_optimizer,
                )
                travelled: dict[Direction, bytes] = {"down": down, "up": sending.envelope}
                reply = Reply(
                    client=after.name,
                    envelope=sending.envelope,
                    kept=sending.kept,
                    loss=after.loss if self.promise.shows("loss") else None,
                    own=self.evaluate(after.tensors, site.held_out).value if due and site.held_out else None,
                    sent=[]
                    if method.facts.pools_data
                    else [self._count(data, state.round + 1, after.name, way) for way, data in travelled.items()],
                )
                if secure is None:
                    yield reply
                else:
                    secure.put(reply, sending.tensors, turn.unmoved)
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
                yield from self.train_group(own, group, self.local, state.round, self.promise)

    def score(self, method: Method, state: State, kept: Mapping[str, Tensors]) -> Score | None:
        """The metric on the test rows, of the global model or the mean over the clients' own; None without rows."""
        if not self.data.test or not (self.data.test_is_public or self.promise.shows("scores")):
            return None
        if method.facts.global_model:
            score = self.evaluate(method.model(state), self.data.test)
            hides = self.promise and not self.data.test_is_public  # how many private rows each class has
            return replace(score, confusion=None) if hides else score
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

    @property
    def probes(self) -> list[Example]:
        """Some examples to compare an exported adapter on."""
        return (self.data.test or self.sites[0].train)[:4]

    def _choose_cohort_size(self) -> tuple[int, str]:
        """(clients in one forward, reason). A model whose rows cannot share a forward gets 1.

        Raises UserError where more were asked for.
        """
        wanted = self.config.engine.cohort_size
        if wanted == 1 or len(self.sites) == 1:
            return 1, "as asked" if wanted == 1 else "there is one client"
        if (fault := self.preflight.alone) is not None:
            if wanted != "auto":
                raise UserError(f"engine.cohort_size = {wanted}: {fault}")
            return 1, f"auto: {fault}"
        if wanted != "auto":
            return wanted, "as asked"
        config, largest = self.config, max(site.rows for site in self.sites)
        memory = memory_by_clients(
            config,
            self.method,
            self.base.model,
            self.shapes,
            self.block_shapes,
            base=sum(x.nbytes for x in self.base.model.parameters()),
            head=sum(x.numel() for x in self.head.values()),
            cohort=min(config.server.clients_per_round or len(self.sites), len(self.sites)),
            batch=min(config.train.batch_size, largest),
            device=self.adapted.device,
        )
        return auto_cohort_size(config, self.adapted.device, memory)
