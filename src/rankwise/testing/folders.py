"""Whether two result folders are the same."""

from __future__ import annotations

import json
from pathlib import Path

MEASURED = ("seconds", "effort", "peak_memory_bytes")  # fields of report.json that say what the work took, not what came out


def content_of(folder: Path) -> dict[str, bytes]:
    """Return path -> bytes of a result folder, without its page and the times and memory in report.json."""
    content = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    report = json.loads(content["report.json"])
    content.pop("report.html", None)
    return content | {"report.json": json.dumps({n: v for n, v in report.items() if n not in MEASURED}).encode()}
