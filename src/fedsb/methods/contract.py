"""What a method is: facts as data, and pure functions from state to state.

A round, as every engine runs it (types below; tensors are named "<layer>.<tensor>"):

    message = method.broadcast(state)                            the server, to every client
    own     = method.receive(state.common, message, kept)        a client: all the tensors of its adapter
    trained = the same tensors after local training; only method.trainable(own, round) have moved
    sent, kept = method.upload(own, trained)                     a client: what goes up, what it keeps for itself
    state   = method.aggregate(state, updates, server)           the server

A third party's method is a frozen keyword-only dataclass that derives from `Method`, announced in the entry-point
group `fedsb.methods`. Its fields are what `[method]` in a TOML may set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from fedsb.adapters.adapted import Shapes, Tensors
from fedsb.adapters.basis import Basis
from fedsb.adapters.core import core_left
from fedsb.adapters.factors import Factors
from fedsb.methods.averaging import ServerOptimizer, average, server_step

AdapterKind = Literal["core", "factors"]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What `fedsb ls methods`, `fedsb check`, the docs and the laws know of a method."""

    id: str
    paper: str  # title, authors, arXiv id
    travels: str  # in words: what goes up and down
    adapter: AdapterKind | None  # None: the user chooses
    exact: bool  # every client starts the next round at W0 + sum p_k dW_k
    sum_only: bool  # the server needs only a sum: secure aggregation works
    client_state: str = "nothing"  # what a client must keep between rounds
    changes_base: bool = False  # rounds leave a residual outside the adapter
    mixed_ranks: bool = False  # clients may differ in rank
    dp_noise: Literal["linear", "quadratic"]
    global_model: bool = True  # False: every client ends with a model of its own
    pools_data: bool = False  # True: all data in one place, a control for simulation
    trainable_here: bool = True  # False: only its traffic is known


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Values that travel for one client, the head aside: once at the start, then up and down in every round."""

    one_off: int = 0
    up: int
    down: int
    head: int = 0  # values of the task head, once in each direction in every round


@dataclass(frozen=True, kw_only=True)
class State:
    """All the server knows between rounds. Immutable: a round makes a new one."""

    round: int = 0  # rounds finished
    tensors: Tensors  # what is trained and averaged, the head included
    common: Tensors = field(default_factory=dict)  # fixed at the start, known to every site: A and B, say
    server: Tensors = field(default_factory=dict)  # the server optimiser's moments


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one client sent in one round, after validation. `weight` is n_k, or 1 when clients weigh alike."""

    client: str
    weight: float
    tensors: Tensors


@dataclass(frozen=True, kw_only=True)
class Method:
    """The contract. The defaults are those of a method whose tensors all travel and are averaged as they are."""

    facts: ClassVar[Facts]
    rank: int

    @property
    def adapter(self) -> AdapterKind:
        assert self.facts.adapter is not None
        return self.facts.adapter

    @property
    def scale(self) -> float:
        """s in W = W0 + s * (adapter)."""
        return 1.0

    @property
    def total_rank(self) -> int:
        """The rank of the exported LoRA; a basis must have as many directions."""
        return self.rank

    def traffic(self, shapes: Shapes, *, head: int, clients: int) -> Traffic:
        """Values a client sends and receives; `clients` take part in a round, `head` values in the task head."""
        raise NotImplementedError

    def start(self, shapes: Shapes, basis: Basis | None, head: Tensors, seed: int) -> State:
        """The state before round 0. A core method needs `basis`; `head` holds the task head's first tensors."""
        raise NotImplementedError

    def broadcast(self, state: State) -> Tensors:
        return state.tensors

    def receive(self, common: Tensors, message: Tensors, kept: Tensors) -> Tensors:
        return {**common, **message}

    def trainable(self, tensors: Tensors, round: int) -> frozenset[str]:
        """Which of a client's tensors move in this round."""
        raise NotImplementedError

    def upload(self, received: Tensors, trained: Tensors) -> tuple[Tensors, Tensors]:
        """(what goes up, what the client keeps), from the client's tensors before and after its training."""
        return trained, {}

    def aggregate(self, state: State, updates: Sequence[Update], server: ServerOptimizer) -> State:
        tensors, moments = server_step(server, state.tensors, average(updates), state.server)
        return replace(state, round=state.round + 1, tensors=tensors, server=moments)

    def model(self, state: State) -> Tensors:
        """The global model's tensors, for evaluation and export."""
        return self.receive(state.common, self.broadcast(state), {})

    def export(self, tensors: Tensors) -> dict[str, Factors]:
        """A client's or the global tensors as plain LoRA, by layer. Exact, in float32."""
        layers = [key.removesuffix(".A") for key in tensors if key.endswith(".A")]
        if self.adapter == "core":
            return {
                layer: Factors(
                    A=tensors[f"{layer}.A"],
                    B=core_left(tensors[f"{layer}.B"], tensors[f"{layer}.R"]),
                    scale=self.scale,
                )
                for layer in layers
            }
        return {layer: Factors(A=tensors[f"{layer}.A"], B=tensors[f"{layer}.B"], scale=self.scale) for layer in layers}
