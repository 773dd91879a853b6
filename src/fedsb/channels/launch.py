"""A launch of several processes by torchrun: how they meet, exchange objects, form teams, and end.

Rank 0 is the ordinary program. Objects go over gloo, also between machines with GPUs.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor

from fedsb.protocol.tensors import storable
from fedsb.server.opened import OpenedFederation
from fedsb.utils.environment import versions
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.tensors import Tensors

WAIT = timedelta(days=7)  # for the others: a round may take long, and torchrun ends all ranks if one dies


def join_launch(backend: str) -> None:
    """Connects this process to the others of its launch. Raises UserError if it cannot reach them."""
    try:
        dist.init_process_group(backend, timeout=WAIT)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"The processes of this launch cannot reach each other: {str(error).splitlines()[0]}. Start them with "
            "torchrun: --nproc-per-node, and for several machines --nnodes and --rdzv-endpoint."
        ) from error


def leave_launch() -> None:
    """Ends this process's part of the launch.

    A rank that ends earlier takes the connections of the others down with it, and a model or a team that is freed after
    its process group can abort the process (torch 2.13, gloo).
    """
    with suppress(RuntimeError):  # another rank has ended
        dist.barrier()
    _process_groups.cache_clear()
    gc.collect()
    dist.destroy_process_group()


@contextmanager
def told_the_end(started: Sequence[bool] = ()) -> Iterator[None]:
    """Sends the other ranks the end of the launch, on rank 0, unless they have `started` a run of their own."""
    try:
        yield
    finally:
        if not started and not isinstance(sys.exception(), KeyboardInterrupt):  # which torchrun sends to all ranks
            with suppress(RuntimeError):  # they have found the same fault, and ended
                scatter([None] * dist.get_world_size())


class RankTeam:
    """The ranks that train one group of clients. Member i of n computes the micro-batches i, i + n, ..."""

    def __init__(self, groups: int) -> None:
        """Makes this rank's team where each of `groups` groups has one. All ranks do so, in the same order."""
        self.groups = groups
        self.place, self.own = divmod(dist.get_rank(), groups)
        self.size = len(_process_groups(groups)[self.own][0])

    def computes(self, turn: int) -> bool:
        return turn % self.size == self.place

    def add(self, own: Mapping[int, Tensor], turns: int, shape: tuple[int, ...]) -> Tensor:
        mine = torch.zeros(-(-turns // self.size), *shape)
        for turn, part in own.items():
            mine[turn // self.size].copy_(part)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=_process_groups(self.groups)[self.own][1])
        total = every[0][0]
        for turn in range(1, turns):
            total = total + every[turn % self.size][turn // self.size]
        return total


@cache
def _process_groups(groups: int) -> list[tuple[Sequence[int], Any]]:
    """Returns (ranks, process group) of each team. The cache is emptied before torch ends the process groups."""
    members = [range(group, dist.get_world_size(), groups) for group in range(groups)]
    return [(each, dist.new_group(list(each), timeout=WAIT)) for each in members]


def pack_tensors(tensors: Tensors) -> bytes:
    """Returns tensors as safetensors."""
    return save(storable(tensors))


def scatter(parcels: list[Any] | None) -> Any:
    """Sends each rank its parcel, on rank 0. Returns the one that this rank received."""
    received: list[Any] = [None]
    dist.scatter_object_list(received, parcels)
    return received[0]


def receive() -> Any:
    """Returns what rank 0 sends next; None at the end. Raises RunError if rank 0 has ended without it."""
    try:
        return scatter(None)
    except RuntimeError as error:
        raise RunError(f"rank 0 has ended: {str(error).splitlines()[0]}") from error


def refuse_differences(opened: OpenedFederation) -> None:
    """Raises UserError, on every rank, if a rank has other data, another model or other packages than rank 0."""
    own = {f"the {name} rows": facts["fingerprint"] for name, facts in opened.data.tables.items()}
    own |= {"the base model": opened.trainer.base.fingerprint}
    own |= {f"the version of {name}": version for name, version in versions().items()}
    refuse_different(own)


def gathered(own: Any) -> list[Any]:
    """Returns the objects of all ranks, in their order."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return every


def from_rank_0(sent: Any) -> Any:
    """Returns the object of rank 0, on every rank."""
    return scatter([sent] * dist.get_world_size() if dist.get_rank() == 0 else None)


def refuse_different(own: Mapping[str, Any]) -> None:
    """Raises UserError, on every rank, if a rank has other facts than rank 0."""
    every = gathered(own)
    for rank, other in enumerate(every):
        if odd := [
            f"{what} ({other.get(what)}, on rank 0 {fact})"
            for what, fact in every[0].items()
            if other.get(what) != fact
        ]:
            raise UserError(f"Rank {rank} differs from rank 0 in {'; '.join(odd)}. Give all ranks the same files.")
