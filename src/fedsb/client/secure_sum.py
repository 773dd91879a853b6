"""A client's part in secure aggregation: secagg/protocol.py has the protocol, protocol/secure_sum.py the terms."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsb.client.round import ClientRound
from fedsb.client.store import ClientStore
from fedsb.protocol.messages import SecAggPhase, SumRequest
from fedsb.protocol.secure_sum import SecureSums, SumTerms
from fedsb.secagg.client import ClientKeys, SumClient
from fedsb.secagg.fixed_point import Floats, Ring, Whole
from fedsb.secagg.messages import SumError, SumPlan
from fedsb.utils.errors import RefusalError


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A client's name and key in its federation, and the other clients' keys according to its directory."""

    name: str
    key: Ed25519PrivateKey
    directory: Mapping[str, bytes]  # name -> Ed25519 public key of every client


@dataclass(frozen=True)
class _Sum:
    """The sum of a round in progress, with the masked message that this client has sent."""

    client: SumClient
    plan: SumPlan
    message: bytes


class SecAggSession:
    """The secure aggregation of a run that has started.

    Keys are in memory only. A client that was restarted takes part again after the next agreement.

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
        self._keys: ClientKeys | None = None
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

    def has_keys(self, attempt: str) -> bool:
        """Returns whether this client has the keys of this agreement. It lost them if it was restarted since."""
        return self._keys is not None and self._keys.plan.attempt == attempt

    def check_sum(self, request: SumRequest, round: int) -> None:
        """Raises RefusalError, before any row is read, for a sum that is not of the agreement."""
        assert self._keys is not None
        plan, members, cohort = self._keys.plan, self._keys.members, self.keys(request.cohort).keys()
        agreed = cohort <= members if plan.signed else cohort == members
        if self._identity.name not in cohort or len(cohort) < plan.threshold or not agreed:
            raise RefusalError(
                f"This client takes no part in a sum of {', '.join(cohort) or 'no clients'}. It has agreed on keys for "
                f"sums of at least {plan.threshold} of these clients: {', '.join(sorted(members)) or 'none'}."
            )
        if not plan.round <= round < plan.round + plan.rounds:
            raise RefusalError(f"The keys of this agreement are not for round {round + 1}.")

    def mask(self, shared: ClientRound, change: Floats | Whole, cohort: Sequence[str]) -> tuple[bytes, str | None]:
        """Returns (the masked change of a round, None), or (b"", the reason why it must not go into the sum).

        A change that was masked before for the same sum gets the same message.
        """
        assert self._keys is not None
        terms = self._sums.terms(shared.round, shared.shared_hash, self.keys(cohort), self._keys.plan, shared.against)
        if (reason := terms.rejection_reason(change)) is not None:
            return b"", reason
        plan = terms.plan(len(change))
        if self._current is None or self._current.plan.digest != plan.digest:
            client = SumClient(plan, self._keys)  # raises if its keys are used up, before any noise is charged
            self._current = _Sum(client, plan, client.masked(self._encoded(terms, plan, change)))
        return self._current.message, None

    def survivors(self, round: int) -> list[str] | None:
        """Returns the clients in this round's sum, if this client has helped to unmask it, else None."""
        return self._store.sum_survivors(round)

    def answer(self, request: SecAggPhase) -> bytes | None:
        """Returns this client's message of a phase; None without keys. Raises SumError for one that is not due."""
        phase, message = request.phase, request.payload
        if phase == "advert":
            sites = self.keys(request.cohort)
            plan = self._sums.key_plan(request.round, request.rounds, sites, request.attempt)
            self._keys = ClientKeys(plan, self._identity.name, self._identity.key)
            return self._keys.advertise()
        if self._keys is None or not self.has_keys(request.attempt):
            return None
        if phase == "sealed":
            return self._keys.share_keys(message)
        if phase == "held":
            return self._keys.receive(message)
        if self._current is None or self._current.plan.round != request.round:
            raise SumError("This site has nothing in this sum: it has not trained for it, or was restarted since.")
        client = self._current.client
        if phase == "confirm":
            return client.confirm(message)
        shares = client.unmask(message)  # raises for one that is not due, or not of this sum
        self._allow_one_sum(request.round, client.survivors)
        return shares

    # --- private ---

    def _encoded(self, terms: SumTerms, plan: SumPlan, change: Floats | Whole) -> Ring:
        """Returns what goes into the sum.

        The noise of a client's change is charged here, and drawn once: a repeated sum gets the same. A step's share has
        its noise already.
        """
        name = self._identity.name
        if terms.mechanism is None:
            return terms.encode(name, change)
        facts = f"{terms.round} {terms.digest} {plan.threshold} {len(plan.names)}".encode()
        key = hashlib.sha256(facts + change.tobytes()).hexdigest()
        if (known := self._store.encoded(key)) is None:
            self._sums.charge(terms)
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
