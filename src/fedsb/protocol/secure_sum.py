"""The terms of a run's secure aggregation, which the server and every client derive for themselves.

    x_k = sent - baseline                            a client's input, which the client validates itself
    update = baseline + sum_k p_k x_k / sum_k p_k    what the server gets, one in place of all; p_k = n_k / max n, or 1

The protocol is secagg/protocol.py. The baseline is the update of a client without training, which the server knows.

Where a client is the unit of privacy, the noise goes in with the changes, in shares: discrete Gaussians whose variances
add up to (sigma C')^2 when no more than the threshold of clients stay. C' = C + step sqrt(size): rounding to the grid
makes a clipped change longer by at most that.

With shared noise (a row is the unit) a client's input is its share of a step, in whole numbers: privacy/grid.py. The
noise bounds what such a sum reveals, so the survivors are not signed and a round is one exchange shorter.

Limits: in one process that process knows all keys. Such a run shows that the sums are right and what they cost, but
hides nothing from its user. A server that sees no single update cannot validate one: server.max_norm_ratio has no
effect here. Clients that exchange their shares of the noise can subtract them from the sum.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsb.adapters.layout import Layout
from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.config.training import ServerConfig
from fedsb.privacy.discrete import discrete_gaussian
from fedsb.privacy.grid import LONGER, NARROWEST, NoiseGrid
from fedsb.privacy.mechanism import DPMechanism
from fedsb.privacy.plan import PrivacyPlan
from fedsb.privacy.policy import PrivacyPolicy
from fedsb.protocol.part import part_size
from fedsb.protocol.payload import Payload, pack
from fedsb.protocol.tensors import norm_l2
from fedsb.secagg.fixed_point import BITS, FixedPoint, Floats, Ring, Whole
from fedsb.secagg.messages import KeyPlan, SumPlan
from fedsb.utils.errors import UserError
from fedsb.utils.rng import keyed_generator

SUM = "the sum"  # the client that a summed update names
AGREED = {"rounds", "seed", "model", "task", "method", "basis", "train", "clients", "server", "privacy"}  # settings
OWN = {"model": {"name", "device"}}  # of these: where a site has its model
KEY_ROUNDS = 32  # for which clients agree on keys at once
HEADROOM = 15.0  # of a value in the ring, in standard deviations of all clients' noise together


@dataclass(frozen=True, kw_only=True)
class SumTerms:
    """A round's sum, as every client and the server know it beforehand."""

    run: str
    round: int
    shared: str  # hash of the shared state
    digest: str  # hash of the settings, of all rows, and of what the changes are against
    seed: int  # of the rounding
    clients: Mapping[str, bytes]  # of the cohort: Ed25519 public keys
    keys: KeyPlan
    rows: Mapping[str, int] | None  # n_k; None: all have the same weight
    limit: float  # of each value of a change
    bits: int  # of the ring, where no noise determines it
    mechanism: DPMechanism | None  # of the sum, where a client is the unit
    step: PrivacyPlan | None  # where the sum is one step with shared noise

    def plan(self, size: int) -> SumPlan:
        """Returns the plan for changes of `size` values. Raises UserError for a sum that would hide nothing."""
        noised = self.step if self.mechanism is None else self.mechanism.plan
        return SumPlan(
            run=self.run,
            round=self.round,
            sites=self.clients,
            threshold=self.keys.threshold,
            size=size,
            grid=ring_of(noised, len(self.clients), size)
            or FixedPoint(clients=len(self.clients), clip=self.limit, bits=self.bits),
            keys=self.keys,
            context=self.digest,
        )

    # --- client ---

    def rejection_reason(self, change: Floats | Whole) -> str | None:
        """Returns the reason why a client must not contribute this change, else None. No other party can check it."""
        if self.step is not None:  # whole numbers, checked by the mechanism
            return None
        largest = float(np.abs(change).max(initial=0.0))
        if not math.isfinite(largest):
            return "its change contains values that are NaN or infinite"
        if self.mechanism is None and largest > self.limit:
            return f"a value of its change is {largest:.3g}, server.secagg_clip allows {self.limit:g}: raise it"
        return None

    def encode(self, client: str, change: Floats | Whole) -> Ring:
        """Returns a client's change, or its share of a step, in the ring."""
        plan, weight = self.plan(len(change)), 1.0
        if self.step is not None:
            return plan.grid.encode_whole(change.astype(np.int64))
        exact = change.astype(np.float64)
        draw, noise = keyed_generator(self.seed, "secure sum", client, self.round), None
        if self.mechanism is not None:  # the clip of these very values
            exact *= min(1.0, self.mechanism.plan.clip / max(norm_l2(exact), 1e-300))
            noise = noise_share(plan, self.mechanism)
        elif self.rows:
            weight = self.rows[client] / self._largest
        return plan.grid.encode(exact, weight, draw, noise)

    # --- server ---

    def payload(self, vector: Floats, weight: float, layout: Layout) -> bytes:
        """Returns the payload of one update in place of all; `weight` is the sum of the clients' weights."""
        payload = Payload(
            kind="update",
            run=self.run,
            round=self.round,
            client=SUM,
            samples=max(1, round(weight * self._largest)),
            basis=self.shared,
            layout=layout,
            vector=vector,
        )
        return pack(payload)

    @property
    def _largest(self) -> int:
        return max(self.rows.values()) if self.rows else 1


class SecureSums:
    """The secure aggregation of a run. Raises UserError if a round has too few clients."""

    def __init__(self, config: Config, policy: PrivacyPolicy, run: str, rows: Mapping[str, int]) -> None:
        self.server, self.seed, self.run, self.policy, self.rows = config.server, config.seed, run, policy, dict(rows)
        self.rounds = config.rounds
        self.settings = config.model_dump(mode="json", include=AGREED, exclude=OWN)
        privacy = config.privacy if policy.shared_noise else None
        self.clients, self.threshold = config.server.sum_threshold(len(rows), privacy)
        shared = next((plan.shared for plan in policy.plans.values()), None)
        self._charged: tuple[str, int] | None = None  # the agreement and the round that were charged last
        self.smallest = shared.honest if shared else self.threshold  # clients in a sum that the server can learn
        if self.clients < 2:
            raise UserError(
                "server.secure_aggregation with one client per round: its sum is its own update. Use more clients"
            )

    @property
    def settings_shown(self) -> tuple[ResolvedSetting, ...]:
        if self.policy.shared_noise:
            reason = "at most a tenth may leave" if self.threshold != self.server.min_clients else "server.min_clients"
            reason += ": the shares of noise of those who may are added for nothing"
        else:
            reason = f"more than half of {self.clients} clients, and at least server.min_clients"
        return (ResolvedSetting(key="server.threshold", value=self.threshold, reason=f"{reason}; with fewer it ends"),)

    def charge(self, terms: SumTerms) -> None:
        """Charges the noise of a sum of changes, once: in one process all clients and the server have one ledger."""
        key = terms.keys.attempt, terms.round
        if terms.mechanism is not None and key != self._charged:
            terms.mechanism.charge(terms.round + 1)
            self._charged = key

    def key_plan(self, round: int, rounds: int, sites: Mapping[str, bytes], attempt: str) -> KeyPlan:
        """Returns the plan of an agreement of keys for the rounds from `round`, counted from 0, on.

        Raises UserError for one that this run does not make.
        """
        if not 0 < rounds <= min(KEY_ROUNDS, self.rounds - round):
            raise UserError(f"Keys for {rounds} rounds from round {round + 1} on, in a run of {self.rounds} rounds.")
        if len(sites) > self.clients:  # with more, fewer of those in a sum might be honest
            raise UserError(f"Keys of {len(sites)} clients, in a run with {self.clients} clients per round.")
        return KeyPlan(
            run=self.run,
            round=round,
            rounds=rounds,
            sites=sites,
            threshold=self.threshold,
            attempt=attempt,
            signed=not self.policy.shared_noise,
        )

    def terms(
        self, round: int, shared: str, clients: Mapping[str, bytes], keys: KeyPlan, against: str = ""
    ) -> SumTerms:
        """Returns the terms of a round among `clients`, its cohort with their keys.

        `against` is a hash of the tensors from which changes are computed. Clients that received different settings or
        rows make different masks, which do not cancel. So a server that trains one client alone, or gives the others no
        weight, gets no sum.
        """
        agreed = json.dumps([self.settings, self.rows, shared, against], sort_keys=True)
        weighted = self.server.weighting == "samples" and not self.policy.shared_noise
        return SumTerms(
            run=self.run,
            round=round,
            shared=shared,
            digest=hashlib.sha256(agreed.encode()).hexdigest(),
            seed=self.seed,
            clients=clients,
            keys=keys,
            rows={name: self.rows[name] for name in clients} if weighted else None,
            limit=self.server.secagg_clip,
            bits=self.server.secagg_bits,
            mechanism=self.policy.sum_mechanism(),
            step=next(iter(self.policy.plans.values())) if self.policy.shared_noise else None,
        )


def ring_of(plan: PrivacyPlan | None, clients: int, size: int) -> FixedPoint | None:
    """Returns the ring that the noise of a sum determines; None for a sum without noise.

    In that of clipped changes, rounding makes a change longer by at most a hundredth.
    """
    if plan is None:
        return None
    if plan.shared is not None:
        return NoiseGrid.of(plan, size).ring(clients)
    reach = clients + HEADROOM * plan.sigma  # of the sum, in clips
    bits = max(NARROWEST, min(BITS, 1 + math.ceil(math.log2(reach * math.sqrt(size) / LONGER + 1))))
    return FixedPoint(clients=clients, clip=plan.clip * reach / clients, bits=bits)


def masked_bytes(server: ServerConfig, plan: PrivacyPlan | None, values: int) -> int:
    """Returns the size in bytes of a masked update of `values` values; `plan` is that of a private run."""
    n, ring = part_size(values, server.fraction), None
    if plan is not None and (plan.unit == "client" or plan.shared is not None):
        ring = ring_of(plan, plan.shared.clients if plan.shared else plan.batch, n)
    return (ring or FixedPoint(clients=1, clip=1.0, bits=server.secagg_bits)).packed_bytes(n)


def noise_share(plan: SumPlan, mechanism: DPMechanism) -> NDArray[np.int64]:  # (plan.size,), in steps of the grid
    """Returns one client's noise: with `plan.threshold` shares the sum has the noise in the ledger, else more."""
    mechanism.require_charged("training")
    longest = mechanism.plan.clip / plan.grid.step + math.sqrt(plan.size)
    return discrete_gaussian(mechanism.noise, mechanism.plan.sigma * longest / math.sqrt(plan.threshold), plan.size)
