"""A client's shared state: derived from the settings, received, or made again during a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fedsb.adapters.basis import Basis, basis_sketch, same_sketch
from fedsb.adapters.residual import is_residual
from fedsb.client.checks import fitting, refuse_basis, refuse_values
from fedsb.client.memo import Memo
from fedsb.client.round import ClientView
from fedsb.client.store import ClientStore
from fedsb.config.schema import Config
from fedsb.data.clients import ClientData
from fedsb.methods.base import Method, State
from fedsb.privacy.policy import PrivacyPolicy
from fedsb.protocol.compressor import build_compressor
from fedsb.protocol.messages import BasisGradient, BasisGradientReply, CompareShared, Refresh, SetBasis
from fedsb.protocol.payload import Payload, pack, unpack
from fedsb.protocol.schedule import refreshes
from fedsb.protocol.tensors import under, within
from fedsb.training.basis import core_sums, inner_basis, outer_basis, whole_basis
from fedsb.training.trainer import Trainer
from fedsb.utils.errors import RefusalError
from fedsb.utils.tensors import Tensors


@dataclass(frozen=True, kw_only=True)
class ClientSharedState:
    """The shared state of one client in a run that has started."""

    run: str
    data: ClientData
    trainer: Trainer
    memo: Memo
    all_rows: int  # of all clients
    store: ClientStore
    policy: PrivacyPolicy

    @property
    def config(self) -> Config:
        return self.trainer.config

    @property
    def method(self) -> Method:
        return self.trainer.method

    def derive(self) -> str | None:
        """Derives the shared state if it follows from the settings and the base model. Returns its hash, else None."""
        if (view := self.store.view(self.store.start_round)) is not None:
            return view.hash
        if self.method.adapter == "core" and self.config.basis.kind not in ("random", "weights"):
            return None
        basis = self.trainer.data_free_basis(0) if self.method.adapter == "core" else None
        return self._hold(self.memo.get(("start", 0), lambda: self._start(basis)), 0)

    def basis_gradient(self, request: BasisGradient) -> BasisGradientReply:
        """Returns this client's S of a `core` basis. It is made once: a second request gets the stored payload."""
        config, round = self.config, request.round
        if self.method.adapter != "core" or config.basis.kind != "core":
            raise RefusalError(f"basis.kind = {config.basis.kind!r} reads no row of a client.")
        if round:
            self._refuse_undue(round)
        if (stored := self.store.basis_gradient(round)) is not None:
            return BasisGradientReply(rows=stored[1], parts=(stored[0],))
        mechanisms = self.policy.row_mechanisms()
        own, rows = core_sums(
            config,
            self.trainer.adapted,
            self.trainer.task,
            self.data,
            self._basis_start(),
            self._outer(round),
            draw=mechanisms[self.data.name] if mechanisms else self.all_rows,
            round=round,
        )
        compressor = build_compressor(config, self.method, self.run)
        payload = compressor.basis("up", self.data.name, round, own)
        self.store.save_basis_gradient(round, payload, rows)
        return BasisGradientReply(rows=rows, parts=(payload,))

    def set_basis(self, request: SetBasis) -> str:
        """Sets the basis that all clients receive. Returns the hash of the shared state."""
        if round := request.round:
            self._refuse_undue(round)

        def build() -> ClientView:
            received, kind = unpack(request.payload).tensors, self.config.basis.kind
            outer = self._outer(round) if kind == "core" else {}
            A, B = inner_basis(received, outer) if outer else whole_basis(received, self.trainer.shapes)
            view = self._start(Basis(kind=kind, A=A, B=B), within("residual", self.store.refresh_start()), round)
            self._check_shared(view.shared)
            return view

        with fitting():
            view = self.memo.get(("basis", request.payload, round), build)
        return self._hold(view, round)

    def compare_shared(self, request: CompareShared) -> str:
        """Compares the own shared state with the server's by its sketch. Returns the hash under which it is held.

        A state that differs only by the rounding of other hardware keeps its values and takes the server's hash.
        """
        round = self.store.start_round
        view = self.start_view()
        with fitting():
            is_same = same_sketch(basis_sketch(view.shared), unpack(request.payload).tensors)
        return self._hold(replace(view, known_hash=request.shared), round) if is_same else view.hash

    def derived_basis(self) -> bytes:
        """Returns the payload of the basis that this client derived from the base model's weights.

        Raises RefusalError in a run whose coordinator has the weights, and for a basis that looks at rows.
        """
        config = self.config
        if config.server.load_base_model or self.method.adapter != "core" or config.basis.kind != "weights":
            raise RefusalError("The coordinator of this run derives the basis itself.")
        shared = {key: x for key, x in self.start_view().shared.items() if not is_residual(key)}
        payload = Payload.of(shared, kind="basis-up", run=self.run, round=0)
        return pack(replace(payload, client=self.data.name))

    def set_shared(self, shared: Tensors) -> str:
        """Takes `shared` as the shared state at the start. Raises RefusalError for a basis that is not orthonormal."""
        self._check_shared(shared)
        round, basis = self.store.start_round, None
        if self.method.adapter == "core":
            A, B = ({layer: shared[f"{layer}.{side}"] for layer in self.trainer.shapes} for side in "AB")
            basis = Basis(kind=self.config.basis.kind, A=A, B=B)
        return self._hold(replace(self._start(basis, round=round), shared=shared), round)

    def refresh(self, request: Refresh) -> str | None:
        """Merges the adapter into the residual, for a new basis that starts from here.

        Returns the hash of the shared state; None if a basis has to be set first.
        """
        payload = unpack(request.payload)
        self._refuse_undue(payload.round)

        def merge() -> Tensors:
            view = self.latest(payload.round)
            state = State(round=payload.round, tensors=payload.tensors, shared=view.shared)
            return under("residual", self.method.merge_into_residual(state)) | {
                f"head/{key}": payload.tensors[key] for key in self.trainer.head
            }

        with fitting():
            start = self.memo.get(("refresh", request.payload), merge)
        self.store.save_refresh_start(start)
        if self.config.basis.kind != "random":
            return None

        def build() -> ClientView:
            basis = self.trainer.data_free_basis(payload.round)
            return self._start(basis, within("residual", start), payload.round)

        return self._hold(self.memo.get(("start", payload.round), build), payload.round)

    def latest(self, round: int) -> ClientView:
        return self.store.view(round) or self.start_view()

    def start_view(self) -> ClientView:
        view = self.store.view(self.store.start_round)
        if view is None:
            raise RefusalError("This site has no basis yet. Ask it to set one first.")
        return view

    # --- private ---

    def _refuse_undue(self, round: int) -> None:
        """Raises RefusalError for a new basis that the run does not make: its gradients would reveal something."""
        if round not in refreshes(self.config, self.method):
            raise RefusalError(f"No new basis is made before round {round + 1} of this run.")

    def _hold(self, view: ClientView, round: int) -> str:
        """Takes the view as that of the start; `round` counts the rounds that were finished before it."""
        self.store.save_start(view, round)
        return view.hash

    def _start(self, basis: Basis | None, residual: Tensors | None = None, round: int = 0) -> ClientView:
        """Returns the view of a client before any broadcast; `basis` without a first step, if there is one."""
        start = self.trainer.start_state(basis)
        return ClientView({**start.shared, **(residual or {})}, start.tensors, round)

    def _basis_start(self) -> Tensors:
        """Returns the tensors at which gradients are computed: the head, and the current residual adapter."""
        start = self.store.refresh_start()
        if not start:
            return self.trainer.head
        return {**within("residual", start), **within("head", start)}

    def _outer(self, round: int) -> Any:
        rank, config = self.method.total_rank, self.config
        build = lambda: outer_basis(config.basis, self.trainer.adapted, rank, config.seed, round)  # noqa: E731
        return self.memo.get(("outer", round), build)

    def _check_shared(self, shared: Tensors) -> None:
        refuse_values(shared)
        if self.method.adapter == "core":
            refuse_basis(shared, self.trainer.shapes)
