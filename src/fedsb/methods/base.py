"""What a method is: facts as data, and pure functions from state to state.

A round, on every channel (types below; tensors are named "<layer>.<tensor>"):

    message = method.broadcast(state, late=..., rank=...)              server: what one client receives
    shared  = method.update_shared(shared, message)                    client: equals state.shared afterwards
    own     = method.init_client(shared, message, client_state, round) client: all tensors of its adapter
    trained = the same tensors after local training; only those in method.trainable(own, round) have moved
    sent, client_state = method.upload(own, trained, round)            client: what it sends, what it keeps
    state   = method.aggregate(state, updates, server)                 server

A client calls these on `method.at(rank)`, the method at its own rank, which is the server's unless `mixed_ranks`.
`late` is a client that did not get the last round's broadcast: it lacks what has changed in `shared` since then.

A third party's method is a frozen keyword-only dataclass that derives from `Method`, announced in the entry-point
group `fedsb.methods`. Its fields are what `[method]` in a TOML may set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

from torch import Tensor

from fedsb.adapters.adapted import Shapes, Tensors
from fedsb.adapters.basis import Basis
from fedsb.adapters.core import core_left
from fedsb.adapters.factors import Factors
from fedsb.adapters.residual import apply_delta, delta_of, is_delta, residual_factors, residual_of
from fedsb.methods.averaging import ServerOptimizer, average, server_step

AdapterKind = Literal["core", "factors"]


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """What `fedsb ls methods`, `fedsb check`, the docs and the laws know of a method."""

    id: str
    paper: str  # title, authors, arXiv id
    travels: str  # in words: what goes up and down
    adapter: AdapterKind | None  # None: the user chooses
    exact: bool  # every client starts the next round at W0 + sum p_k dW_k
    secagg_compatible: bool  # the server needs only a sum: secure aggregation works
    client_state: str = "nothing"  # what a client must keep between rounds
    changes_base: bool = False  # rounds leave a residual outside the adapter
    mixed_ranks: bool = False  # clients may differ in rank
    dp_noise: Literal["linear", "quadratic"]
    supports_server_optimizer: bool = True  # the server takes a mean, so that a server optimiser can step to it
    rotates_basis: bool = False  # the adapter's coordinates turn between rounds: a client's moments cannot be kept
    global_model: bool = True  # False: every client ends with a model of its own
    pools_data: bool = False  # True: all data in one place, a control for simulation


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Values that travel for one client, the head aside: once at the start, then up and down in every round."""

    one_off: int = 0
    up: int
    down: int
    head: int = 0  # values of the task head, once in each direction in every round


@dataclass(frozen=True, kw_only=True)
class State:
    """All the server knows between rounds. Immutable: a round makes a new one.

    Tensors lie row by row in memory, as they do when a checkpoint is read: products of the same numbers in another
    order differ in their last bits.
    """

    round: int = 0  # rounds finished
    tensors: Tensors  # what is trained and averaged, the head included
    shared: Tensors = field(default_factory=dict)  # what a site holds that is up to date: A and B, say
    shared_delta: Tensors = field(default_factory=dict)  # what the last round changed in `shared`
    server: Tensors = field(default_factory=dict)  # the server optimiser's moments
    ranks: Mapping[str, int] = field(default_factory=dict)  # client -> its rank, where it changed on the way
    accepted: Mapping[str, int] = field(default_factory=dict)  # client -> the last round whose update of it was used
    metrics: Mapping[str, float] = field(default_factory=dict)  # what the last aggregation says of itself
    client_view: Tensors = field(default_factory=dict)  # `tensors` as clients hold them after a lossy codec

    def __post_init__(self) -> None:
        for name in ("tensors", "shared", "shared_delta", "server"):
            own = {key: tensor.contiguous() for key, tensor in getattr(self, name).items()}
            object.__setattr__(self, name, own)


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one client sent in one round, after validation. `weight` is n_k, or 1 when clients weigh alike."""

    client: str
    weight: float
    tensors: Tensors


@dataclass(frozen=True, kw_only=True)
class Method:
    """The contract. The defaults are those of a method whose tensors all travel and are averaged as they are."""

    spec: ClassVar[MethodSpec]
    metadata_keys: ClassVar[frozenset[str]] = frozenset()  # what goes up beside the model, such as a client's next rank
    rank: int

    @property
    def adapter(self) -> AdapterKind:
        assert self.spec.adapter is not None
        return self.spec.adapter

    @property
    def scale(self) -> float:
        """s in W = W0 + s * (adapter)."""
        return 1.0

    @property
    def total_rank(self) -> int:
        """The rank of the exported LoRA; a basis must have as many directions."""
        return self.rank

    def at(self, rank: int) -> Self:
        """The method of a client of this total rank. Raises UserError where it cannot be."""
        return replace(self, rank=rank)

    def traffic(self, shapes: Shapes, *, head: int, clients: int, round: int = 1) -> Traffic:
        """Values that a client, up to date, sends and receives in a round; `clients` take part in it.

        `head` counts the task head's values. Round 0 is the first. At most, where a rank depends on the data.
        """
        raise NotImplementedError

    def start(self, shapes: Shapes, basis: Basis | None, head: Tensors, seed: int) -> State:
        """The state before round 0. A core method needs `basis`; `head` holds the task head's first tensors."""
        raise NotImplementedError

    def merge_into_residual(self, state: State) -> Tensors:
        """The carried adapter with the state's own added to it, as a site adds it that holds `common` and is told R."""
        tensors, shared = self.model(state), residual_of(state.shared)
        for layer in [key.removesuffix(".A") for key in tensors if key.endswith(".A")]:
            own = self._factors(tensors, layer)
            shared = apply_delta(shared, delta_of(layer, own.B * own.scale, own.A))
        return shared

    def refresh(self, state: State, shapes: Shapes, basis: Basis, seed: int) -> State:
        """The state with a new basis under it: the old one's adapter is carried, the new one's starts where it starts.

        The head goes on, and so do its moments; those of the old core pointed elsewhere.
        """
        adapter = tuple(f"{layer}." for layer in shapes)
        head = {key: tensor for key, tensor in state.tensors.items() if not key.startswith(adapter)}
        fresh = self.start(shapes, basis, head, seed)
        server = {key: tensor for key, tensor in state.server.items() if key.partition(".")[2] in head}
        return replace(
            fresh, round=state.round, shared={**fresh.shared, **self.merge_into_residual(state)}, server=server
        )

    def broadcast(self, state: State, *, late: bool = False, rank: int | None = None) -> Tensors:
        """What goes down to a client; `rank` is its total rank, None the method's own.

        What a refresh carries is never sent: every site is there and folds for itself.
        """
        return {
            **state.tensors,
            **(residual_of(state.shared) if late and self.spec.changes_base else state.shared_delta),
        }

    def update_shared(self, shared: Tensors, message: Tensors) -> Tensors:
        """What a site holds after the message, if it held `common` before."""
        return apply_delta(shared, message)

    def init_client(self, shared: Tensors, message: Tensors, client_state: Tensors, round: int) -> Tensors:
        return {**shared, **{key: tensor for key, tensor in message.items() if not is_delta(key)}}

    def trainable(self, tensors: Tensors, round: int) -> frozenset[str]:
        """Which of a client's tensors move in this round."""
        raise NotImplementedError

    def penalty(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """A local regulariser, one value a client (K,), of the trained tensors (K, ...); None: none."""
        return None

    def upload(self, received: Tensors, trained: Tensors, round: int) -> tuple[Tensors, Tensors]:
        """(what goes up, what the client keeps), from the client's tensors before and after its training."""
        moved = self.trainable(received, round)
        return {key: tensor for key, tensor in trained.items() if key in moved}, {}

    def aggregate(self, state: State, updates: Sequence[Update], server: ServerOptimizer) -> State:
        mean = average(updates, state.tensors)
        stepped, moments = server_step(server, state.tensors, mean, state.server)
        tensors, moments = {**state.tensors, **stepped}, {**state.server, **moments}
        return replace(state, round=state.round + 1, tensors=tensors, server=moments)

    def model(self, state: State) -> Tensors:
        """The global model's tensors, for evaluation and export."""
        return self.init_client(state.shared, self.broadcast(state), {}, state.round)

    def export(self, tensors: Tensors) -> dict[str, Factors]:
        """A client's or the global tensors as plain LoRA, by layer, the carried adapter included. Exact, in float32."""
        layers = [key.removesuffix(".A") for key in tensors if key.endswith(".A")]
        return {layer: self._factors(tensors, layer).plus(residual_factors(tensors, layer)) for layer in layers}

    def _factors(self, tensors: Tensors, layer: str) -> Factors:
        A, B = tensors[f"{layer}.A"], tensors[f"{layer}.B"]
        if self.adapter == "core":
            R = tensors[f"{layer}.R"]
            if (s := tensors.get(f"{layer}.s")) is not None:
                R = R * s[:, None, None]
            B = core_left(B, R)
        return Factors(A=A, B=B, scale=self.scale)
