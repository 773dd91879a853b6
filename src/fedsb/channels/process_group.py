"""The channel to clients that several processes train, on one machine or on many, with torch.distributed.

    torchrun --nproc-per-node 8 -m fedsb run my.toml

Rank 0 is the ordinary program: it has the server, the clients' stores, the ledgers and the run directory. The other
ranks receive its settings, load the same model and data, and train what it sends them: the groups of clients of a
round, which do not depend on the number of ranks. If there are fewer groups than ranks, the ranks form a team for each
group and distribute the forwards of a step (train.gradient_accumulation_steps) among themselves; their gradients are
added in the order of the forwards. So the adapter is the same, bit for bit, for any number of ranks, and a run can be
resumed with another number. Messages go over gloo, also between machines with GPUs: a client's trained
tensors are small, and what clients share is sent again only if it has changed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load
from torch import Tensor

from fedsb.channels.in_process import Group, InProcessChannel, open_in_process
from fedsb.channels.launch import (
    RankTeam,
    join_launch,
    leave_launch,
    pack_tensors,
    receive,
    refuse_differences,
    scatter,
    told_the_end,
)
from fedsb.config.load import load_config
from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.data.tasks.base import Example
from fedsb.methods.base import Method
from fedsb.privacy.policy import PrivacyPolicy
from fedsb.protocol.requirements import privacy_policy_of
from fedsb.server.opened import OpenedFederation, OpenFederation
from fedsb.training.joint import ClientTraining
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.tensors import Tensors, same_tensors


@dataclass(frozen=True, kw_only=True)
class Job:
    """A group of clients that a rank trains, with their own tensors and moments (safetensors).

    The tensors that all clients of one total rank share are sent separately.
    """

    names: Sequence[str]
    total_rank: int | None
    round: int
    own: Sequence[bytes]
    moments: Sequence[bytes]


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """The work of a rank in a round.

    Args:
        shared: by total rank, shared tensors that the rank does not have yet.
        teams: the number of groups, if the ranks form a team for each of them; else 0.
    """

    jobs: Sequence[Job]
    shared: dict[int | None, bytes]
    teams: int


Result = tuple[bytes, bytes, tuple[float, ...], Tensor | None]  # own tensors, moments, losses, share of a step


@contextmanager
def launched() -> Iterator[OpenFederation | None]:
    """Yields how rank 0 opens its federation. On another rank the work is done inside, and None is yielded.

    Raises UserError if the processes of the launch cannot reach each other, and as `open_process_group` does; RunError
    on another rank if rank 0 has ended.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    join_launch("gloo")
    if dist.get_rank():
        work()
        yield None
    else:
        with told_the_end():
            yield open_process_group
    leave_launch()


def open_process_group(config: Config, method: Method, run: str) -> OpenedFederation:
    """Opens the clients of a configuration for training by all ranks; called on rank 0.

    Raises UserError as `open_in_process` does, and on every rank if their data, model or versions differ.
    """
    if config.model.placement == "balanced" and dist.get_world_size() > 1:
        raise UserError(
            "model.placement = 'balanced' uses all GPUs in one process, so it cannot be launched by torchrun. Use "
            "`fedsb run`, or model.placement = 'single'."
        )
    scatter([config.model_dump(mode="json")] * dist.get_world_size())
    opened = open_in_process(config, method, run, ProcessGroupChannel)
    refuse_differences(opened)
    size, groups = dist.get_world_size(), _groups(config, opened)
    hint = ""
    if size > groups * (1 if config.privacy.unit == "example" else config.train.gradient_accumulation_steps):
        hint = "; to use all processes, lower engine.clients_per_forward"
        if config.privacy.unit != "example":
            hint += ", or raise train.gradient_accumulation_steps, whose forwards are distributed"
    reason = f"processes of this launch; {groups} groups of clients in a round{hint}"
    return replace(opened, settings=(*opened.settings, ResolvedSetting(key="engine.ranks", value=size, reason=reason)))


def _groups(config: Config, opened: OpenedFederation) -> int:
    """Returns the number of groups of clients in a round, if all have the same rank."""
    assert isinstance(opened.channel, InProcessChannel)
    cohort = min(config.server.clients_per_round or len(opened.clients), len(opened.clients))
    return -(-cohort // opened.channel.clients_per_forward)


def work() -> None:
    """Trains what rank 0 sends, until it ends the launch; called on the other ranks.

    Raises UserError as `open_process_group` does, RunError if rank 0 has ended.
    """
    if (settings := receive()) is None:
        return
    config = load_config(settings).config
    opened = open_in_process(config, config.method, "work")
    refuse_differences(opened)
    rows = {client.name: client.rows for client in opened.clients}
    policy = privacy_policy_of(config, config.method, rows, opened.trainer.local)
    with tempfile.TemporaryDirectory(prefix="fedsb-") as folder, closing(policy):  # rank 0 has the run's ledgers
        policy.open_ledgers(Path(folder), "work", new=True)
        _work(config, opened, policy)


def _work(config: Config, opened: OpenedFederation, policy: PrivacyPolicy) -> None:
    examples = {client.name: client.train for client in opened.clients}
    shared: dict[int | None, Tensors] = {}
    while (parcel := receive()) is not None:
        shared |= {rank: load(data) for rank, data in parcel.shared.items()}
        opened.trainer.join(RankTeam(parcel.teams) if parcel.teams else None)
        done: list[list[Result]] = []
        fault: RunError | None = None
        try:
            for job in parcel.jobs:
                common = shared[job.total_rank]
                method = config.method if job.total_rank is None else config.method.at(job.total_rank)
                trained = opened.trainer.train(_clients(job, common, examples), method, job.round, policy)
                done.append([(_own(c.tensors, common), pack_tensors(c.moments), c.losses, c.share) for c in trained])
        except RunError as error:  # it ends the run, and rank 0 says so
            fault = error
        is_first = not parcel.teams or dist.get_rank() < parcel.teams
        dist.gather_object(fault or (done if is_first else []))


def _clients(job: Job, shared: Tensors, examples: Mapping[str, Sequence[Example]]) -> list[ClientTraining]:
    return [
        ClientTraining(name=name, examples=examples[name], tensors={**shared, **load(own)}, moments=load(moments))
        for name, own, moments in zip(job.names, job.own, job.moments, strict=True)
    ]


class ProcessGroupChannel(InProcessChannel):
    """An `InProcessChannel` whose groups of clients are trained by all ranks.

    Group i is trained by rank i modulo the number of ranks, or by the team of the ranks i modulo the number of groups.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._sent: dict[int | None, Tensors] = {}  # what the other ranks have

    def train_groups(self, groups: Sequence[Group]) -> Iterator[tuple[Group, list[ClientTraining]]]:
        if not groups:
            return
        size = dist.get_world_size()
        shared = {group.total_rank: self._shared_of(group) for group in groups}
        new = {
            rank: tensors
            for rank, tensors in shared.items()
            if rank not in self._sent or not same_tensors(tensors, self._sent[rank])
        }
        for number, group in enumerate(groups):
            if number % size and (mechanisms := group.policy.row_mechanisms()) is not None:
                for name in group.names:  # on disk before another rank draws a row
                    mechanisms[name].charge(group.round + 1)
        jobs = [
            Job(
                names=group.names,
                total_rank=group.total_rank,
                round=group.round,
                own=[_own(client.tensors, shared[group.total_rank]) for client in group.clients],
                moments=[pack_tensors(client.moments) for client in group.clients],
            )
            for group in groups
        ]
        packed = {rank: pack_tensors(tensors) for rank, tensors in new.items()}
        teams = len(groups) if len(groups) < size and self._distributes(groups[0]) else 0
        parcels: list[Any] = [Parcel(jobs=[], shared={}, teams=teams)]
        for rank in range(1, size):
            own_jobs = [jobs[rank % teams]] if teams else jobs[rank::size]
            parcels.append(Parcel(jobs=own_jobs, shared=packed, teams=teams))
        scatter(parcels)
        self._trainer.join(RankTeam(teams) if teams else None)
        self._sent |= new
        try:
            own, fault = iter([self.train_group(group) for group in groups[::size]]), None
        except RunError as error:  # the others have to be heard first
            own, fault = iter(()), error
        results: list[Any] = [None] * size
        dist.gather_object([], results)
        if fault := fault or next((each for each in results if isinstance(each, RunError)), None):
            raise fault
        for number, group in enumerate(groups):
            rank, place = number % size, number // size
            yield group, next(own) if rank == 0 else _trained(group, results[rank][place])

    def _distributes(self, group: Group) -> bool:
        """Returns whether a step has several forwards that can be distributed. A private step draws noise once."""
        return self._trainer.local.accumulate > 1 and group.policy.row_mechanisms() is None

    def _shared_of(self, group: Group) -> Tensors:
        tensors, adapted = group.clients[0].tensors, self._trainer.adapted
        return {key: x for key, x in tensors.items() if adapted.is_shared(key)}


def _trained(group: Group, results: Sequence[Result]) -> list[ClientTraining]:
    """Returns the clients of a group as another rank has trained them."""
    return [
        replace(
            client,
            tensors={**client.tensors, **load(own)},
            moments=load(moments),
            losses=client.losses + losses,
            share=share,
        )
        for client, (own, moments, losses, share) in zip(group.clients, results, strict=True)
    ]


def _own(tensors: Tensors, shared: Tensors) -> bytes:
    """Returns the tensors that are not shared."""
    return pack_tensors({key: x for key, x in tensors.items() if key not in shared})
