"""Where text comes from: a file, a folder, the standard library, a data set by name."""

from __future__ import annotations

import glob
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rankwise import bundled
from rankwise.calibration.chat import Conversation, conversation
from rankwise.errors import RankwiseError, reason
from rankwise.recipe import IN_MEMORY

Document = str | Conversation

JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES: dict[str, dict[str, str]] = {  # ending of a file's name -> what `datasets.load_dataset` reads it with
    ".csv": {"path": "csv"},
    ".tsv": {"path": "csv", "sep": "\t"},
    ".parquet": {"path": "parquet"},
    ".arrow": {"path": "arrow"},
    **{f"{ending}.gz": {"path": "json"} for ending in JSON_LINES},
}
ROWS = (*JSON_LINES, *TABLES)  # files whose text is a field
COLUMN = "text"
CONVERSATIONS = ("messages", "conversations")  # fields that are looked for where no other is asked for
STANDARD_LIBRARY = ("stdlib:train", "stdlib:held-out")
MAX_DOCUMENTS = 20_000  # of a data set by name: more than any calibration needs, and streaming ones do not end


def read_documents(source: str, column: str = COLUMN, dataset_options: Mapping[str, str] | None = None) -> list[Document]:
    """The documents of `source`, none of them blank: texts, and conversations where a row holds messages.

    source: a text file (one document); a file of rows, as JSON lines, a JSON array, CSV, TSV, Parquet, Arrow (`column` of every
        row; by default also its `messages` or `conversations`); a folder of such files; `stdlib:train` or `stdlib:held-out`
        (the bundled model's own text); or a data set's name, given to `datasets.load_dataset` with `dataset_options`.
    Raises `RankwiseError` where there is no such text, or it is empty.
    """
    rows = read_rows(source, column, dataset_options)
    documents = [row for row in rows if (row.strip() if isinstance(row, str) else row)]
    if not documents:
        raise RankwiseError(f"the text {source!r} is empty: name another")
    return documents


def read_rows(source: str, column: str = COLUMN, dataset_options: Mapping[str, str] | None = None) -> list[Document]:
    """As `read_documents`, blank ones included."""
    if source in STANDARD_LIBRARY:
        return [_whole(text) for text in bundled.standard_library("train" if source.endswith("train") else "held-out")]
    if _is_dataset(source):
        return _load_dataset(source, column, dict(dataset_options or {}))
    if not _is_there(source):
        raise RankwiseError(f"no such text: {source!r} is neither a file nor a folder")
    return list(itertools.chain.from_iterable(_read_file(path, column) for path in _files(source)))


def refuse_unused(sources: Iterable[str], column: str = COLUMN, dataset_options: Mapping[str, str] | None = None) -> None:
    """Raises `RankwiseError` for an option that none of these sources can use."""
    sources = [source for source in sources if source not in ("self", IN_MEMORY)]
    if column != COLUMN and not any(map(_has_fields, sources)):
        raise RankwiseError(
            f"text_column={column!r} names a field, but the text is no JSON, table or data set: remove it",
        )
    if dataset_options and not any(map(_is_dataset, sources)):
        asked = ", ".join(f"{name}={value}" for name, value in dataset_options.items())
        raise RankwiseError(
            f"dataset_options ({asked}) apply to a data set by name, which the text is not: remove them",
        )


def _is_dataset(source: str) -> bool:
    """Whether it is none of the others: a data set's name."""
    looks_like_a_path = source.startswith((".", "/", "~")) or source.lower().endswith((*ROWS, ".txt", ".md", ".raw"))
    return source not in STANDARD_LIBRARY and not looks_like_a_path and not _is_there(source)


def _is_there(source: str) -> bool:
    """Whether it is a file or a folder: a device may never end."""
    return os.path.isfile(source) or os.path.isdir(source)


def _has_fields(source: str) -> bool:
    return _is_dataset(source) or any(path.name.lower().endswith(ROWS) for path in _files(source))


def _files(source: str) -> list[Path]:
    """The file, or those of the folder."""
    if not os.path.isdir(source):
        return [Path(source)]
    return sorted(path for path in Path(source).rglob("*") if path.is_file() and not path.name.startswith("."))


def _read_file(path: Path, column: str) -> list[Document]:
    name = path.name.lower()
    how = next((how for ending, how in TABLES.items() if name.endswith(ending)), None)
    if how is not None:
        return [_document(row, column, f"{path}, row {number}") for number, row in enumerate(_read_table(path, how), start=1)]
    try:
        text = path.read_text(encoding="utf-8-sig")  # without the mark that some editors begin a file with
    except UnicodeDecodeError as error:
        raise RankwiseError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it",
        ) from None
    except OSError as error:
        raise RankwiseError(f"cannot read {path}: {error.strerror}") from None
    if not name.endswith(JSON_LINES):
        return [_whole(text)]
    if name.endswith(".json") and text.lstrip().startswith("["):
        rows = _parsed(text, f"{path}: not a JSON array")
        return [_document(row, column, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]
    lines = ((f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    return [_document(_parsed(line, f"{where}: not JSON"), column, where) for where, line in lines]


def _parsed(text: str, what_is_wrong: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RankwiseError(what_is_wrong) from None


def _document(row: Any, column: str, where: str) -> Document:
    """What a row holds: a text or a conversation; blank where that is null."""
    fields = (COLUMN, *CONVERSATIONS) if column == COLUMN else (column,)
    field = next((field for field in fields if field in row), None) if isinstance(row, Mapping) else None
    if field is None:
        raise RankwiseError(f"{where}: there is no field {column!r}; name the text's own with text_column")
    value = row[field]
    if isinstance(value, list):
        return conversation(value, where)
    if value is not None and not isinstance(value, str):
        raise RankwiseError(
            f"{where}: the field {field!r} is neither text nor messages: name another (text_column)",
        )
    return _whole(value or "")


def _whole(text: str) -> str:
    """The text without half characters, which JSON may write."""
    return text.encode(errors="replace").decode()


def _read_table(path: Path, how: Mapping[str, str]) -> list[Any]:
    try:
        import datasets
    except ImportError:
        raise RankwiseError(f"{path} is a table; to read it: pip install 'rankwise[data]'") from None
    try:
        return list(datasets.load_dataset(**how, data_files=glob.escape(str(path)), split="train", streaming=True))
    except Exception as error:  # the readers raise errors of their own
        raise RankwiseError(f"cannot read {path}: {reason(error)}") from None


def _load_dataset(name: str, column: str, options: dict[str, Any]) -> list[Document]:
    try:
        import datasets
    except ImportError:
        raise RankwiseError(
            f"no such text: {name!r} is no file or folder; to load a data set of that name: pip install 'rankwise[data]'"
        ) from None
    if name == "pandas" or "trust_remote_code" in options:
        raise RankwiseError(
            f"no such text: the data set {name!r} would run code (a pickle, or a script of its "
            "own), which rankwise never does: give its text as a file",
        )
    options.setdefault("split", "train")
    if "streaming" in options:
        options["streaming"] = str(options["streaming"]).lower() == "true"
    try:
        rows = list(itertools.islice(datasets.load_dataset(name, **options), MAX_DOCUMENTS))
    except Exception as error:  # a data set fails in many ways: absent, no network, no such split or configuration
        raise RankwiseError(f"no such text: {name!r} is no file or folder, nor a data set that loads: {reason(error)}") from None
    return [_document(row, column, f"the data set {name!r}, row {number}") for number, row in enumerate(rows, start=1)]
