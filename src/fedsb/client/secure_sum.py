"""A site's part in the secure sums of a run; privacy/secure_sum.py has the protocol, engines/secure.py the terms."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsb.client.policy import AllowConfig, refuse_peers, refuse_sum
from fedsb.client.store import Pending, Store
from fedsb.protocol.secure_sum import SecureSums, Terms
from fedsb.secagg.client import SumClient
from fedsb.secagg.fixed_point import Floats, Ring
from fedsb.secagg.messages import SumError
from fedsb.utils.errors import RefusalError
from fedsb.utils.files import write_atomic

if TYPE_CHECKING:
    from fedsb.client.session import Identity


@dataclass(frozen=True)
class Summing:
    """A secure sum that this site is in, with what it had to put in when it was asked."""

    client: SumClient
    terms: Terms
    change: Floats


class SecAggSession:
    """Of a run that starts. Raises RefusalError where the site's rules are against its sums."""

    def __init__(self, sums: SecureSums, store: Store, identity: Identity, allow: AllowConfig) -> None:
        refuse_sum(allow, sums.threshold)
        self._sums, self._store, self._identity, self._allow = sums, store, identity, allow
        self._now: Summing | None = None

    def keys(self, cohort: Sequence[str]) -> dict[str, bytes]:
        """Of a sum's parties, by this site's directory. Raises RefusalError for one unknown, or not as pinned."""
        known = self._identity.directory
        if unknown := [name for name in cohort if name not in known]:
            raise RefusalError(
                f"a secure sum with {', '.join(unknown)}, whom this site's directory does not have: take the "
                "coordinator's newer one, `fedsb join FILE --directory directory.json`, and start again"
            )
        if strangers := sorted(set(cohort) - set(self._sums.rows)):
            raise RefusalError(f"a secure sum with {', '.join(strangers)}, who were not in this run at its start")
        refuse_peers(self._allow, {name: known[name] for name in cohort if name != self._identity.name})
        return {name: known[name] for name in cohort}

    def fault(self) -> str | None:
        """Why what is pending must not go into a sum."""
        pending = self._pending()
        return self._terms(pending, [self._identity.name]).fault(pending.change)

    def answer(self, phase: str, cohort: Sequence[str], message: bytes) -> bytes:
        """This site's message of a phase; `cohort` are all in the sum. Raises SumError for one that is not due."""
        if phase == "advert":
            pending = self._pending()
            terms = self._terms(pending, cohort)
            client = SumClient(terms.plan(len(pending.change)), self._identity.name, self._identity.key)
            self._now = Summing(client, terms, pending.change)
            return client.advertise()
        if self._now is None:
            raise SumError("this site has no part in a sum that is going on: it was started anew since")
        client = self._now.client
        match phase:
            case "sealed":
                return client.share_keys(message)
            case "masked":
                return client.masked(message, self._encoded(self._now))
            case "confirm":
                return client.confirm(message)
            case "shares":
                shares = client.unmask(message)  # raises for one that is not due, or not of this sum
                self._one_sum(client.plan.round, client.survivors)
                return shares
        raise SumError(f"a secure sum has no phase {phase!r:.40}")

    # --- the inside ---

    def _pending(self) -> Pending:
        if (pending := self._store.pending()) is None:
            raise SumError("this site has nothing to put into a sum: it has not trained")
        return pending

    def _terms(self, pending: Pending, cohort: Sequence[str]) -> Terms:
        return self._sums.terms(pending.round, pending.basis, self.keys(cohort), pending.against)

    def _encoded(self, summing: Summing) -> Ring:
        """What goes into the sum. Its noise is booked here, and drawn once: a sum that is begun again gets the same."""
        terms, change, name = summing.terms, summing.change, self._identity.name
        if terms.mechanism is None:
            return terms.encode(name, change)
        key = hashlib.sha256(summing.client.plan.digest + change.tobytes()).hexdigest()
        if (known := self._store.encoded(key)) is None:
            terms.mechanism.charge(terms.round + 1)
            known = terms.encode(name, change)
            self._store.save_encoded(key, known)
        return known

    def _one_sum(self, round: int, survivors: tuple[str, ...]) -> None:
        """The same change in two sums with other survivors would be told by their difference."""
        path = self._store.folder / "sums" / f"round-{round:04d}.json"
        if path.is_file() and json.loads(path.read_text()) != list(survivors):
            raise SumError(
                f"this site's change of round {round + 1} is in a sum already, with others than "
                f"{', '.join(survivors)}: a second sum would tell the difference"
            )
        write_atomic(path, json.dumps(list(survivors)).encode())
