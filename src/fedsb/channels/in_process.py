"""The embedded engine: every client in this process, trained jointly, with the base model in memory once.

Nothing to set up. Messages still go through the envelope, byte for byte as they would over a network, and are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace

from fedsb.adapters.adapted import Tensors
from fedsb.adapters.basis import Basis, Pair, basis_hash
from fedsb.client.round import ClientRound, at_rank
from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.data.clients import ClientData, open_data
from fedsb.data.tasks.base import Example
from fedsb.methods.base import Method, State
from fedsb.models.tokenizer import load_tokenizer
from fedsb.privacy.policy import build_privacy_policy, refuse_what_would_leak
from fedsb.protocol.codec import Codec
from fedsb.protocol.compressor import build_compressor
from fedsb.protocol.payload import unpack
from fedsb.protocol.schedule import participation
from fedsb.protocol.tensors import to_tensors, within
from fedsb.protocol.traffic import Direction, TrafficRecord
from fedsb.server.requirements import client_ranks, refuse_what_facts_forbid
from fedsb.server.types import Answer, Replies, Reply
from fedsb.training.basis import core_sums, draw_samples
from fedsb.training.gradients import captured_share
from fedsb.training.joint import Member
from fedsb.training.memory import memory_by_clients
from fedsb.training.resolved import auto_clients_per_forward, local_training, open_sums, public_rows
from fedsb.training.score import Score, mean_of
from fedsb.training.trainer import Trainer
from fedsb.utils.errors import UserError


class EmbeddedEngine(Trainer):
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
        for site in self.data.clients:
            self.check_rows([*site.train, *site.held_out])
        self.run = run
        self.sites: list[ClientData] = [self.data.pooled()] if method.spec.pools_data else self.data.participants
        self.local = local_training(config, clients=len(self.data.participants) if method.spec.pools_data else 1)
        rows = {site.name: site.rows for site in self.sites}
        steps, rounds = {name: self.local.steps_for(rows[name]) for name in rows}, participation(rows, config)
        self.policy = build_privacy_policy(config, method, rows, steps, self.local.rows_a_step, rounds)
        self.ranks, rank_settings = client_ranks(config, method, self.shapes, [site.name for site in self.sites])
        self.clients_per_forward, reason = self._choose_clients_per_forward()
        self.sums = open_sums(config, self.policy, run, self.sites)
        self.choices = (
            *self.trainer_settings,
            *self.data.choices,
            *rank_settings,
            ResolvedSetting(key="engine.clients_per_forward", value=self.clients_per_forward, reason=reason),
            *self.policy.choices,
            *(self.sums.choices if self.sums else ()),
        )

    # --- the verbs of an engine ---

    def build_basis(self, method: Method, state: State | None = None) -> tuple[Basis | None, list[TrafficRecord]]:
        """Makes B and A as the configuration asks, with what travelled for it; None for a method without a basis.

        With a `state`, they are made at the point that it has reached, which every site is told first.
        """
        sent: list[TrafficRecord] = []
        if method.adapter != "core":
            return None, sent
        config, round = self.config, 0 if state is None else state.round
        link, mechanisms = build_compressor(config, method, self.run), self.policy.row_mechanisms()
        rows = sum(site.rows for site in self.sites)

        def send(direction: Direction, client: str, tensors: Tensors, codec: Codec = link.codec) -> Tensors:
            envelope = link.basis(direction, client, round, tensors, codec)
            if not method.spec.pools_data:  # the data are where the server is: nothing travels
                sent.append(
                    self._count(envelope, round + 1 if state is not None else 0, client, direction, kind="basis")
                )
            return to_tensors(unpack(envelope).tensors)

        def tell(tensors: Tensors, codec: Codec = link.codec) -> Tensors:
            return [send("down", site.name, tensors, codec) for site in self.sites][-1]

        start = self.head
        if state is not None:
            tell(state.tensors, codec="float32")  # all must fold the same
            start = {**method.merge_into_residual(state), **{key: state.tensors[key] for key in self.head}}

        def sums(outer: Mapping[str, Pair]) -> Iterator[tuple[Tensors, float]]:
            for site in self.sites:
                mechanism = mechanisms[site.name] if mechanisms else None
                own, count = core_sums(
                    config.basis,
                    self.adapted,
                    self.task,
                    site,
                    rows,
                    start,
                    outer,
                    mechanism,
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
        if config.basis.share_samples and not self.policy:
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
        link = build_compressor(self.config, method, self.run)
        heard = link.heard(method, state)
        common = basis_hash(heard.shared)
        turns: dict[tuple[bool, int | None], tuple[bytes, ClientRound]] = {}  # clients that are told the same share one
        for name in cohort:
            told = (name in late, ranks.get(name))
            if told not in turns:
                envelope, message = link.down(method, state, heard, basis=common, late=told[0], rank=told[1])
                turns[told] = (
                    envelope,
                    ClientRound(at_rank(method, told[1]), heard.shared, message, state.round, common),
                )
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
                    policy=self.policy,
                    keep_optimizer=self.local.keep_optimizer,
                )
                travelled: dict[Direction, bytes] = {"down": down, "up": sending.envelope}
                reply = Reply(
                    client=after.name,
                    envelope=sending.envelope,
                    kept=sending.kept,
                    loss=after.loss if self.policy.may_release("loss") else None,
                    own=self.evaluate(after.tensors, site.held_out).value if due and site.held_out else None,
                    sent=[]
                    if method.spec.pools_data
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
        """Trains the members, those of one rank together, `clients_per_forward` in one forward."""
        for rank in dict.fromkeys(ranks.get(member.name) for member in members):
            alike, own = [m for m in members if ranks.get(m.name) == rank], at_rank(method, rank)
            for start in range(0, len(alike), self.clients_per_forward):
                group = alike[start : start + self.clients_per_forward]
                yield from self.train_group(own, group, self.local, state.round, self.policy)

    def score(self, method: Method, state: State, kept: Mapping[str, Tensors]) -> Score | None:
        """The metric on the test rows, of the global model or the mean over the clients' own; None without rows."""
        if not self.data.test or not (self.data.test_is_public or self.policy.may_release("scores")):
            return None
        if method.spec.global_model:
            score = self.evaluate(method.model(state), self.data.test)
            hides = self.policy and not self.data.test_is_public  # how many private rows each class has
            return replace(score, confusion=None) if hides else score
        scores = {
            site.name: self.evaluate(self.tensors_of(method, state, kept, site.name), self.data.test)
            for site in self.sites
        }
        return mean_of(scores)

    def score_sites(self, method: Method, state: State, kept: Mapping[str, Tensors]) -> dict[str, Score]:
        """The metric on each client's held-out rows, by its own model or the global one; unseen clients included."""
        scores: dict[str, Score] = {}
        if not self.policy.may_release("scores"):
            return scores
        for site in self.data.clients:
            if site.held_out and (method.spec.global_model or not site.unseen):
                scores[site.name] = self.evaluate(self.tensors_of(method, state, kept, site.name), site.held_out)
        return scores

    def tensors_of(self, method: Method, state: State, kept: Mapping[str, Tensors], client: str) -> Tensors:
        """The model that a client ends with: the global one, or its own."""
        if method.spec.global_model:
            return method.model(state)
        own = within("method", kept.get(client, {}))
        return method.init_client(state.shared, method.broadcast(state), own, state.round)

    # --- the inside ---

    @property
    def probes(self) -> list[Example]:
        """Some examples to compare an exported adapter on."""
        return (self.data.test or self.sites[0].train)[:4]

    def _choose_clients_per_forward(self) -> tuple[int, str]:
        """(clients in one forward, reason). A model whose rows cannot share a forward gets 1.

        Raises UserError where more were asked for.
        """
        wanted = self.config.engine.clients_per_forward
        if wanted == 1 or len(self.sites) == 1:
            return 1, "as asked" if wanted == 1 else "there is one client"
        if (fault := self.preflight.alone) is not None:
            if wanted != "auto":
                raise UserError(f"engine.clients_per_forward = {wanted}: {fault}")
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
        return auto_clients_per_forward(config, self.adapted.device, memory)
