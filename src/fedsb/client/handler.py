"""A site's answers to a coordinator's requests. The site applies its own rules first and saves its state afterwards.

The conversation itself is client/session.py. Everything that a site must remember is on its disk, so a site
that was killed can answer the next request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fedsb.client.checks import refuse_base, refuse_versions
from fedsb.client.outbox import Outbox
from fedsb.client.policy import (
    SiteConfig,
    caps_of,
    refuse_columns,
    refuse_labels,
    refuse_payload,
    refuse_peers,
    refuse_run,
    refuse_sum,
)
from fedsb.client.secure_sum import Identity, SecAggSession
from fedsb.client.session import DescribedClient, PreparedClient, StartedClient
from fedsb.client.store import DiskStore
from fedsb.config.load import load_config
from fedsb.config.schema import Config
from fedsb.data.clients import build_task
from fedsb.data.tables import load_client_table
from fedsb.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from fedsb.privacy.accounting import Release
from fedsb.privacy.ledger import read_ledger
from fedsb.privacy.statement import epsilon_spent
from fedsb.protocol.messages import (
    Describe,
    DescribeReply,
    Finish,
    FinishReply,
    Prepare,
    PrepareReply,
    Reply,
    Request,
    SecAggPhase,
    Start,
    StartReply,
    Train,
    TrainReply,
    finite,
    read_request,
)
from fedsb.protocol.payload import PayloadError, unpack
from fedsb.protocol.requirements import open_secure_sums, privacy_policy_of
from fedsb.secagg.messages import SumError
from fedsb.training.export import write_adapters
from fedsb.utils.errors import RefusalError
from fedsb.utils.files import keyed_fingerprint, safe_name
from fedsb.utils.formatting import bytes_text

Stage = DescribedClient | PreparedClient | StartedClient

# What a site stores of a run's requests, in words.
STORED_FACTS = {
    "config": "settings",
    "data": "rows of this site",
    "model": "weights of the base model",
    "label_names": "labels",
    "class_names": "class names",
    "rows": "row counts of the clients",
}


class SiteHandler:
    """A `Handle` (protocol/channel.py) of the site whose folder this is.

    Args:
        print_line: shows the operator what leaves the site.
    """

    def __init__(
        self,
        folder: Path,
        settings: SiteConfig,
        identity: Identity,
        print_line: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder, self.settings, self.identity, self.print_line = folder, settings, identity, print_line
        self.outbox = Outbox(folder / "outbox.jsonl")
        self.client: Stage | None = None  # of the run that was asked about last

    def __call__(self, data: bytes) -> bytes:
        """Raises RefusalError if this site's policy refuses the request, UserError if its files do not fit the run."""
        try:
            request = read_request(data)
        except PayloadError as error:  # the coordinator's own bytes: it may read what is wrong with them
            raise RefusalError(str(error)) from error
        try:
            answer = self._send(request, self._answer(request))
        except SumError:  # nothing has changed by it
            raise
        except Exception:  # memory may be ahead of the disk, or half made: the next request starts from the disk
            self.close()
            raise
        self.print_line(f"{request.run[:12]}  {_in_words(request)}: {bytes_text(len(answer))} leave")
        return answer

    def close(self) -> None:
        """Releases the run in memory, and its ledger."""
        if isinstance(self.client, StartedClient):
            self.client.policy.close()
        self.client = None

    # --- requests ---

    def _answer(self, request: Request[Any]) -> Reply:
        match request:
            case Describe():
                return self._describe(request)
            case Prepare():
                return self._prepare(request)
            case Start():
                return self._start(request)
            case Finish():
                return self._finish(request)
            case Train():
                refuse_versions(request.versions)  # a coordinator may have come back as another
                request = request.model_copy(update={"score": request.score and self.settings.allow.tells})
        return self._with_ledger(request, self._quiet(self._started(request).answer(request)))

    def _describe(self, request: Describe) -> DescribeReply:
        refuse_versions(request.versions)  # first: another version may not even read the settings
        config = self._allowed(request.config)
        self.close()
        client = self.describe(request.run, config)
        fingerprint = self._fingerprint(client)
        self._remember(request.run, config=request.config, data=fingerprint)
        self.client = client
        rows = None if config.privacy.on else len(client.table.rows)
        return DescribeReply(labels=client.labels, rows=rows, fingerprint=fingerprint)

    def _prepare(self, request: Prepare) -> PrepareReply:
        classes = {"label_names": request.label_names, "class_names": request.class_names}
        self._remember(request.run, **classes)
        described = self._take_up(request.run, until=DescribedClient)
        assert isinstance(described, DescribedClient)
        client = self.client = described.prepare(request.label_names, request.class_names)
        refuse_base(
            (client.trainer.base.fingerprint, request.model),
            (tokenizer_fingerprint(client.trainer.tokenizer), request.tokenizer),
        )
        self._remember(request.run, model=client.trainer.base.fingerprint)
        private = client.trainer.config.privacy.on
        return PrepareReply(
            rows=client.data.rows,
            held_out=len(client.data.held_out),
            cut=None if private else client.cut,
            unused=None if private else client.unused,
            labels=client.data.labels if self.settings.allow.tells and not private else None,
            model=client.trainer.base.fingerprint,
            head=list(client.trainer.base.head),
        )

    def _start(self, request: Start) -> StartReply:
        self._check_known(request.run, rows=request.rows)
        prepared = self._take_up(request.run, until=PreparedClient)
        assert isinstance(prepared, PreparedClient)
        client = self.client = self._begin(prepared, request.rows)
        self._remember(request.run, rows=request.rows)
        return StartReply(shared=client.derive())

    def _finish(self, request: Finish) -> FinishReply:
        """Scores the final model on this site's held-out rows, and writes the adapter.

        If no score may leave, no row is read, because a failed request could leak information about one.
        """
        client = self._started(request)
        data, folder = client.data, self._folder(request.run)
        tells = self.settings.allow.tells and client.policy.may_release("scores")
        tensors = client.final_tensors(unpack(request.payload), request.state_round)
        score = client.trainer.evaluate(tensors, data.held_out).value if data.held_out and tells else None
        write_adapters(client.trainer, {folder / "adapter": tensors}, request.card, data.train[:4] if tells else [])
        reply = self._with_ledger(request, FinishReply(score=finite(score), held_out=len(data.held_out)))
        assert isinstance(reply, FinishReply)
        self.close()
        self.print_line(f"{request.run[:12]}  the final adapter is in {folder / 'adapter'}")
        return reply

    # --- the run in memory ---

    def describe(self, run: str, config: Config) -> DescribedClient:
        """Reads this site's table for a run. Raises UserError if the data do not fit the run."""
        settings = self.settings
        own = {"name": settings.model or config.model.name, "device": settings.device}
        config = config.model_copy(update={"model": config.model.model_copy(update=own)})
        tokenizer = load_tokenizer(config.model)
        task = build_task(config, tokenizer)
        refuse_columns(settings, task.needs)
        table = load_client_table(
            config,
            task,
            settings.data,
            settings.columns,
            allowed=settings.allow.columns,
            revision=settings.revision,
            split=settings.split,
            form=settings.form,
        )
        refuse_labels(settings.allow, task.labels_in(table.rows), len(table.rows))
        return DescribedClient(
            name=self.identity.name,
            run=run,
            config=config,
            method=config.method,
            task=task,
            tokenizer=tokenizer,
            table=table,
        )

    def _begin(self, prepared: PreparedClient, rows: Mapping[str, int]) -> StartedClient:
        """Puts the policy in force, with the ledger, for a run that starts or continues."""
        config, method, name = prepared.trainer.config, prepared.trainer.method, self.identity.name
        prepared.check_rows(rows)
        store = DiskStore(self._folder(prepared.run))
        new = store.view(store.start_round) is None
        policy = privacy_policy_of(config, method, rows, prepared.trainer.local)
        plan = policy.plans.get(name) if policy.unit == "example" else None
        policy.plans = policy.plans if plan is None else {name: plan}
        caps = () if plan is None else caps_of(self.settings.allow, plan, self._released_before(prepared.run))
        sums, secagg = open_secure_sums(config, policy, prepared.run, rows), None
        if sums is not None:
            refuse_sum(self.settings.allow, sums.smallest)
            secagg = SecAggSession(sums, store, self.identity, partial(refuse_peers, self.settings.allow))
            if new:
                secagg.keys(list(rows))  # before it has trained for a sum that it would leave
        client = prepared.start(rows, store, policy, secagg, partial(refuse_payload, self.settings.allow))
        policy.open_ledgers(store.folder, prepared.run, new=new, caps=caps)
        return client

    def _started(self, request: Request[Any]) -> StartedClient:
        """Returns the run of the request, read from the disk where it is not in memory."""
        client = self._take_up(request.run, until=StartedClient)
        if not isinstance(client, StartedClient):
            raise RefusalError(
                "This site has not started this run, so nothing protects its rows. Ask it to start first."
            )
        return client

    def _take_up(self, run: str, until: type[Stage]) -> Stage:
        """Returns the run at this stage, or at the last one before it that its stored requests reach."""
        if isinstance(self.client, until) and self.client.run == run:
            return self.client
        self.close()
        facts = DiskStore(self._folder(run)).facts()
        if facts is None:
            raise RefusalError(f"This site was never asked to join the run {run!r:.40}.")
        described = self.describe(run, self._allowed(facts["config"]))
        self._check_known(run, data=self._fingerprint(described))
        self.client = described
        if until is not DescribedClient and "label_names" in facts:
            prepared = self.client = described.prepare(facts["label_names"], facts.get("class_names"))
            self._check_known(run, model=prepared.trainer.base.fingerprint)
            if until is StartedClient and "rows" in facts:
                self.client = self._begin(prepared, facts["rows"])
        return self.client

    def _fingerprint(self, client: DescribedClient) -> str:
        """Returns the fingerprint of this site's rows in this run. Only this site can make it, so no guess can be
        confirmed with it."""
        key = self.identity.key.private_bytes_raw()
        return keyed_fingerprint(key, f"{client.run} {client.table.fingerprint}")

    def _released_before(self, run: str) -> list[Release]:
        """Returns the releases of this site's rows in other runs."""
        ledger, folder = Path("privacy") / f"{safe_name(self.identity.name)}.jsonl", self._folder(run)
        others = [path for path in folder.parent.glob(f"*/{ledger}") if path != folder / ledger]
        return [entry.release for path in sorted(others) for entry in read_ledger(path)]

    def _allowed(self, settings: Any) -> Config:
        """Returns a run's settings. Raises RefusalError if this site's policy does not allow them."""
        config = load_config(settings).config
        refuse_run(self.settings.allow, config, config.method)
        return config

    def _folder(self, run: str) -> Path:
        if not run.isalnum():
            raise RefusalError(f"{run!r:.40} is not the id of a run.")
        return self.folder / "runs" / run

    def _check_known(self, run: str, **facts: Any) -> dict[str, Any]:
        """Returns the run's stored request of this kind. Raises RefusalError if the new request differs from it."""
        known = DiskStore(self._folder(run)).facts() or {}
        if other := [key for key, value in facts.items() if key in known and known[key] != value]:
            words = " and ".join(STORED_FACTS[key] for key in other)
            raise RefusalError(f"This run began here with different {words}. They cannot change within a run.")
        return known

    def _remember(self, run: str, **facts: Any) -> None:
        DiskStore(self._folder(run)).save_facts({**self._check_known(run, **facts), **facts})

    # --- what leaves ---

    def _quiet(self, reply: Reply) -> Reply:
        """Returns the reply without the values that this site keeps private."""
        if not isinstance(reply, TrainReply):
            return reply
        changes: dict[str, Any] = {}
        if reply.left is not None:
            self.print_line(f"The change does not go into the sum: {reply.left}")
            changes["left"] = "its change is not finite, or above server.secagg_clip; its own terminal says more"
        if not self.settings.allow.tells:
            changes |= {"loss": None, "score": None}
        return reply.model_copy(update=changes)

    def _with_ledger(self, request: Request[Any], reply: Reply) -> Reply:
        """Returns the reply with the entries of this site's ledger that the coordinator lacks."""
        client, charged = self.client, "entries" in type(reply).model_fields
        if not charged or not isinstance(client, StartedClient) or client.policy.unit != "example":
            return reply
        path = self._folder(client.run) / "privacy" / f"{safe_name(self.identity.name)}.jsonl"
        since = request.entries_since if isinstance(request, Train) else 0
        entries = [vars(entry) for entry in read_ledger(path) if entry.round >= since]
        return reply.model_copy(update={"entries": entries})

    def _send(self, request: Request[Any], reply: Reply) -> bytes:
        """Returns the bytes that leave this site, after checking its policy and writing them to the outbox."""
        data, run = reply.pack(), request.run
        what = f"secagg: {request.phase}" if isinstance(request, SecAggPhase) else reply.verb
        if isinstance(request, SecAggPhase) or not reply.parts:
            self.outbox.note(what, data, run=run)
            return data
        client = self.client if isinstance(self.client, StartedClient) else None
        epsilon = epsilon_spent(client.policy) if client and client.policy.unit == "example" else None
        if isinstance(request, Train) and client and client.secagg:  # masked; its content was checked before
            self.outbox.note(f"{what}: masked", data, run=run, epsilon=epsilon)
            return data
        payload = unpack(reply.payload)
        refuse_payload(self.settings.allow, payload, len(reply.payload))
        self.outbox.note(what, reply.payload, payload, run=run, epsilon=epsilon)
        return data


def _in_words(request: Request[Any]) -> str:
    """Returns a short description of a request, for the operator."""
    if isinstance(request, SecAggPhase):
        return f"secure aggregation, {request.phase}"
    if isinstance(request, Train):
        return f"round {unpack(request.payload).round + 1}"
    return request.verb
