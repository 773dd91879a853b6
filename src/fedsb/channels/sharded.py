"""The channel to clients whose base model is divided among the processes of a launch, with FSDP2 (`fully_shard`).

    torchrun --nproc-per-node 8 -m fedsb run my.toml --set model.placement=sharded

Every rank runs the same whole program with the same rows, in the same order. So all ranks call each block together: its
weights are gathered from all ranks just before its forward or backward, and freed afterwards. The base is frozen, so no
gradient of it is ever exchanged. Adapters and heads are small, and whole on every rank. All ranks compute the same
gradients; after each group of clients they take over the tensors of rank 0, so that rounding cannot separate them.
Rank 0 writes the run directory and shows the run. The others write theirs to a temporary folder.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from fedsb.channels.in_process import Group, InProcessChannel, open_in_process
from fedsb.channels.launch import (
    from_rank_0,
    gathered,
    join_launch,
    leave_launch,
    pack_tensors,
    receive,
    refuse_differences,
    refuse_different,
    told_the_end,
)
from fedsb.config.inputs import ModelConfig
from fedsb.config.resolved import ResolvedSetting
from fedsb.config.schema import Config
from fedsb.methods.base import Method
from fedsb.models.load import BaseModel, choose_device, choose_dtype
from fedsb.models.placement import Placement, device_bytes
from fedsb.server.opened import OpenedFederation, OpenFederation
from fedsb.training.joint import ClientTraining
from fedsb.utils.errors import UserError
from fedsb.utils.formatting import bytes_text

Replica = Callable[[dict[str, Any], Path, bool, OpenFederation], object]  # settings, folder, whether it is resumed

RESUMED = ("manifest.json", "*.jsonl", "shared.safetensors", "checkpoints/*/*", "clients/*/*")  # what `resume` reads
IN_BLOCK = re.compile(r"^.*?\.\d+(?=\.|$)")  # "model.layers.0" in "model.layers.0.mlp.experts.3"


@contextmanager
def launched_sharded(model: ModelConfig, replica: Replica, resumed: Path | None) -> Iterator[OpenFederation | None]:
    """Yields how rank 0 opens its federation. On another rank the whole run is done inside, and None is yielded.

    Args:
        replica: runs on another rank what rank 0 runs, in the folder that it is given.
        resumed: the run directory that rank 0 resumes; None for a new run.

    Raises UserError if the processes cannot reach each other, or the device cannot be used.
    """
    device = _own_device(model.device)
    join_launch("gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl")
    if dist.get_rank():
        if (sent := receive()) is not None:
            settings, files = sent
            with tempfile.TemporaryDirectory(prefix="fedsb-") as folder:
                for name, content in (files or {}).items():
                    path = Path(folder, name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                replica(settings, Path(folder), files is not None, _open)
        yield None
    else:
        started: list[bool] = []
        with told_the_end(started):
            yield partial(_start, resumed, started)
    leave_launch()


def _own_device(name: str) -> torch.device:
    """Returns the device of this process. Raises UserError if it has none of its own, or NCCL is missing."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"model.device = {name!r} cannot be used with model.placement = 'sharded', where each process has a device "
            "of its own. Set it to 'auto', 'cuda' or 'cpu'."
        )
    device, _ = choose_device(name)
    if device.type != "cuda":
        return device
    own, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if not dist.is_nccl_available():
        raise UserError(
            "model.placement = 'sharded' needs NCCL to send weights between GPUs, and this build of PyTorch has none. "
            "Install a build with NCCL, which exists for Linux."
        )
    if own >= devices:
        raise UserError(
            f"model.placement = 'sharded' needs a GPU for each process, and this machine has {devices}. Start at most "
            f"{devices} processes on it: --nproc-per-node {devices}."
        )
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


def _start(resumed: Path | None, started: list[bool], config: Config, method: Method, run: str) -> OpenedFederation:
    """Opens the federation on rank 0, after it has sent the other ranks what they need to do the same."""
    files = None
    if resumed is not None:
        paths = sorted(path for pattern in RESUMED for path in resumed.glob(pattern) if path.is_file())
        files = {str(path.relative_to(resumed)): path.read_bytes() for path in paths}
    started.append(True)
    from_rank_0((config.model_dump(mode="json"), files))
    return _open(config, method, run)


def _open(config: Config, method: Method, run: str) -> OpenedFederation:
    """Opens the clients of a configuration on a rank; all ranks do so together.

    Raises UserError as `open_in_process` does, and on every rank if their data, model, devices or versions differ.
    """
    device = _own_device(config.model.device)
    opened = open_in_process(config, method, run, ShardedChannel, ShardedPlacement(device))
    refuse_differences(opened)
    assert isinstance(opened.channel, ShardedChannel)
    own = opened.channel.clients_per_forward
    opened.channel.clients_per_forward = together = min(gathered(own))
    if together == own:
        return opened
    changed = ResolvedSetting(key="engine.clients_per_forward", value=together, reason="as another process has room")
    return replace(opened, settings=(changed, *(s for s in opened.settings if s.key != changed.key)))


class ShardedPlacement(Placement):
    """Divides a base model among all ranks, block by block.

    The processes of a machine load the model one after the other, so that its memory has the whole model once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self._facts = {"the device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}

    @contextmanager
    def loading(self, config: ModelConfig) -> Iterator[ModelConfig]:
        own, turns = int(os.environ["LOCAL_RANK"]), max(gathered(int(os.environ["LOCAL_WORLD_SIZE"])))
        dtype = str(choose_dtype(config.dtype, self.device)[0]).removeprefix("torch.")
        for _ in range(own):
            _end_turn(None)
        fault = None
        try:
            yield config.model_copy(update={"device": "cpu", "dtype": dtype})
        except UserError as error:
            fault = error
        for _ in range(turns - own):
            _end_turn(fault)
        refuse_different(self._facts)

    def place(self, base: BaseModel) -> BaseModel:
        model, total = base.model, device_bytes(base.model)
        if base.quantization or any(not p.is_floating_point() or p.itemsize == 1 for p in model.parameters()):
            raise UserError(
                f"{base.name!r} has quantised weights, which model.placement = 'sharded' cannot divide. Use a "
                "checkpoint in bfloat16 or float32."
            )
        self._facts["the base model"] = base.fingerprint
        working = shard(model, base.head, self.mesh, self.device)
        size, own = dist.get_world_size(), device_bytes(model)
        reason = (
            f"{size} processes; this one has {own:,} of {total:,} bytes of the weights, and gathers up to "
            f"{bytes_text(working)} during a forward"
        )
        choices = [choice for choice in base.choices if choice.key != "model.device"]
        choices.insert(1, ResolvedSetting(key="model.device", value=str(self.device), reason="one for each process"))
        choices.append(ResolvedSetting(key="model.placement", value="sharded", reason=reason))
        return replace(base, choices=tuple(choices), gathered_bytes=working)


def shard(model: nn.Module, head: Sequence[str], mesh: Any, device: torch.device) -> int:
    """Divides the model's parameters among the ranks of a mesh; the head stays whole, on the device.

    Each block is gathered by itself, and what is outside of the blocks (embeddings, the last norm) for the length of a
    forward. Returns the bytes that are then gathered at once: two blocks, one of them in advance, and the outside.
    """
    from torch.distributed.fsdp import fully_shard

    whole = {p for part in head for p in model.get_submodule(part).to(device).parameters()}
    blocks = blocks_of(model)
    inside = {name: sum(p.nbytes for p in block.parameters() if p not in whole) for name, block in blocks.items()}
    outside = sum(p.nbytes for p in model.parameters() if p not in whole) - sum(inside.values())
    for module in (*blocks.values(), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    return max(outside, 0) + 2 * max(inside.values(), default=0)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the outermost numbered modules that can be called and have parameters, such as "model.layers.0"."""
    found: dict[str, nn.Module] = {}
    for name, _ in model.named_modules():
        if (match := IN_BLOCK.match(name)) and match.group() not in found:
            block = model.get_submodule(match.group())
            if not isinstance(block, (nn.ModuleList, nn.ModuleDict)) and any(True for _ in block.parameters()):
                found[match.group()] = block
    return found


def _end_turn(fault: UserError | None) -> None:
    """Waits for all ranks. Raises, on every rank, the fault of the one whose turn it was."""
    faults = gathered(fault)
    if fault := fault or next((each for each in faults if each is not None), None):
        raise fault


class ShardedChannel(InProcessChannel):
    """An `InProcessChannel` on every rank. All train the same clients, and continue with rank 0's tensors."""

    def train_group(self, group: Group) -> list[ClientTraining]:
        trained = super().train_group(group)
        is_shared = self._trainer.adapted.is_shared
        own = [{key: x for key, x in c.tensors.items() if not is_shared(key)} for c in trained]
        packed = [(pack_tensors(x), pack_tensors(c.moments), c.losses) for x, c in zip(own, trained, strict=True)]
        received = from_rank_0(packed)
        if dist.get_rank() == 0:
            return trained
        return [
            replace(client, tensors={**client.tensors, **load(tensors)}, moments=load(moments), losses=losses)
            for client, (tensors, moments, losses) in zip(trained, received, strict=True)
        ]
