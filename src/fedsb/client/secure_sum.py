"""A client's part in secure aggregation: secagg/protocol.py has the protocol, protocol/secure_sum.py the terms."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsb.client.round import ClientRound
from fedsb.client.store import ClientStore, Pending
from fedsb.protocol.secure_sum import SecureSums, SumTerms
from fedsb.secagg.client import SumClient
from fedsb.secagg.fixed_point import Floats, Ring
from fedsb.secagg.messages import SumError
from fedsb.utils.errors import RefusalError


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A client's name and key in its federation, and the other clients' keys according to its directory."""

    name: str
    key: Ed25519PrivateKey
    directory: Mapping[str, bytes]  # name -> Ed25519 public key of every client


@dataclass(frozen=True)
class _Sum:
    """A secure aggregation in progress, with this client's change at its start."""

    client: SumClient
    terms: SumTerms
    change: Floats


class SecAggSession:
    """The secure aggregation of a run that has started.

    Args:
        refuse_peers: raises RefusalError for a cohort (name -> key) that this client does not accept.
    """

    def __init__(
        self,
        sums: SecureSums,
        store: ClientStore,
        identity: Identity,
        refuse_peers: Callable[[Mapping[str, bytes]], None] = lambda cohort: None,
    ) -> None:
        self._sums, self._store, self._identity, self._refuse_peers = sums, store, identity, refuse_peers
        self._current: _Sum | None = None

    def keys(self, cohort: Sequence[str]) -> dict[str, bytes]:
        """Returns the keys of a sum's clients. Raises RefusalError for one that is unknown, or not accepted."""
        known = self._identity.directory
        if unknown := [name for name in cohort if name not in known]:
            raise RefusalError(
                f"Secure aggregation with {', '.join(unknown)}: not in this site's directory. Get the newer "
                "directory from the coordinator, run `fedsb site join FILE --directory directory.json`, and restart."
            )
        if strangers := sorted(set(cohort) - set(self._sums.rows)):
            raise RefusalError(f"Secure aggregation with {', '.join(strangers)}: not in this run at its start.")
        self._refuse_peers({name: known[name] for name in cohort if name != self._identity.name})
        return {name: known[name] for name in cohort}

    def enter(self, shared: ClientRound, change: Floats) -> str | None:
        """Stores the change of a round for its sum. Returns the reason if it must not go in, else None."""
        pending = Pending(shared.round, shared.shared_hash, shared.against, change)
        self._store.save_pending(pending)
        return self._terms(pending, [self._identity.name]).rejection_reason(change)

    def answer(self, phase: str, cohort: Sequence[str], message: bytes) -> bytes:
        """Returns this client's message of a phase; `cohort` are all in the sum. Raises SumError for one not due."""
        if phase == "advert":
            if (pending := self._store.pending()) is None:
                raise SumError("This site has nothing to put into a sum: it has not trained.")
            terms = self._terms(pending, cohort)
            client = SumClient(terms.plan(len(pending.change)), self._identity.name, self._identity.key)
            self._current = _Sum(client, terms, pending.change)
            return client.advertise()
        if self._current is None:
            raise SumError("This site takes part in no sum at the moment: it was restarted since.")
        client = self._current.client
        match phase:
            case "sealed":
                return client.share_keys(message)
            case "masked":
                return client.masked(message, self._encoded(self._current))
            case "confirm":
                return client.confirm(message)
            case "shares":
                shares = client.unmask(message)  # raises for one that is not due, or not of this sum
                self._allow_one_sum(client.plan.round, client.survivors)
                return shares
        raise SumError(f"Secure aggregation has no phase {phase!r:.40}.")

    # --- private ---

    def _terms(self, pending: Pending, cohort: Sequence[str]) -> SumTerms:
        return self._sums.terms(pending.round, pending.shared, self.keys(cohort), pending.against)

    def _encoded(self, current: _Sum) -> Ring:
        """Returns what goes into the sum. Its noise is charged here, and drawn once: a repeated sum gets the same."""
        terms, change, name = current.terms, current.change, self._identity.name
        if terms.mechanism is None:
            return terms.encode(name, change)
        key = hashlib.sha256(current.client.plan.digest + change.tobytes()).hexdigest()
        if (known := self._store.encoded(key)) is None:
            if self._store.keeps_answers:  # else the server's ledger is this one, and charged by the server
                terms.mechanism.charge(terms.round + 1)
            known = terms.encode(name, change)
            self._store.save_encoded(key, known)
        return known

    def _allow_one_sum(self, round: int, survivors: tuple[str, ...]) -> None:
        """Raises SumError if this change is already in a sum of other clients: the difference would reveal it."""
        known = self._store.sum_survivors(round)
        if known is not None and known != list(survivors):
            raise SumError(
                f"This site's change of round {round + 1} is already in a sum, with other clients than "
                f"{', '.join(survivors)}: a second sum would reveal the difference."
            )
        self._store.save_sum_survivors(round, survivors)
