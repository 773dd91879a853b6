"""The engine of a real federation: the sites are elsewhere, and answer what engines/notes.py lists, over a channel.

The coordinator has the base model, to score the test rows and to write the adapter, and no row of any site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from fedsb.adapters.adapted import Tensors
from fedsb.adapters.basis import Basis, Pair, basis_hash
from fedsb.client.round import ClientRound
from fedsb.config.schema import Config
from fedsb.data.card import TableCard, make_card
from fedsb.data.clients import Data, build_task, cut_choices, remote_client
from fedsb.data.rows import Table
from fedsb.data.tables import load_test, table_facts
from fedsb.data.tasks.base import Example
from fedsb.methods.base import Method, State
from fedsb.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from fedsb.privacy.ledger import Entry
from fedsb.privacy.policy import build_privacy_policy, refuse_what_would_leak
from fedsb.protocol.channel import Channel, NoResponse
from fedsb.protocol.compressor import build_compressor
from fedsb.protocol.messages import Behind, Finished, Looked, Opened, Phase, Started, Summed, Told, Trained
from fedsb.protocol.payload import Payload, PayloadError, pack, unpack
from fedsb.protocol.schedule import participation
from fedsb.protocol.tensors import to_arrays, to_tensors
from fedsb.protocol.traffic import TrafficRecord
from fedsb.server.exchange import Asking, lost
from fedsb.server.labels import label_choices, labels_of
from fedsb.server.requirements import client_ranks, refuse_what_facts_forbid, refuse_what_needs_one_place
from fedsb.server.shared_state import Holdings
from fedsb.server.types import Answer, Replies, Reply
from fedsb.server.validation import Dropped, fault_of_tensors
from fedsb.training.resolved import local_training, open_sums, public_rows
from fedsb.training.score import Score
from fedsb.training.trainer import Trainer
from fedsb.utils.environment import versions
from fedsb.utils.errors import RunError


class RemoteEngine(Trainer):
    """The sites of a channel, opened for a run.

    Raises UserError for whatever is wrong with the settings, RunError where a site refuses or does not answer.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        run: str,
        channel: Channel,
        directory: Mapping[str, bytes],  # site -> its public key, for secure sums
        note: Callable[[str], None] = lambda _: None,  # who watches
        begun: Mapping[str, Any] | None = None,  # the manifest of a run that is taken up: its sites need not be there
    ) -> None:
        refuse_what_facts_forbid(config, method)
        refuse_what_would_leak(config, method)
        refuse_what_needs_one_place(config, method)
        self.run, self.directory, self.note = run, directory, note
        self.asking = Asking(channel, run, config.engine.deadline_s, note)
        tokenizer = load_tokenizer(config.model)
        task = build_task(config, tokenizer)
        test = load_test(config, task)
        looked = {} if begun else self._look(config)
        if begun:
            task.take_classes(begun["task"])
        else:
            labels = labels_of(looked)
            task.fit_labels([{task.options.label: label} for label in labels], test.rows if test else [])
        task.name_classes(test.class_names.get(task.options.label, ()) if test else ())
        super().__init__(config, method, tokenizer, task)
        opened = {} if begun else self._open(tokenizer_fingerprint(tokenizer))
        self.sites = (
            [remote_client(site["name"], site["rows"], site["labels"]) for site in begun["clients"]]
            if begun
            else [remote_client(name, site.rows, site.labels) for name, site in opened.items()]
        )
        self.data = self._data(test, looked, opened, begun)
        self.check_rows(self.data.test)
        self.local = local_training(config)
        rows = {site.name: site.rows for site in self.sites}
        steps, rounds = {name: self.local.steps_for(rows[name]) for name in rows}, participation(rows, config)
        self.policy = build_privacy_policy(config, method, rows, steps, self.local.rows_a_step, rounds)
        self.ranks, rank_settings = client_ranks(config, method, self.shapes, [site.name for site in self.sites])
        self.sums = open_sums(config, self.policy, run, self.sites)
        self.holdings = Holdings(self.asking, self._count)
        if not begun:
            self.holdings.by_site = {name: site.holds for name, site in self.asking.all(Started, rows=rows).items()}
        self.choices = (
            *self.trainer_settings,
            *self.data.choices,
            *rank_settings,
            *self.policy.choices,
            *(self.sums.choices if self.sums else ()),
        )

    # --- the verbs of an engine ---

    def build_basis(self, method: Method, state: State | None = None) -> tuple[Basis | None, list[TrafficRecord]]:
        """Makes B and A as the configuration asks, with what travelled for it; None for a method without a basis."""
        assert state is None, "refused at the start: basis.refresh"
        sent: list[TrafficRecord] = []
        basis: Basis | None = None
        if method.adapter == "core":
            basis = self._make_basis(method, sent)
        common = method.start(self.shapes, basis, self.head, self.config.seed).shared
        return basis, [*sent, *self.holdings.agree(common)]

    def train(
        self,
        method: Method,
        state: State,
        cohort: Sequence[str],
        kept: Mapping[str, Tensors],
        late: Set[str] = frozenset(),
    ) -> Replies:
        """One round. What sites keep to themselves stays with them: `kept` is nobody's."""
        ranks = {**self.ranks, **state.ranks}
        link = build_compressor(self.config, method, self.run)
        heard = link.heard(method, state)
        common = basis_hash(heard.shared)
        made: dict[tuple[bool, int | None], bytes] = {}

        def message(client: str, whole: bool) -> bytes:
            told = (whole, ranks.get(client))
            if told not in made:
                made[told] = link.down(method, state, heard, basis=common, late=told[0], rank=told[1])[0]
            return made[told]

        def ask(
            clients: Iterable[str], *, behind: bool
        ) -> Iterator[tuple[str, Trained | Behind | NoResponse, list[TrafficRecord]]]:
            requests, sent = {}, {}
            for name in clients:
                envelope = message(name, behind or name in late)
                requests[name] = self.asking.request(Trained, (envelope,), rank=ranks.get(name), versions=versions())
                wire = len(requests[name])
                sent[name] = [self._count(envelope, state.round + 1, name, "down", wire=wire)]
            for name, answer in self.asking.each(Trained, requests, what=f"Round {state.round + 1}"):
                yield name, answer, sent[name]

        def answers() -> Iterator[tuple[str, Trained | Behind | NoResponse, list[TrafficRecord]]]:
            missed: dict[str, list[TrafficRecord]] = {}
            for name, answer, sent in ask(cohort, behind=False):
                if isinstance(answer, Behind):
                    told = self.holdings.bring_up(name, answer, heard.shared, state.round + 1)
                    if isinstance(told, NoResponse):
                        yield name, told, sent
                    else:
                        missed[name] = [*sent, *told]
                else:
                    yield name, answer, sent
            for name, answer, sent in ask(missed, behind=True) if missed else ():
                yield name, answer, [*missed[name], *sent]

        def replies() -> Iterator[Answer]:
            there: list[Reply] = []
            for name, answer, sent in answers():
                try:
                    reply = self._reply(name, answer, sent, state.round + 1)
                except PayloadError as error:
                    yield Dropped(client=name, reason=str(error))
                    continue
                if self.sums is None:
                    yield reply
                else:
                    there.append(reply)
            if self.sums is not None:
                turn = ClientRound(
                    method, heard.shared, to_tensors(unpack(message("", False)).tensors), state.round, common
                )
                yield from self._add_up(turn, cohort, there)

        return Replies(replies())

    def score(self, method: Method, state: State, kept: Mapping[str, Tensors]) -> Score | None:
        """The metric on the coordinator's test rows; None without any."""
        return self.evaluate(method.model(state), self.data.test) if self.data.test else None

    def score_sites(self, method: Method, state: State, kept: Mapping[str, Tensors]) -> dict[str, Score]:
        """Ends the run at every site: it is told the final model, scores it on its held-out rows, and keeps it."""
        tensors = to_arrays(method.broadcast(state, late=True))
        whole = Payload(kind="broadcast", run=self.run, round=state.round, tensors=tensors)
        card = {
            "Method": f"{method.spec.id} ({method.spec.paper}), rank {method.rank}",
            "Sites": str(len(self.sites)),
            "Rounds": str(state.round),
        }
        request = self.asking.request(Finished, (pack(whole),), card=card)
        scores: dict[str, Score] = {}
        last = {site.name: request for site in self.sites}
        for name, answer in self.asking.each(Finished, last, patient=True, what="The end of the run"):
            try:
                if not isinstance(answer, Finished):
                    raise PayloadError(lost(answer).reason)
                self._take_entries(name, answer.entries)
            except PayloadError as error:
                self.note(f"{name} may not have the final adapter: {error}")
                continue
            if answer.score is not None:
                scores[name] = Score(value=answer.score, count=answer.held_out)
        return scores

    def tensors_of(self, method: Method, state: State, kept: Mapping[str, Tensors], client: str) -> Tensors:
        """The model that a site ends with."""
        return method.model(state)

    @property
    def probes(self) -> list[Example]:
        """Some examples to compare an exported adapter on."""
        return self.data.test[:4]

    # --- the inside ---

    def _look(self, config: Config) -> dict[str, Looked]:
        shared = config.model_dump(mode="json", exclude={"out": True, "compare": True, "data": {"train", "test"}})
        sites = self.asking.channel.sites
        self.note(f"asking {'1 site' if len(sites) == 1 else f'{len(sites)} sites'}: {', '.join(sites)}")
        return self.asking.all(Looked, config=shared, versions=versions())

    def _open(self, tokenizer: str) -> dict[str, Opened]:
        same = {"model": self.base.fingerprint, "tokenizer": tokenizer}
        classes = {"label_names": self.task.label_names, "class_names": self.task.class_names}
        return self.asking.all(Opened, (), **classes, **same)

    def _make_basis(self, method: Method, sent: list[TrafficRecord]) -> Basis:
        link = build_compressor(self.config, method, self.run)

        def sums(outer: Mapping[str, Pair]) -> Iterator[tuple[Tensors, float]]:
            wanted = {f"{layer}.S": (len(A), len(A)) for layer, (A, _) in outer.items()}
            for name, note in self.asking.all(Summed).items():
                try:
                    self._take_entries(name, note.entries)
                    told = unpack(note.parts[0]).tensors
                    if fault := fault_of_tensors(told, wanted):
                        raise PayloadError(fault)
                except PayloadError as error:
                    raise RunError(
                        f"what {name} sent for the basis is of no use: {error}. Mend or revoke it"
                    ) from error
                sent.append(self._count(note.parts[0], 0, name, "up", kind="basis"))
                yield to_tensors(told), note.rows

        def tell(tensors: Tensors) -> Tensors:
            envelope = link.basis("down", "", 0, tensors, link.codec)
            for name, note in self.asking.all(Told, (envelope,)).items():
                self.holdings.by_site[name] = note.holds
                sent.append(self._count(envelope, 0, name, "down", kind="basis"))
            return to_tensors(unpack(envelope).tensors)

        rows = self.sites[0].rows
        return self.make_basis(
            self.head, self.local, rows, seen=public_rows(self.config, self.task), sums=sums, tell=tell
        )

    def _reply(self, name: str, answer: Trained | Behind | NoResponse, sent: list[TrafficRecord], round: int) -> Reply:
        """Raises PayloadError, with the reason, for a site that has sent nothing to go on with."""
        if not isinstance(answer, Trained):
            raise PayloadError(lost(answer).reason)
        if answer.left is not None:
            raise PayloadError(f"left the sum by itself: {answer.left}")
        if (self.sums is None) != len(answer.parts):
            raise PayloadError(f"sent {len(answer.parts)} updates")
        self._take_entries(name, answer.entries)
        up = [self._count(part, round, name, "up", wire=len(answer.pack())) for part in answer.parts]
        update = answer.parts[0] if answer.parts else None
        return Reply(client=name, envelope=update, kept={}, loss=answer.loss, sent=[*sent, *up])

    def _add_up(self, turn: ClientRound, cohort: Sequence[str], replies: Sequence[Reply]) -> Iterator[Answer]:
        from fedsb.server.secure_sum import add_up

        def ask(messages: Mapping[str, bytes], **facts: Any) -> Iterator[tuple[str, int, Phase | NoResponse]]:
            requests = {name: self.asking.request(Phase, (message,), **facts) for name, message in messages.items()}
            for name, answer in self.asking.each(Phase, requests, what=f"The secure sum of round {turn.round + 1}"):
                yield name, len(requests[name]), answer if isinstance(answer, Phase) else lost(answer)

        assert self.sums is not None
        keys = {name: self.directory[name] for name in cohort}
        terms = self.sums.terms(turn.round, turn.basis, keys, turn.against)
        return add_up(terms, turn, sorted(self.head.keys() & turn.unmoved.keys()), replies, ask)

    def _take_entries(self, name: str, entries: Sequence[Mapping[str, Any]]) -> None:
        """Copies what the site's ledger says of itself, so that epsilon is known here too.

        Raises PayloadError for what is no ledger of this site.
        """
        if self.policy.unit == "example":
            try:
                self.policy.mechanisms[name].ledger.copy(Entry(**entry) for entry in entries)
            except (TypeError, ValueError) as error:
                raise PayloadError(f"what it says of its ledger is not of one: {error}") from error

    def _data(
        self,
        test: Table | None,
        looked: Mapping[str, Looked],
        opened: Mapping[str, Opened],
        begun: Mapping[str, Any] | None,
    ) -> Data:
        examples, cut_test = self.task.encode_test(test.rows) if test else ([], 0)
        tables = {
            name: {"origin": f"the site {name}", "rows": site.rows, "fingerprint": site.fingerprint}
            for name, site in looked.items()
        }
        if begun:
            tables = {name: table for name, table in begun["data"].items() if name != "test"}
        cut = cut_test + sum(site.cut or 0 for site in opened.values())
        unused = sum(site.unused or 0 for site in opened.values())
        told = list(opened.values())
        labels = [site.labels for site in told if site.labels is not None]
        train = TableCard(
            origin="1 site" if len(self.sites) == 1 else f"{len(self.sites)} sites",
            rows=sum(site.rows for site in self.sites),
            cut=_sum_of(site.cut for site in told),
            unused=_sum_of(site.unused for site in told),
            classes={name: sum(of.get(name, 0) for of in labels) for name in self.task.classes}
            if labels and len(labels) == len(told)
            else None,
        )
        card = make_card(
            self.task,
            train,
            test,
            clients={site.name: site.rows for site in self.sites},
            lost={"test": (cut_test, len(test.rows) - len(examples) if test else 0)},
            also_read=self.config.data.exclude,
            private=self.config.privacy.on,
        )
        return Data(
            task=self.task,
            clients=self.sites,
            test=examples,
            test_description=f"{test.origin}, {len(test.rows):,} rows" if test else "none",
            test_is_public=True,
            baseline=None,
            best_guess=self.task.best_guess(examples) if examples else None,
            tables=tables | ({"test": table_facts(test)} if test else {}),
            choices=(*label_choices(looked), *cut_choices(self.config, cut, unused)),
            card=card,
        )


def _sum_of(counts: Iterable[int | None]) -> int | None:
    """Returns the sum; None where a site keeps its count to itself, or none has been asked."""
    known = list(counts)
    return sum(count or 0 for count in known) if known and None not in known else None
