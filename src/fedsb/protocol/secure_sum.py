"""Rounds in which the server learns the sum of the clients' changes and not one of them, all parties in this process.

    x_k = sent - unmoved,   flat                     what a client puts in, after it has checked it for itself
    update = unmoved + sum_k p_k x_k / sum_k p_k     what the server gets, one in place of all; p_k = n_k / max n, or 1

The protocol is privacy/secure_sum.py; `unmoved` is what a client sends that has not trained, which the server knows.

Where a client is the unit of privacy, the noise goes in with the changes, in shares: discrete Gaussians whose variances
add up to (sigma C')^2 when no more than the threshold of clients stay. C' = C + step sqrt(size): rounding to the grid
makes a clipped change longer by at most that.

Limits: the keys are made for, and known to, this process: it shows that the sums are right and what they cost, and
hides nothing from whoever runs it. A server that sees no single update cannot judge one: server.max_norm_ratio does
nothing here. Sites that tell each other their shares of the noise can take them off the sum.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedsb.adapters.adapted import Tensors
from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.data.clients import ClientData
from fedsb.privacy.discrete import discrete_gaussian
from fedsb.privacy.mechanism import DPMechanism
from fedsb.privacy.policy import PrivacyPolicy
from fedsb.protocol.payload import Payload, pack
from fedsb.protocol.tensors import change_of, to_arrays
from fedsb.secagg.fixed_point import Doubles, Floats, Ring, unflatten
from fedsb.secagg.protocol import SumPlan, simulate
from fedsb.server.types import SUM, Answer, Reply, Summed
from fedsb.server.validation import Dropped
from fedsb.training.resolved import sum_threshold
from fedsb.utils.errors import UserError
from fedsb.utils.rng import keyed_generator

ALIKE = {"rounds", "seed", "model", "task", "method", "basis", "train", "clients", "server", "privacy"}  # settings
OWN = {"model": {"name", "device"}}  # of these: where a site has its model
HEADROOM = 15.0  # of a value in the ring, in standard deviations of all clients' noise together


@dataclass(frozen=True, kw_only=True)
class Terms:
    """A round's sum, as every site and the server know it beforehand."""

    run: str
    round: int
    basis: str  # hash of what the sites hold in common
    told: str  # hash of the settings, of all rows, and of what the changes are against
    seed: int  # of the rounding
    sites: Mapping[str, bytes]  # of the cohort: Ed25519 public keys
    rows: Mapping[str, int] | None  # n_k; None: all weigh alike
    threshold: int
    limit: float  # of each value of a change
    mechanism: DPMechanism | None  # of the sum, where a client is the unit

    def plan(self, size: int) -> SumPlan:
        """Of changes of so many values. Raises UserError for a sum that would hide nothing."""
        limit = self.limit
        if self.mechanism is not None:
            limit = self.mechanism.plan.clip * (1 + HEADROOM * self.mechanism.plan.sigma / len(self.sites))
        return SumPlan(
            run=self.run,
            round=self.round,
            sites=self.sites,
            threshold=self.threshold,
            size=size,
            clip=limit,
            context=self.told,
        )

    # --- a client ---

    def fault(self, change: Floats) -> str | None:
        """Why a client must not put this in, found by itself: nobody else will see it."""
        largest = float(np.abs(change).max(initial=0.0))
        if not math.isfinite(largest):
            return "its change holds values that are NaN or infinite"
        if self.mechanism is None and largest > self.limit:
            return f"a value of its change is {largest:.3g}, server.secagg_clip allows {self.limit:g}: raise it"
        return None

    def encode(self, client: str, change: Floats) -> Ring:
        plan, weight = self.plan(len(change)), 1.0
        exact = change.astype(np.float64)
        draw, noise = keyed_generator(self.seed, "secure sum", client, self.round), None
        if self.mechanism is not None:
            exact *= min(
                1.0, self.mechanism.plan.clip / max(float(np.linalg.norm(exact)), 1e-300)
            )  # of the very values
            noise = noise_share(plan, self.mechanism)
        elif self.rows:
            weight = self.rows[client] / self._largest
        return plan.grid.encode(exact, weight, draw, noise)

    # --- the server ---

    def summed(self, values: Doubles, weight: float, unmoved: Tensors) -> Summed:
        """One update in place of all; `unmoved` is what a client would have sent that had not trained."""
        base = to_arrays(unmoved)
        mean = unflatten(values / weight, {key: x.shape for key, x in base.items()})
        payload = Payload(
            kind="update",
            run=self.run,
            round=self.round,
            client=SUM,
            samples=max(1, round(weight * self._largest)),
            basis=self.basis,
            tensors={key: x + mean[key] for key, x in base.items()},
        )
        return Summed(envelope=pack(payload))

    @property
    def _largest(self) -> int:
        return max(self.rows.values()) if self.rows else 1


class SecureSums:
    """The sums of a run. Raises UserError where a round has too few clients."""

    def __init__(self, config: Config, policy: PrivacyPolicy, run: str, sites: Sequence[ClientData]) -> None:
        self.server, self.seed, self.run, self.policy = config.server, config.seed, run, policy
        self.rows = {site.name: site.rows for site in sites}
        self.settings = config.model_dump(mode="json", include=ALIKE, exclude=OWN)
        self.clients, self.threshold = sum_threshold(config.server, len(sites))
        if self.clients < 2:
            raise UserError("server.secure_aggregation with one client a round: the sum is its own; take more clients")

    @property
    def choices(self) -> tuple[ResolvedSetting, ...]:
        reason = f"more than half of {self.clients} clients, and at least server.min_clients; with fewer a round ends"
        return (ResolvedSetting(key="server.threshold", value=self.threshold, reason=reason),)

    def here(self, round: int, cohort: Sequence[str], basis: str) -> SecureRound:
        """A round with all parties in this process, with fresh keys."""
        return SecureRound(self, round, cohort, basis)

    def terms(self, round: int, basis: str, sites: Mapping[str, bytes], against: str = "") -> Terms:
        """Of a round among `sites`, its cohort with their keys; `against`: hash of what the changes are against.

        Sites that were told other settings or rows make other masks, which hide all: a server that tells one site to
        train, and the others not to, or that the others weigh nothing, has no sum.
        """
        told = json.dumps([self.settings, self.rows, basis, against], sort_keys=True)
        return Terms(
            run=self.run,
            round=round,
            basis=basis,
            told=hashlib.sha256(told.encode()).hexdigest(),
            seed=self.seed,
            sites=sites,
            rows={name: self.rows[name] for name in sites} if self.server.weighting == "samples" else None,
            threshold=self.threshold,
            limit=self.server.secagg_clip,
            mechanism=self.policy.sum_mechanism(),
        )


class SecureRound:
    """What the clients of one round put in, and then their sum, all parties in this process."""

    def __init__(self, sums: SecureSums, round: int, cohort: Sequence[str], basis: str) -> None:
        self.identities = {name: Ed25519PrivateKey.generate() for name in cohort}
        keys = {name: key.public_key().public_bytes_raw() for name, key in self.identities.items()}
        self.terms = sums.terms(round, basis, keys)
        self._changes: dict[str, Floats] = {}
        self._replies: list[Reply] = []
        self._unmoved: Tensors = {}
        self._faults: list[Dropped] = []

    def put(self, reply: Reply, sent: Tensors, unmoved: Tensors) -> None:
        """A client's change. One that finds a fault in its own leaves the round, with the reason."""
        change = change_of(sent, unmoved)
        self._unmoved = unmoved
        self._replies.append(reply)
        if why := self.terms.fault(change):
            self._faults.append(left(reply.client, why))
        else:
            self._changes[reply.client] = change

    def add_up(self) -> Iterator[Answer]:
        """The clients' replies without updates, who left, and the sum's reply. Raises SumError where too many left."""
        plan = self.terms.plan(sum(x.numel() for x in self._unmoved.values()))
        if self.terms.mechanism is not None:
            self.terms.mechanism.charge(self.terms.round + 1)
        vectors = {name: self.terms.encode(name, change) for name, change in self._changes.items()}
        found = simulate(plan, self.identities, vectors)
        for reply in self._replies:
            wire = {"up": found.up_bytes[reply.client], "down": found.down_bytes[reply.client]}
            counted = [
                replace(sent, wire_bytes=wire[sent.direction] + (sent.wire_bytes if sent.direction == "down" else 0))
                for sent in reply.sent
                if sent.direction == "down" or reply.client in self._changes
            ]
            yield replace(reply, envelope=None, sent=counted)
        yield from self._faults
        yield self.terms.summed(found.values, found.weight, self._unmoved)


def left(client: str, why: str) -> Dropped:
    return Dropped(client=client, reason=f"left the sum by itself: {why}")


def noise_share(plan: SumPlan, mechanism: DPMechanism) -> NDArray[np.int64]:  # (plan.size,), in steps of the grid
    """One client's: with `plan.threshold` such shares the sum has the noise that `mechanism` books, else more."""
    mechanism.require_charged("training")
    longest = mechanism.plan.clip / plan.grid.step + math.sqrt(plan.size)
    return discrete_gaussian(mechanism.noise, mechanism.plan.sigma * longest / math.sqrt(plan.threshold), plan.size)
