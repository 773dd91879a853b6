'''Defines what a federated method is: options, facts about it (its spec), and pure functions from state to state.

A round, on every channel. Tensors are named "<layer>.<tensor>":

    message = method.broadcast(state, missed_last_round=..., total_rank=...)    server: what one client receives
    shared  = method.update_shared(shared, message)                        client: equals state.shared afterwards
    own     = method.init_client(shared, message, client_state, round)     client: all tensors of its adapter
    trained = the same tensors after local training, which changes method.trainable(own, round) only
    sent, client_state = method.upload(own, trained, round)                client: what it sends and what it keeps
    state   = method.aggregate(state, updates, server)                     server

A client calls these functions on `method.at(total_rank)`, the method at its own total rank, which is the server's
unless the spec has `mixed_ranks`. `missed_last_round` marks a client that did not receive the last broadcast.

A complete method, with one round of two clients. The fields are the options that `[method]` in a TOML may set:

>>> from fedsb.adapters.factors import factor_start
>>> class Toy(Method):
...     """W = W0 + B A with a frozen random A. Clients train B, and the server averages it."""
...
...     spec: ClassVar[MethodSpec] = MethodSpec(
...         id="toy", paper="arXiv 0000.00000", travels="B, up and down", adapter="factors", exact=True,
...         secagg_compatible=True, dp_noise="linear")
...     rank: Positive = 2
...
...     def traffic(self, shapes, *, head, clients, round=1):
...         values = sum(self.rank * m for m, _ in shapes.values())
...         return Traffic(up=values, down=values, head=head)
...
...     def start(self, shapes, basis, head, seed):
...         tensors = factor_start(shapes, self.rank, seed)
...         A = {f"{layer}.A": tensors.pop(f"{layer}.A") for layer in shapes}
...         return State(tensors={**tensors, **head}, shared=A)
...
...     def trainable(self, tensors, round):
...         return frozenset(key for key in tensors if not key.endswith(".A"))
>>> method = Toy(rank=1)
>>> method.traffic({"layer": (3, 4)}, head=0, clients=2)
Traffic(one_off=0, up=3, down=3, head=0, trained=None)
>>> state = method.start({"layer": (3, 4)}, basis=None, head={}, seed=0)
>>> updates = []
>>> for client, rows, change in (("a", 1, 1.0), ("b", 3, 2.0)):
...     own = method.init_client(state.shared, method.broadcast(state), {}, state.round)
...     trained = {**own, "layer.B": own["layer.B"] + change}
...     sent, client_state = method.upload(own, trained, state.round)
...     updates.append(Update(client=client, weight=rows, tensors=sent))
>>> state = method.aggregate(state, updates, ServerOptimizer())
>>> state.round, state.tensors["layer.B"].flatten().tolist()
(1, [1.75, 1.75, 1.75])

A third party's method is announced in the entry-point group `fedsb.methods`, under the id of its spec.
'''

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from fedsb.adapters.basis import Basis
from fedsb.adapters.core import core_left, key_of, whole_core
from fedsb.adapters.factors import Factors
from fedsb.adapters.residual import apply_delta, delta_of, is_delta, residual_factors, residual_of
from fedsb.config.section import Positive, Section
from fedsb.methods.averaging import ServerOptimizer, average, server_step
from fedsb.utils.tensors import Shapes, Tensors

AdapterKind = Literal["core", "factors"]


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """The properties of a method that `fedsb ls methods`, `fedsb check`, the docs and the laws read."""

    id: str
    paper: str  # title, authors, arXiv id
    travels: str  # what is sent in each direction, in words
    adapter: AdapterKind | None  # None: a control, whose adapter is an option
    exact: bool  # every client starts the next round at W0 + sum p_k dW_k
    secagg_compatible: bool  # the server needs only a sum, so secure aggregation works
    client_state: str = "nothing"  # what a client keeps between rounds, in words
    aggregates: bool = True  # False: clients send nothing, and every client trains alone
    changes_base: bool = False  # rounds add to the residual adapter
    mixed_ranks: bool = False  # clients may differ in total rank
    dp_noise: Literal["linear", "quadratic"]
    supports_server_optimizer: bool = True  # the server takes a mean, along which a server optimizer can step
    rotates_basis: bool = False  # the adapter's coordinates rotate between rounds, so moments cannot be kept
    global_model: bool = True  # False: there is none to score or export
    own_models: bool = False  # every client ends with a model of its own
    alternates: bool = False  # what is trained and sent alternates, so a client that missed a round needs more of it
    pools_data: bool = False  # True: all data are in one place; a control, for simulation only

    @property
    def keeps_coordinates(self) -> bool:
        """Returns whether the server takes a mean of values that mean the same in every round.

        Only then what is not sent in one round can be added in a later one.
        """
        return self.supports_server_optimizer and not self.rotates_basis and not self.changes_base

    def starts_afresh(self, *, sampled: bool) -> bool:
        """Returns whether a lossy broadcast has the tensors, not a change, because clients keep none between rounds.

        `sampled`: whether only some of the clients take part in a round, so that most of them missed the last one.
        """
        return sampled and self.keeps_coordinates and not self.alternates


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The number of values that one client sends and receives, without the task head."""

    one_off: int = 0  # once, at the start
    up: int  # in every round
    down: int  # in every round
    head: int = 0  # values of the task head, in each direction, in every round
    trained: int | None = None  # values that a client trains, if they are not those that it sends up

    @property
    def step(self) -> int:
        """The values of a client's gradient, with the head's: what is summed where a round is one step."""
        return (self.up if self.trained is None else self.trained) + self.head


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything the server knows between rounds. A round makes a new state.

    Tensors are stored contiguously, as they are read from a checkpoint. Otherwise products of the same numbers would
    differ in their last bits after a resume.
    """

    round: int = 0  # completed rounds
    tensors: Tensors  # the tensors that are trained and averaged, including the head
    shared: Tensors = field(default_factory=dict)  # the tensors that every up-to-date client has, such as A and B
    shared_delta: Tensors = field(default_factory=dict)  # what the last round changed in `shared`
    server: Tensors = field(default_factory=dict)  # the moments of the server optimizer
    total_ranks: Mapping[str, int] = field(default_factory=dict)  # client -> its total rank, if it changed in the run
    accepted: Mapping[str, int] = field(default_factory=dict)  # client -> the last round whose update was aggregated
    average: Tensors = field(default_factory=dict)  # the mean of `tensors` after the last rounds, if it is exported
    metrics: Mapping[str, float] = field(default_factory=dict)  # metrics of the last aggregation
    client_view: Tensors = field(default_factory=dict)  # `tensors` as clients have them after a lossy codec

    def __post_init__(self) -> None:
        for name in ("tensors", "shared", "shared_delta", "server"):
            own = {key: tensor.contiguous() for key, tensor in getattr(self, name).items()}
            object.__setattr__(self, name, own)


@dataclass(frozen=True, kw_only=True)
class Update:
    """A client's validated update. `weight` is its number of rows, or 1 if all clients have equal weights."""

    client: str
    weight: float
    tensors: Tensors


class Method(Section):
    """The base class of all methods. Its defaults suit methods whose trained tensors are all sent and averaged.

    The fields are the method's options. `rank` is r, the size of one core or of LoRA's factors, as in the papers.
    """

    model_config = ConfigDict(strict=True)

    spec: ClassVar[MethodSpec]
    metadata_keys: ClassVar[frozenset[str]] = frozenset()  # tensors of an update that are not a part of the model
    adapter: ClassVar[AdapterKind]  # of the spec; controls have an option of this name
    rank: Positive

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        spec = vars(cls).get("spec")
        if isinstance(spec, MethodSpec) and spec.adapter is not None:
            cls.adapter = spec.adapter

    @model_serializer(mode="wrap")
    def _with_name(self, options: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"name": self.spec.id, **options(self)}

    @property
    def scale(self) -> float:
        """The scale s in W = W0 + s * (adapter)."""
        return 1.0

    @property
    def total_rank(self) -> int:
        """The rank of the update and of the exported LoRA: blocks x rank. A basis has this many directions."""
        return self.rank

    def at(self, total_rank: int) -> Self:
        """Returns the method of a client with this total rank. Raises UserError for a rank that is not possible."""
        return self.model_copy(update={"rank": total_rank})

    @abstractmethod
    def traffic(self, shapes: Shapes, *, head: int, clients: int, round: int = 1) -> Traffic:
        """Returns the values that one of `clients` up-to-date clients sends and receives in a round.

        `head` is the number of values of the task head. Round 0 is the first. Where a rank depends on the data, the
        result is an upper bound.
        """

    @abstractmethod
    def start(self, shapes: Shapes, basis: Basis | None, head: Tensors, seed: int) -> State:
        """Returns the state before round 0. Methods with a core need `basis`; `head` is the task head's first value."""

    def merge_into_residual(self, state: State) -> Tensors:
        """Returns the residual adapter with the state's own adapter added, as every client computes it from R."""
        tensors, shared = self.model(state), residual_of(state.shared)
        for layer in [key.removesuffix(".A") for key in tensors if key.endswith(".A")]:
            own = self._factors(tensors, layer)
            shared = apply_delta(shared, delta_of(layer, own.B * own.scale, own.A))
        return shared

    def refresh(self, state: State, shapes: Shapes, basis: Basis, seed: int) -> State:
        """Returns the state with a new basis: the current adapter moves into the residual, and R starts again.

        The head and its moments are kept. The moments of the old core are dropped, since its coordinates have changed.
        """
        fresh = self.start(shapes, basis, {}, seed)
        head = {key: tensor for key, tensor in state.tensors.items() if key not in fresh.tensors}
        server = {key: tensor for key, tensor in state.server.items() if key.partition(".")[2] in head}
        return replace(
            fresh,
            round=state.round,
            tensors={**fresh.tensors, **head},
            shared={**fresh.shared, **self.merge_into_residual(state)},
            server=server,
        )

    def broadcast(self, state: State, *, missed_last_round: bool = False, total_rank: int | None = None) -> Tensors:
        """Returns what the server sends to a client; `total_rank` is the client's, None the method's own.

        The residual of a refresh is not sent: every client takes part in it and computes it by itself.
        """
        whole = missed_last_round and self.spec.changes_base
        return {**state.tensors, **(residual_of(state.shared) if whole else state.shared_delta)}

    def update_shared(self, shared: Tensors, message: Tensors) -> Tensors:
        """Returns a client's shared tensors after a message."""
        return apply_delta(shared, message)

    def init_client(self, shared: Tensors, message: Tensors, client_state: Tensors, round: int) -> Tensors:
        """Returns all tensors of a client's adapter at the start of a round."""
        return {**shared, **{key: tensor for key, tensor in message.items() if not is_delta(key)}}

    @abstractmethod
    def trainable(self, tensors: Tensors, round: int) -> frozenset[str]:
        """Returns the names of a client's tensors that are trained in this round."""

    def penalty(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Returns a local regulariser of the trained tensors (K, ...): one value per client (K,), or None."""
        return None

    def upload(self, received: Tensors, trained: Tensors, round: int) -> tuple[Tensors, Tensors]:
        """Returns what a client sends and what it keeps, from its tensors before and after local training."""
        changed = self.trainable(received, round)
        return {key: tensor for key, tensor in trained.items() if key in changed}, {}

    def aggregate(self, state: State, updates: Sequence[Update], server: ServerOptimizer) -> State:
        """Returns the state after a round."""
        mean = average(updates, state.tensors)
        stepped, moments = server_step(server, state.tensors, mean, state.server)
        tensors, moments = {**state.tensors, **stepped}, {**state.server, **moments}
        return replace(state, round=state.round + 1, tensors=tensors, server=moments)

    def model(self, state: State) -> Tensors:
        """Returns the global model's tensors, for evaluation and export."""
        return self.init_client(state.shared, self.broadcast(state), {}, state.round)

    def export(self, tensors: Tensors) -> dict[str, Factors]:
        """Returns the adapter as plain LoRA, by layer, including the residual adapter. Exact, in float32."""
        layers = [key.removesuffix(".A") for key in tensors if key.endswith(".A")]
        return {layer: self._factors(tensors, layer).plus(residual_factors(tensors, layer)) for layer in layers}

    def _factors(self, tensors: Tensors, layer: str) -> Factors:
        A, B = tensors[f"{layer}.A"], tensors[f"{layer}.B"]
        if self.adapter == "core":
            R, s, P = (tensors.get(key_of(layer, name, tensors)) for name in "RsP")
            assert R is not None
            B = core_left(B, whole_core(R, s, P))
        return Factors(A=A, B=B, scale=self.scale)
