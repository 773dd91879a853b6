"""Estimates the seconds and the peak memory of each phase of a run, on this machine or on a GPU that is not here.

Seconds are operations over the speed of the machine: that of a matrix product, here measured, of a GPU assumed. Memory
on a GPU is what torch allocates there; on a CPU it is the resident memory of the process. The phases are those of
`utils/phases.py`; benchmarks/scale compares both.

Shapes: m x n of an adapted layer, t tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedsb.adapters.basis import EXACT_SIZE, sketch_width
from fedsb.config.schema import Config
from fedsb.methods.base import Method
from fedsb.training.basis import outer_rank
from fedsb.training.memory import Memory, ModelSizes
from fedsb.training.resolved import gradient_budget
from fedsb.training.scoring import LOGIT_VALUES
from fedsb.utils.environment import memory_of
from fedsb.utils.tensors import Shapes

PROCESS = 650 << 20  # bytes of a CPU process with torch and transformers, before any model
READ = 1.0e9  # bytes a second, from disk to memory
WRITE = 2.0e8
LAYER = 3e-3  # seconds that a layer takes however small it is
START = 2.5  # seconds: the tokenizer, the data, the layers of the model
OVERHEAD = 1.4  # of a step relative to its matrix products, measured on two cores (benchmarks/scale)
SVD = 30  # operations of an exact SVD over m n min(m, n), at the speed of a product: it is less parallel
DRAW = 5e-8  # seconds a value of a random basis, with its QR
GPU_BYTES = 1 << 30  # GB, as in "an 80 GB card"
GPU_SPEED = {40: 1.2e14, 0: 4e13}  # operations a second in 16 bits of a card with at least so many GB, if half used
GPU_SLOWER = {torch.float32: 8, torch.float64: 16}  # than in 16 bits


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The device of a run: its type, its memory in bytes, and its speed by dtype, in operations a second."""

    device: torch.device
    memory: int | None
    speed: Callable[[torch.dtype], float]
    says: Callable[[torch.dtype], str]

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """Returns this machine, whose speed is measured when it is asked for."""
        measured: dict[torch.dtype, float] = {}

        def speed(dtype: torch.dtype) -> float:
            return measured.setdefault(dtype, operations_a_second(device, dtype))

        return cls(
            device=device,
            memory=memory_of(device),
            speed=speed,
            says=lambda dtype: f"at a measured {speed(dtype) / 1e9:,.0f} GFLOP/s",
        )

    @classmethod
    def gpu(cls, gigabytes: float) -> Machine:
        """Returns a GPU that is not here. Its speed is an assumption, not a measurement."""
        fast = next(value for least, value in GPU_SPEED.items() if gigabytes >= least)

        def speed(dtype: torch.dtype) -> float:
            return fast / GPU_SLOWER.get(dtype, 1)

        return cls(
            device=torch.device("cuda"),
            memory=int(gigabytes * GPU_BYTES),
            speed=speed,
            says=lambda dtype: f"at {speed(dtype) / 1e12:,.0f} TFLOP/s, which is assumed for such a GPU",
        )


@dataclass(frozen=True, kw_only=True)
class Work:
    """The tokens of a run, each row as wide as its padded batch.

    Args:
        trained: in all rounds of all clients.
        scored: in all evaluations.
        basis: of the rows that a basis with gradients looks at.
        share: of the rows of the captured share.
    """

    trained: float
    scored: float
    basis: float
    share: float

    def __str__(self) -> str:
        return f"{self.trained:,.0f} training tokens, {self.scored:,.0f} scored tokens"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds (None: the rows are not known) and bytes of a phase."""

    seconds: float | None
    memory_bytes: int


def phase_costs(
    config: Config,
    method: Method,
    sizes: ModelSizes,
    machine: Machine,
    training: Memory,
    alone: Memory,
    linear: int,
    work: Work | None,
) -> dict[str, Cost]:
    """Returns the cost of each phase.

    Args:
        training: the memory of a round.
        alone: the same for one client in a forward.
        linear: weights of all linear layers of the model.
        work: None: the rows are not known.
    """
    dtype, on_cpu = sizes.dtype, machine.device.type == "cpu"
    speed = machine.speed(dtype)
    forward, window = OVERHEAD * 2 * linear / speed, config.model.max_seq_length  # seconds a token
    adapted = sum(m * n for m, n in sizes.shapes.values())
    values = sum(method.total_rank * (m + n) for m, n in sizes.shapes.values())
    own = PROCESS if on_cpu else 0
    host = 4 * values if on_cpu else 0  # A and B in float32, which a GPU does not hold
    rows = config.train.batch_size
    per_token = alone.activations / max(1, rows * window)
    free = None if machine.memory is None else machine.memory - sizes.base
    budget = gradient_budget(config, machine.device, free=free)
    passes = max(1, math.ceil(4 * adapted / budget))
    seconds = {
        "load": START + (2 if on_cpu else 1) * sizes.base / READ + 2 * forward * 5 * window,
        "basis": _basis_seconds(config, method, sizes.shapes, machine)
        + (2 * forward * passes * work.basis if work else 0),
        "captured share": (2 * forward + 2 * adapted / machine.speed(torch.float32)) * passes * work.share
        if work
        else 0.0,
        "scores": forward * work.scored if work else 0.0,
        "rounds": 2 * forward * work.trained if work else 0.0,
        "export": LAYER * len(sizes.shapes) + 4 * values / WRITE + 2 * forward * 4 * window,
    }
    scored = config.eval.batch_size * window
    logits = min(LOGIT_VALUES, scored * sizes.vocabulary) * (dtype.itemsize + 8)
    widest = max((m + n for m, n in sizes.block_shapes.values()), default=0)
    gradients = min(budget, 4 * adapted)
    memory = {
        "load": min(2, rows) * window * (per_token + sizes.vocabulary * (2 * dtype.itemsize + 8)),
        "basis": host + 16 * max((m * n for m, n in sizes.shapes.values()), default=0),
        "captured share": host + gradients + rows * window * per_token if not work or work.share else host,
        "scores": host + logits + 4 * scored * widest * dtype.itemsize,
        "rounds": host + training.total - sizes.base,
        "export": host + 3 * 4 * values,
    }
    return {
        phase: Cost(seconds=seconds[phase] if work else None, memory_bytes=round(own + sizes.base + memory[phase]))
        for phase in seconds
    }


def operations_a_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the device's speed at a matrix product, in operations per second. MPS has no float64."""
    device = torch.device("cpu") if device.type == "mps" and dtype == torch.float64 else device
    a = torch.randn(768, 768, device=device).to(dtype)
    a @ a
    started = time.perf_counter()
    for _ in range(20):
        b = a @ a
    b.sum().item()
    return 20 * 2 * 768**3 / (time.perf_counter() - started)


def _basis_seconds(config: Config, method: Method, shapes: Shapes, machine: Machine) -> float:
    """Returns the seconds of the linear algebra of a basis, in float64."""
    if method.adapter != "core":
        return 0.0
    around = config.basis.kind == "core"
    kind = config.basis.outer if around else config.basis.kind
    drawn, work = 0, 0
    for shape in shapes.values():
        r = outer_rank(config.basis, shape, method.total_rank) if around else method.total_rank
        drawn += r * sum(shape)
        work += _svd_operations(*shape, r, exact=kind == "weights" and min(shape) <= EXACT_SIZE)
    if kind == "random":
        return DRAW * drawn
    return 2 * LAYER * len(shapes) + work / machine.speed(torch.float64)


def _svd_operations(m: int, n: int, r: int, *, exact: bool) -> int:
    """Returns the operations of the leading r singular vectors of an m x n matrix, see `truncated_svd`."""
    width = sketch_width(m, n, r)
    if exact or width is None:
        return SVD * m * n * min(m, n)
    return 26 * m * n * width + 20 * (m + n) * width**2
