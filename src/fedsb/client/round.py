"""A client's part of a round: what it hears, what it trains, what it sends. The same wherever the client is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fedsb.adapters.adapted import Tensors
from fedsb.adapters.basis import basis_hash
from fedsb.data.clients import ClientData
from fedsb.methods.base import Method
from fedsb.privacy.policy import PrivacyPolicy
from fedsb.protocol.compressor import Compressor, unmoved
from fedsb.protocol.payload import Payload
from fedsb.protocol.tensors import to_arrays, under, within
from fedsb.training.joint import Member


@dataclass(frozen=True, kw_only=True)
class ClientUpload:
    """What a client sends, and what it keeps for itself."""

    envelope: bytes
    kept: Tensors
    tensors: Tensors  # in the envelope, before the codec


@dataclass(frozen=True)
class ClientRound:
    """A round as those clients see it that are told the same."""

    method: Method  # at their rank
    shared: Tensors  # what they hold from now on
    message: Tensors
    round: int
    basis: str  # hash of `common`

    @cached_property
    def unmoved(self) -> Tensors:
        """What one of them would send that had not trained."""
        return unmoved(self.method, self.shared, self.message, self.round)

    @cached_property
    def against(self) -> str:
        """A hash of what a change is against, of the tensors that were told."""
        return basis_hash({key: self.message[key] for key in self.unmoved if key in self.message})

    def member(self, site: ClientData, kept: Tensors) -> Member:
        """The client before its training; `kept` is its own state."""
        received = self.method.init_client(self.shared, self.message, within("method", kept), self.round)
        return Member(name=site.name, examples=site.train, tensors=received, moments=within("optimizer", kept))

    def sending(
        self,
        before: Member,
        after: Member,
        rows: int,
        kept: Tensors,
        *,
        link: Compressor,
        policy: PrivacyPolicy,
        keep_optimizer: bool,
    ) -> ClientUpload:
        up, own = self.method.upload(before.tensors, after.tensors, self.round)
        up = policy.clip_update(up, self.unmoved)
        payload = Payload(
            kind="update",
            run=link.run,
            round=self.round,
            client=after.name,
            samples=rows,
            basis=self.basis,
            tensors=to_arrays(up),
        )
        envelope, lost = link.up(self.method, payload, self.unmoved, kept)
        moments = under("optimizer", after.moments) if keep_optimizer else {}
        return ClientUpload(envelope=envelope, kept=under("method", own) | moments | lost, tensors=up)


def at_rank(method: Method, rank: int | None) -> Method:
    """A client's own method; None: its rank is the method's."""
    return method if rank is None else method.at(rank)
