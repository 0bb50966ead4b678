"""Where text comes from: a file, a folder, the standard library, a data set by name."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise import bundled
from rankwise.errors import RankwiseError

JSON_LINES = {".jsonl", ".ndjson", ".json"}
MAX_DOCUMENTS = 20_000  # of a data set by name: more than any calibration needs, and streaming ones do not end


def read_documents(source: str, column: str = "text", dataset_options: Mapping[str, str] | None = None) -> list[str]:
    """The documents of `source`, none of them blank.

    source: a text file (one document), a JSON-lines file (`column` of every line), a folder of such files,
        `stdlib:train` or `stdlib:held-out` (the bundled model's own text), or a data set's name, given to
        `datasets.load_dataset` with `dataset_options`.
    Raises `RankwiseError` where there is no such text, or it is empty.
    """
    documents = [d for d in read_rows(source, column, dataset_options) if d.strip()]
    if not documents:
        raise RankwiseError(f"the text {source!r} is empty")
    return documents


def read_rows(source: str, column: str = "text", dataset_options: Mapping[str, str] | None = None) -> list[str]:
    """As `read_documents`, blank ones included."""
    if source in ("stdlib:train", "stdlib:held-out"):
        rows = bundled.standard_library("train" if source.endswith("train") else "held-out")
    elif os.path.isdir(source):
        files = sorted(p for p in Path(source).rglob("*") if p.is_file() and not p.name.startswith("."))
        rows = list(itertools.chain.from_iterable(_read_file(p, column) for p in files))
    elif os.path.isfile(source):
        rows = _read_file(Path(source), column)
    elif Path(source).suffix in {*JSON_LINES, ".txt", ".md", ".raw"} or source.startswith((".", "/", "~")):
        raise RankwiseError(f"no such text: {source!r} is neither a file nor a folder")
    else:
        rows = _load_dataset(source, column, dict(dataset_options or {}))
    return [row.encode(errors="replace").decode() for row in rows]  # JSON may write half a character


def _read_file(path: Path, column: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RankwiseError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise RankwiseError(f"cannot read {path}: {error.strerror}") from None
    if path.suffix not in JSON_LINES:
        return [text]
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                documents.append(json.loads(line)[column])
            except (ValueError, RecursionError, KeyError, TypeError, IndexError):
                raise RankwiseError(f"{path}, line {number}: not a JSON object with a {column!r} field") from None
            if not isinstance(documents[-1], str):
                raise RankwiseError(f"{path}, line {number}: the field {column!r} is not a text")
    return documents


def _load_dataset(name: str, column: str, options: dict[str, Any]) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise RankwiseError(
            f"no such text: {name!r} is no file or folder; to load a data set of that name: pip install 'rankwise[data]'"
        ) from None
    if name == "pandas" or "trust_remote_code" in options:
        raise RankwiseError(f"no such text: the data set {name!r} would run code (a pickle, or a script of its own)")
    options.setdefault("split", "train")
    if "streaming" in options:
        options["streaming"] = str(options["streaming"]).lower() == "true"
    try:
        rows = datasets.load_dataset(name, **options)
        return [row[column] for row in itertools.islice(rows, MAX_DOCUMENTS)]
    except KeyError:
        raise RankwiseError(f"the data set {name!r} has no column {column!r}; name its text column") from None
    except Exception as error:  # a data set fails in many ways: absent, no network, no such split or configuration
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise RankwiseError(f"no such text: {name!r} is no file or folder, nor a data set that loads: {reason}") from None
