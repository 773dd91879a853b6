"""Decides whether the clients of a run share one noise, and how many shares are certain to be in its sums."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

from fedsb.config.schema import Config
from fedsb.methods.base import Method
from fedsb.privacy.plan import SharedNoise
from fedsb.secagg.threshold import honest_in_sum
from fedsb.utils.errors import UserError


def noise_kind(config: Config, method: Method) -> tuple[Literal["local", "shared"], str]:
    """Returns (who adds the noise of `unit = "example"`, the reason). Other faults are refused elsewhere."""
    asked = config.privacy.noise
    if config.privacy.unit != "example":
        return "local", "rows are not protected one by one"
    if asked != "auto":
        return asked, "as configured"
    if not config.server.secure_aggregation:
        return "local", "auto: without server.secure_aggregation each client adds all of its noise"
    for fault in shared_faults(config, method):
        return "local", f"auto: shared noise is not possible: {fault}"
    return "shared", "auto: server.secure_aggregation is on, and a round is one step"


def sends_moments(config: Config, method: Method) -> bool:
    """Returns whether each broadcast has the server's second moments, by which clients scale their gradients."""
    return config.privacy.scale_then_privatize and noise_kind(config, method)[0] == "shared"


def shared_noise(config: Config, rows: Mapping[str, int], reason: str) -> tuple[SharedNoise, str]:
    """Returns (the sum of a run with shared noise, the reason with the number of shares).

    Raises UserError if the server might learn a sum without an honest client's share.
    """
    colluding = config.privacy.colluding_clients
    asked, threshold = config.server.sum_threshold(len(rows), config.privacy)
    honest = honest_in_sum(asked, threshold, colluding, signed=False)
    if asked < 2 or honest < 1:
        raise UserError(
            f"Shared noise is impossible with {asked} clients per round, of which {threshold} must stay and "
            f"{colluding} may collude with the server. It needs at least 2 clients, and twice server.min_clients must "
            "be more than the clients and the colluding ones together. Raise server.min_clients, lower "
            "privacy.colluding_clients, or set privacy.noise = 'local'."
        )
    shares = f"{honest} shares make up the noise, so that it is complete if {threshold} of {asked} clients stay"
    more = f"; with all of them it is {math.sqrt(asked / honest):.2f} times as large" if asked > honest else ""
    return SharedNoise(clients=asked, honest=honest, rows=sum(rows.values())), f"{reason}; {shares}{more}"


def shared_faults(config: Config, method: Method) -> Iterator[str]:
    """Yields why noise cannot be shared."""
    spec, train = method.spec, config.train
    if not config.server.secure_aggregation:
        yield "clients add up their shares in secure aggregation. Set server.secure_aggregation = true"
    if train.local_steps != 1:
        steps = "local_steps" if train.local_epochs is None else "local_epochs"
        yield (
            f"train.{steps} = {getattr(train, steps)}: a round must be one step. The influence of a row is bounded "
            "in one clipped sum, but not in a model that several steps have changed. Set train.local_steps = 1"
        )
    if not spec.secagg_compatible or spec.client_state != "nothing" or not spec.global_model or spec.pools_data:
        yield f"{spec.id} does not train one set of tensors for all clients, to which one gradient could apply"
    if config.server.optimizer != "none":
        yield (
            f"server.optimizer = {config.server.optimizer!r}: the server takes the steps of train.optimizer itself. "
            "Set server.optimizer = 'none'"
        )
