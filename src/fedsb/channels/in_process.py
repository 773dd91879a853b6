"""The channel to clients in this process, with the base model in memory once. Nothing has to be set up.

It sees all requests of a round at once, so it trains clients jointly. Payloads are made and counted byte for byte as
over a network; only the messages around them are not serialised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsb.client.memo import Memo
from fedsb.client.round import ClientView
from fedsb.client.session import LocalRound, PreparedClient, StartedClient
from fedsb.client.store import ClientStore
from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.data.clients import ClientData, open_data
from fedsb.methods.base import Method, State
from fedsb.models.devices import memory_of_all
from fedsb.models.load import choose_dtype
from fedsb.models.placement import Placement, device_bytes
from fedsb.models.tokenizer import load_tokenizer
from fedsb.privacy.policy import PrivacyPolicy, refuse_what_would_leak
from fedsb.protocol.channel import ChannelSpec, NoResponse
from fedsb.protocol.messages import Finish, FinishReply, Reply, Request, Start, StartReply, Train, finite
from fedsb.protocol.payload import unpack
from fedsb.protocol.requirements import refuse_what_facts_forbid
from fedsb.protocol.tensors import within
from fedsb.server.opened import ClientStates, OpenedFederation
from fedsb.training.joint import ClientTraining
from fedsb.training.memory import ModelSizes, memory_by_clients
from fedsb.training.resolved import auto_clients_per_forward, local_training
from fedsb.training.trainer import Trainer
from fedsb.utils.errors import UserError
from fedsb.utils.tensors import Tensors


@dataclass(frozen=True, kw_only=True)
class Group:
    """Clients of one rank that train in one forward."""

    names: Sequence[str]
    clients: Sequence[ClientTraining]
    method: Method  # at their rank
    total_rank: int | None
    round: int
    policy: PrivacyPolicy


class InProcessChannel:
    """A `Channel` to clients that share one trainer; `together` of them train in one forward."""

    spec = ChannelSpec(name="in_process", holds_rows=True)

    def __init__(self, run: str, clients: Sequence[ClientData], trainer: Trainer, together: int) -> None:
        memo = Memo()
        self._prepared = {
            client.name: PreparedClient(run=run, data=client, trainer=trainer, memo=memo) for client in clients
        }
        self._started: dict[str, StartedClient] = {}
        self._trainer, self.clients_per_forward = trainer, together
        self._keys: dict[str, Any] = {}

    @property
    def clients(self) -> Sequence[str]:
        return sorted(self._prepared)

    @property
    def directory(self) -> dict[str, bytes]:
        """Each client's public key: made for this run, and known to this process."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        if not self._keys:
            self._keys = {name: Ed25519PrivateKey.generate() for name in self._prepared}
        return {name: key.public_key().public_bytes_raw() for name, key in self._keys.items()}

    def start(self, policy: PrivacyPolicy, secure_sums: Any, states: ClientStates) -> None:
        rows = {name: client.data.rows for name, client in self._prepared.items()}
        for name, client in self._prepared.items():
            store, secagg = ClientStore(states.get(name)), None
            if secure_sums is not None:
                from fedsb.client.secure_sum import Identity, SecAggSession

                identity = Identity(name=name, key=self._keys[name], directory=self.directory)
                secagg = SecAggSession(secure_sums, store, identity)
            self._started[name] = client.start(rows, store, policy, secagg)

    def resume(self, state: State) -> None:
        """Gives every client the shared state after the last finished round, as if it had received its broadcast."""
        view = ClientView(state.shared, state.client_view, state.round)
        for client in self._started.values():
            client.store.save_start(view, state.round)

    def client_states(self, round: int) -> dict[str, Tensors]:
        found = {}
        for name, client in self._started.items():
            if state := client.store.states.get(round):
                found[name] = state
        return found

    def client_model(self, method: Method, state: State, client: str) -> Tensors:
        """Returns a client's model: the global one, or its own if the method's clients have their own."""
        if not method.spec.own_models or client not in self._started:
            return method.model(state)
        own = self._started[client].store.client_state(state.accepted.get(client, 0))
        return method.init_client(state.shared, method.broadcast(state), within("method", own), state.round)

    def exchange(
        self, requests: Mapping[str, Request[Any]], timeout_s: float | None = None
    ) -> Iterator[tuple[str, Reply | NoResponse]]:
        """Answers the requests. An exception in a client ends the run; `timeout_s` has no effect."""
        training = {name: request for name, request in requests.items() if isinstance(request, Train)}
        yield from self._train(training)
        for name, request in requests.items():
            if isinstance(request, Start):
                yield name, StartReply(shared=self._started[name].derive())
            elif isinstance(request, Finish):
                yield name, self._finish(name, request)
            elif not isinstance(request, Train):
                yield name, self._started[name].answer(request)

    def _train(self, requests: Mapping[str, Train]) -> Iterator[tuple[str, Reply]]:
        """Trains clients of one rank together, `clients_per_forward` at a time."""
        begun: dict[str, LocalRound] = {}
        for name, request in requests.items():
            local_round = self._started[name].begin(request)
            if isinstance(local_round, LocalRound):
                begun[name] = local_round  # never done already: in one process a client stores no answers
            else:
                yield name, local_round
        groups = [
            self._group(begun, part, requests[part[0]].total_rank)
            for rank in dict.fromkeys(requests[name].total_rank for name in begun)
            for part in _parts([n for n in begun if requests[n].total_rank == rank], self.clients_per_forward)
        ]
        for group, trained in self.train_groups(groups):
            for name, client in zip(group.names, trained, strict=True):
                yield name, self._started[name].finish(begun.pop(name), client)

    def _group(self, begun: Mapping[str, LocalRound], names: Sequence[str], total_rank: int | None) -> Group:
        client_round = begun[names[0]].client_round
        return Group(
            names=names,
            clients=[begun[name].training for name in names],
            method=client_round.method,
            total_rank=total_rank,
            round=client_round.round,
            policy=self._started[names[0]].policy,
        )

    def train_groups(self, groups: Sequence[Group]) -> Iterator[tuple[Group, list[ClientTraining]]]:
        """Yields the groups of a round with their clients trained."""
        for group in groups:
            yield group, self.train_group(group)

    def train_group(self, group: Group) -> list[ClientTraining]:
        """Returns the clients of a group after a round of local training."""
        return self._trainer.train(group.clients, group.method, group.round, group.policy)

    def _finish(self, name: str, request: Finish) -> FinishReply:
        client = self._started[name]
        held_out, score = client.data.held_out, None
        if held_out and client.policy.may_release("scores"):
            tensors = client.final_tensors(unpack(request.payload), request.state_round)
            score = self._trainer.evaluate(tensors, held_out).value
        return FinishReply(score=finite(score), held_out=len(held_out))


def open_in_process(
    config: Config,
    method: Method,
    run: str,
    channel_type: type[InProcessChannel] = InProcessChannel,
    placement: Placement | None = None,
) -> OpenedFederation:
    """Opens the clients, data and base model of a configuration in this process.

    Raises UserError, at the start, for a configuration of a deployed federation, and for whatever is wrong with the
    data, the model, or their fit.
    """
    if config.engine.name != "in_process":
        raise UserError(
            f"engine.name = {config.engine.name!r} is for a deployed federation. Use `fedsb federation serve`. "
            "To simulate it in one process, use --set engine.name=in_process."
        )
    refuse_what_facts_forbid(config, method)
    refuse_what_would_leak(config, method)
    tokenizer = load_tokenizer(config.model)
    data = open_data(config, tokenizer)
    pooled = method.spec.pools_data
    # With all data in one place, one client does the work of all that take part.
    local = local_training(config, clients=len(data.participants) if pooled else 1)
    trainer = Trainer(config, method, tokenizer, data.task, local, placement=placement)
    trainer.check_rows(data.test)
    for site in data.clients:
        trainer.check_rows([*site.train, *site.held_out])
    clients = [data.pooled()] if pooled else data.participants
    together, reason = _clients_per_forward(config, method, trainer, clients)
    channel = channel_type(run, clients, trainer, together)
    setting = ResolvedSetting(key="engine.clients_per_forward", value=together, reason=reason)
    return OpenedFederation(
        channel=channel,
        clients=clients,
        data=data,
        trainer=trainer,
        directory=channel.directory if config.server.secure_aggregation else {},
        settings=(setting,),
        local_clients=channel,
    )


def _parts(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for first in range(0, len(names), size):
        yield names[first : first + size]


def _clients_per_forward(
    config: Config, method: Method, trainer: Trainer, clients: Sequence[ClientData]
) -> tuple[int, str]:
    """Returns (clients in one forward, reason). A model whose rows cannot share a forward gets 1.

    Raises UserError where more were asked for.
    """
    wanted = config.engine.clients_per_forward
    if wanted == 1 or len(clients) == 1:
        return 1, "as asked" if wanted == 1 else "there is one client"
    if (reason := trainer.preflight.alone) is not None:
        if wanted != "auto":
            raise UserError(f"engine.clients_per_forward = {wanted}: {reason}")
        return 1, f"auto: {reason}"
    if wanted != "auto":
        return wanted, "as asked"
    sizes = ModelSizes.of(
        config,
        trainer.base.model,
        trainer.shapes,
        trainer.block_shapes,
        base=device_bytes(trainer.base.model) + trainer.base.gathered_bytes,
        head=sum(x.numel() for x in trainer.head.values()),
        dtype=choose_dtype(config.model.dtype, trainer.adapted.device)[0],
    )
    cohort = min(config.server.clients_per_round or len(clients), len(clients))
    batch = min(config.train.batch_size, max(client.rows for client in clients))
    memory = memory_by_clients(config, method, sizes, cohort, batch)
    device = trainer.adapted.device
    return auto_clients_per_forward(config, device, memory_of_all(config.model, device), memory)
