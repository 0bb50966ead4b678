"""How much memory this process has taken at most."""

from __future__ import annotations

from pathlib import Path

import torch


def peak_memory() -> dict[str, int]:
    """Bytes by kind: "host" where the system tells it (Linux), "gpu" where one was used."""
    peaks = {}
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage, whose maximum a child process inherits from its parent
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in fields:
            peaks["host"] = int(fields["VmHWM"].split()[0]) * 1024
    if torch.cuda.is_available():
        peaks["gpu"] = torch.cuda.max_memory_allocated()
    return peaks
