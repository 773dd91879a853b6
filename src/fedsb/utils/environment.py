"""Versions and machine, for the manifest and for bug reports. Nothing here names a user or a host."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("fedsb", "torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "numpy", "pydantic")


@cache
def versions() -> dict[str, str]:
    """Returns the installed versions by package, "not installed" for missing packages. Read once in a process."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def memory_of(device: torch.device) -> int | None:
    """Returns the bytes of memory of a device, within the limit of a container on a CPU; None if it is not known."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if not (memory := _machine_memory()):
        return None
    with suppress(OSError, ValueError):  # no cgroup, or "max": no limit
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def free_memory_of(device: torch.device) -> int | None:
    """Returns the bytes of memory of a device that nothing uses now; None if it is not known."""
    import torch

    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    with suppress(OSError, ValueError, StopIteration):  # Linux
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
        with suppress(OSError, ValueError):  # no cgroup, or "max": no limit
            group = Path("/sys/fs/cgroup")
            used = int((group / "memory.current").read_text())
            free = min(free, int((group / "memory.max").read_text()) - used)
        return free
    return None


def _machine_memory() -> int:
    """Returns the bytes of memory of this machine; 0 if it is unknown."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def git_hash() -> str | None:
    """Returns the commit if fedsb runs from its repository, with "+changes" if the tree differs from it."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "-C", root, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()[:12] + ("+changes" if changes.stdout.strip() else "")


def describe_machine() -> dict[str, Any]:
    """Returns versions, cores, memory and accelerators of this machine."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **versions(),
        "git": git_hash(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "memory_gib": round(_machine_memory() / 2**30, 1),
        "gpus": gpus or None,
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE"),
        "HF_HOME": "set" if os.environ.get("HF_HOME") else None,
    }
