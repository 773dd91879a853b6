"""The server's part of secure aggregation: agreements of keys, and the sum of a round (secagg/protocol.py)."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedsb.protocol.messages import NoKeys, SecAggPhase, SecAggPhaseName, SecAggReply
from fedsb.protocol.secure_sum import KEY_ROUNDS, SecureSums, SumTerms
from fedsb.secagg.fixed_point import Doubles
from fedsb.secagg.messages import MessageError, SumError, SumPlan
from fedsb.secagg.server import KeyServer, SumServer
from fedsb.server.exchange import Exchange, reason_of
from fedsb.server.validation import Dropped


@dataclass(frozen=True, kw_only=True)
class Masked:
    """A client's masked change, as it arrived."""

    client: str
    message: bytes
    survivors: Sequence[str] | None  # of an earlier try of this sum, which this client has helped to unmask


@dataclass(frozen=True, kw_only=True)
class Summed:
    """The result of secure aggregation."""

    values: Doubles  # (size,): the weighted sum of the changes
    weight: float  # the sum of the weights
    survivors: Sequence[str]  # the clients in it
    dropped: Sequence[Dropped]
    wire_bytes: Mapping[str, tuple[int, int]]  # of the phases after the masked change, by client: up, down


class SecAggServer:
    """The secure aggregation of a run at its server. Keys are agreed on for many rounds, and again after a loss.

    Args:
        directory: the public keys of all clients.
    """

    def __init__(self, exchange: Exchange, sums: SecureSums, directory: Mapping[str, bytes]) -> None:
        self.exchange, self.sums, self.directory = exchange, sums, directory
        self.wire_bytes: dict[str, tuple[int, int]] = {}  # of agreements, until they are read
        self.absent: dict[str, str] = {}  # why clients have no keys of the newest agreement
        self.restarted: set[str] = set()  # clients that lost keys, until they are read
        self._keys: KeyServer | None = None

    def keys(self, round: int, cohort: Sequence[str]) -> KeyServer:
        """Returns the agreement of this cohort for this round, which is a new one if there is none.

        Raises SumError below the threshold.
        """
        plan = self._keys.plan if self._keys is not None else None
        if plan is None or round >= plan.round + plan.rounds or set(cohort) != set(plan.names):
            self._keys = self._agree(round, cohort)
        assert self._keys is not None
        return self._keys

    def renew(self) -> None:
        """Ends the agreement, because a client has no keys of it or was lost."""
        self._keys = None

    def add_up(self, terms: SumTerms, size: int, masked: Sequence[Masked]) -> Summed:
        """Returns the sum of the masked changes. Raises SumError if too few clients stayed."""
        assert self._keys is not None
        plan, keys = terms.plan(size), self._keys
        server, failed, wire = SumServer(plan, keys), dict[str, str](), dict[str, tuple[int, int]]()
        before = next((each.survivors for each in masked if each.survivors is not None), None)
        try:
            for each in masked:
                if before is not None and each.client not in before:
                    failed[each.client] = "the others have unmasked this sum without it"
                else:
                    self._take(server, each.client, each.message, failed)
            mail = server.survivors_lists()
            if plan.signed:
                self._ask(server, "confirm", mail, failed, wire)
                mail = server.confirmations()
            self._ask(server, "shares", mail, failed, wire)
            values, weight = plan.grid.decode(server.total())
        except SumError as error:
            self.renew()
            why = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
            raise SumError(f"{error}{why}") from error
        if len(server.survivors) < len(plan.names) or failed:
            self.renew()
        dropped = [Dropped(client=name, reason=why) for name, why in failed.items() if name not in server.survivors]
        return Summed(values=values, weight=weight, survivors=server.survivors, dropped=dropped, wire_bytes=wire)

    # --- private ---

    def _agree(self, round: int, cohort: Sequence[str]) -> KeyServer:
        """Returns an agreement. Without signatures one that a client leaves is begun again, without this client."""
        self.absent = {}
        rounds = min(KEY_ROUNDS, self.sums.rounds - round) if len(cohort) == len(self.sums.rows) else 1
        while True:
            sites = {name: self.directory[name] for name in sorted(set(cohort) - set(self.absent))}
            plan = self.sums.key_plan(round, rounds, sites, secrets.token_hex(8))
            server, before = KeyServer(plan), len(self.absent)
            try:
                self._exchange_keys(server)
            except SumError as error:
                stayed = len(cohort) - len(self.absent)
                if not plan.signed and len(self.absent) > before and stayed >= plan.threshold:
                    continue
                why = "".join(f"\n  {name}: {reason}" for name, reason in self.absent.items())
                raise SumError(f"{error}{why}") from error
            return server

    def _exchange_keys(self, server: KeyServer) -> None:
        """Runs the phases of an agreement. Adds to `absent` who left, and why."""
        phases: tuple[tuple[SecAggPhaseName, Callable[[], Mapping[str, bytes]]], ...] = (
            ("advert", lambda: dict.fromkeys(server.plan.names, b"")),
            ("sealed", server.roster),
            ("held", server.inboxes),
        )
        for phase, mail in phases:
            self._ask(server, phase, mail(), self.absent, self.wire_bytes)
        server.close()

    def _ask(
        self,
        server: KeyServer | SumServer,
        phase: SecAggPhaseName,
        mail: Mapping[str, bytes],
        failed: dict[str, str],
        wire: dict[str, tuple[int, int]],
    ) -> None:
        """Asks for one phase. Adds to `failed` why a client's message cannot be used, and to `wire` its bytes."""
        plan = server.plan
        keys = plan.keys if isinstance(plan, SumPlan) else plan
        request = SecAggPhase(
            run=plan.run,
            phase=phase,
            attempt=keys.attempt,
            round=plan.round,
            rounds=keys.rounds,
            cohort=list(keys.names),
            parts=(b"",),
        )
        requests = {name: request.model_copy(update={"parts": (message,)}) for name, message in mail.items()}
        for name, reply in self.exchange.each(requests, what=f"The secure aggregation of round {plan.round + 1}"):
            up, down = wire.get(name, (0, 0))
            wire[name] = up, down + requests[name].wire_bytes
            if isinstance(reply, NoKeys):
                self.restarted.add(name)
            if not isinstance(reply, SecAggReply):
                failed[name] = reason_of(reply)
                continue
            self._take(server, name, reply.payload, failed)
            wire[name] = up + len(reply.payload), wire[name][1]

    def _take(self, server: KeyServer | SumServer, name: str, message: bytes, failed: dict[str, str]) -> None:
        try:
            server.receive(name, message)
        except MessageError as error:
            failed[name] = str(error)
