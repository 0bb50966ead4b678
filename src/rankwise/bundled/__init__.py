"""The model that ships with rankwise, and the text it was trained and is judged on.

A small Llama trained by `scripts/train_bundled_model.py` on the source of Python's standard library,
so that every installation can compress a real model without downloading anything.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Literal

Split = Literal["train", "held-out"]

MODEL = Path(__file__).parent / "model"
NAME = "the bundled model"

# Tables of characters and generated text teach a model of code nothing; tests and site-packages differ by machine.
_SKIPPED = {
    "encodings",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "_bundled",
    "lib-dynload",
}


def split_of(path: str) -> Split:
    """The split of a file, by a hash of its path in the standard library: equal on every machine and Python version."""
    digest = hashlib.sha256(path.encode()).digest()
    return "held-out" if digest[0] % 12 == 0 else "train"


def standard_library(split: Split) -> list[str]:
    """Texts of the standard library's own Python files in `split`, one string per file, in order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED and not f.startswith(("config-", "__pycache__"))]
        paths += [Path(folder, f).relative_to(root).as_posix() for f in files if f.endswith(".py")]
    texts = [(root / p).read_text(encoding="utf-8", errors="ignore") for p in sorted(paths) if split_of(p) == split]
    return [t for t in texts if t.strip()]
