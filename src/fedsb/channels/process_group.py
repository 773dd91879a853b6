"""The channel to clients that several processes train, on one machine or on many, with torch.distributed.

    torchrun --nproc-per-node 8 -m fedsb run my.toml

Rank 0 is the ordinary program: it has the server, the clients' stores, the ledgers and the run directory. The other
ranks receive its settings, load the same model and data, and train what it sends them: the groups of clients of a
round, which do not depend on the number of ranks. So the adapter is the same, bit for bit, for any number of ranks, and
a run can be resumed with another number. Messages go over gloo, also between machines with GPUs: a client's trained
tensors are small, and what clients share is sent again only if it has changed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save

from fedsb.channels.in_process import Group, InProcessChannel, open_in_process
from fedsb.config.load import load_config
from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.data.tasks.base import Example
from fedsb.methods.base import Method
from fedsb.privacy.policy import PrivacyPolicy
from fedsb.protocol.requirements import privacy_policy_of
from fedsb.protocol.tensors import storable
from fedsb.server.opened import OpenedFederation, OpenFederation
from fedsb.training.joint import ClientTraining
from fedsb.utils.environment import versions
from fedsb.utils.errors import RunError, UserError
from fedsb.utils.tensors import Tensors, same_tensors

WAIT = timedelta(days=7)  # for the others: a round may take long, and torchrun ends all ranks if one dies


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
    """The work of a rank in a round. `shared` contains, by total rank, shared tensors that it does not have yet."""

    jobs: Sequence[Job]
    shared: dict[int | None, bytes]


Result = tuple[bytes, bytes, tuple[float, ...]]  # own tensors, moments and losses of a trained client


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
    dist.destroy_process_group()


def join_launch(backend: str) -> None:
    """Connects this process to the others of its launch. Raises UserError if it cannot reach them."""
    try:
        dist.init_process_group(backend, timeout=WAIT)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"The processes of this launch cannot reach each other: {str(error).splitlines()[0]}. Start them with "
            "torchrun: --nproc-per-node, and for several machines --nnodes and --rdzv-endpoint."
        ) from error


@contextmanager
def told_the_end(started: Sequence[bool] = ()) -> Iterator[None]:
    """Sends the other ranks the end of the launch, on rank 0, unless they have `started` a run of their own."""
    try:
        yield
    finally:
        if not started and not isinstance(sys.exception(), KeyboardInterrupt):  # which torchrun sends to all ranks
            with suppress(RuntimeError):  # they have found the same fault, and ended
                _scatter([None] * dist.get_world_size())


def open_process_group(config: Config, method: Method, run: str) -> OpenedFederation:
    """Opens the clients of a configuration for training by all ranks; called on rank 0.

    Raises UserError as `open_in_process` does, and on every rank if their data, model or versions differ.
    """
    _scatter([config.model_dump(mode="json")] * dist.get_world_size())
    opened = open_in_process(config, method, run, ProcessGroupChannel)
    refuse_differences(opened)
    size, groups = dist.get_world_size(), _groups(config, opened)
    hint = "; lower engine.clients_per_forward to use all processes" if size > groups else ""
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
        done: list[list[Result]] = []
        fault: RunError | None = None
        try:
            for job in parcel.jobs:
                common = shared[job.total_rank]
                method = config.method if job.total_rank is None else config.method.at(job.total_rank)
                trained = opened.trainer.train(_clients(job, common, examples), method, job.round, policy)
                done.append([(_own(c.tensors, common), pack_tensors(c.moments), c.losses) for c in trained])
        except RunError as error:  # it ends the run, and rank 0 says so
            fault = error
        dist.gather_object(fault or done)


def _clients(job: Job, shared: Tensors, examples: Mapping[str, Sequence[Example]]) -> list[ClientTraining]:
    return [
        ClientTraining(name=name, examples=examples[name], tensors={**shared, **load(own)}, moments=load(moments))
        for name, own, moments in zip(job.names, job.own, job.moments, strict=True)
    ]


class ProcessGroupChannel(InProcessChannel):
    """An `InProcessChannel` whose groups of clients are trained by all ranks: group i by rank i modulo their number."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._sent: dict[int | None, Tensors] = {}  # what the other ranks have

    def train_groups(self, groups: Sequence[Group]) -> Iterator[tuple[Group, list[ClientTraining]]]:
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
        _scatter([Parcel(jobs=jobs[rank::size] if rank else [], shared=packed if rank else {}) for rank in range(size)])
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

    def _shared_of(self, group: Group) -> Tensors:
        tensors, adapted = group.clients[0].tensors, self._trainer.adapted
        return {key: x for key, x in tensors.items() if adapted.is_shared(key)}


def _trained(group: Group, results: Sequence[Result]) -> list[ClientTraining]:
    """Returns the clients of a group as another rank has trained them."""
    return [
        replace(client, tensors={**client.tensors, **load(own)}, moments=load(moments), losses=client.losses + losses)
        for client, (own, moments, losses) in zip(group.clients, results, strict=True)
    ]


def _own(tensors: Tensors, shared: Tensors) -> bytes:
    """Returns the tensors that are not shared."""
    return pack_tensors({key: x for key, x in tensors.items() if key not in shared})


def pack_tensors(tensors: Tensors) -> bytes:
    """Returns tensors as safetensors."""
    return save(storable(tensors))


def _scatter(parcels: list[Any] | None) -> Any:
    """Sends each rank its parcel, on rank 0. Returns the one that this rank received."""
    received: list[Any] = [None]
    dist.scatter_object_list(received, parcels)
    return received[0]


def receive() -> Any:
    """Returns what rank 0 sends next; None at the end. Raises RunError if rank 0 has ended without it."""
    try:
        return _scatter(None)
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
    return _scatter([sent] * dist.get_world_size() if dist.get_rank() == 0 else None)


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
