"""Memory in bytes: as users write it, what this process has and had at most, and what it may take."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from rankwise import distributed, launcher
from rankwise.errors import RankwiseError

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
SETTING = "RANKWISE_MEMORY"  # what the machine is taken to have
PROMISED = 0.9  # of what is free: other programs want some of it too
CGROUPS = Path("/sys/fs/cgroup")
LIMITS = (  # of a control group: its folder under CGROUPS, its limit, what it has, what of that could be given back
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def bytes_of(text: str, name: str = "memory") -> int:
    """The bytes that "8GB", "512 MiB" or a plain number means. Raises `RankwiseError`, which names the option, for others."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise RankwiseError(
            f"{name}={text!r} must be a number with one of {', '.join(u for u in UNITS if u)}, such as 8GB",
        )
    return int(float(match[1]) * UNITS[match[2]])


def gigabytes(count: float) -> str:
    """To two decimals."""
    return f"{count / 10**9:.2f} GB"


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> dict[str, int]:
    """The most bytes that this process has taken: "host" where the system tells it (Linux), "gpu" where one was used."""
    peaks = {}
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage, whose maximum a child process inherits from its parent
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in fields:
            peaks["host"] = int(fields["VmHWM"].split()[0]) * 1024
    if torch.cuda.is_available():
        peaks["gpu"] = torch.cuda.max_memory_allocated()
    return peaks


def give_back() -> None:
    """What this process has freed goes back to the system: glibc keeps matrices of some megabytes, whole gigabytes of them."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def there(device: torch.device) -> dict[str, int]:
    """Bytes that this process may have: "gpu" where it computes on one, and "host", with those that it has already.

    Where RANKWISE_MEMORY is set, it is taken for both. Processes beside this one get as much, and all see what the poorest has.
    """
    said = os.environ.get(SETTING)
    own = {"gpu": torch.cuda.mem_get_info(device)[0]} if device.type == "cuda" else {}
    own["host"] = resident() + _free() // launcher.local_size()
    if said:
        own = dict.fromkeys(own, bytes_of(said, SETTING))
    every = distributed.everyones(own)
    return {kind: min(one[kind] for one in every) for kind in own}


def promise(found: dict[str, int]) -> int:
    """What a run block by block may promise of what `there` found."""
    now = resident()
    return now + int(PROMISED * max(0, min(found.values()) - now))


def _free() -> int:
    """Bytes of the host that are free, or can be freed, within the limits of this process's control groups."""
    return min(int(psutil.virtual_memory().available), *_left_in_cgroups(), 2**63)


def _left_in_cgroups() -> Iterator[int]:
    """Of each control group with a limit that this process is in, the bytes left."""
    groups = Path("/proc/self/cgroup")
    lines = groups.read_text().splitlines() if groups.exists() else []
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for controller, limit, usage, reclaimable in LIMITS:
        if controller not in paths:
            continue
        own = CGROUPS / controller / paths[controller].lstrip("/")
        for folder in (own, *own.parents):
            if (folder / limit).is_file() and (allowed := (folder / limit).read_text().strip()) != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield max(0, int(allowed) - int((folder / usage).read_text()) + int(stat.get(reclaimable, 0)))
