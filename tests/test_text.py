"""Sources of text: rows in every kind of file, byte order marks, what is null, and options that a source cannot use."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankwise import RankwiseError
from rankwise.calibration.text import read_documents, refuse_unused

ROWS: list[dict[str, Any]] = [
    {"text": "Once,\n“upon”"},
    {"text": None},
    {"text": "a time"},
    {"text": "  "},
    {"text": "there was"},
]
TEXTS = ["Once,\n“upon”", "a time", "there was"]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_arrow(file: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def table_of() -> Any:
    import datasets

    return datasets.Dataset.from_list(ROWS)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": lambda file: file.write_text(lines(ROWS)),
    "rows.ndjson": lambda file: file.write_text(lines(ROWS), encoding="utf-8-sig"),
    "lines.json": lambda file: file.write_text(lines(ROWS)),
    "array.json": lambda file: file.write_text("\ufeff" + json.dumps(ROWS, indent=2), encoding="utf-8"),
    "rows.jsonl.gz": lambda file: file.write_bytes(gzip.compress(lines(ROWS).encode())),
    "rows.csv": lambda file: table_of().to_csv(file),
    "ROWS.CSV": lambda file: table_of().to_csv(file),
    "ROWS.JSONL": lambda file: file.write_text(lines(ROWS)),
    "marked.csv": lambda file: file.write_bytes(b"\xef\xbb\xbf" + table_of().to_pandas().to_csv().encode()),
    "marked.jsonl.gz": lambda file: file.write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines(ROWS).encode())),
    "rows.tsv": lambda file: table_of().to_csv(file, sep="\t"),
    "rows.parquet": lambda file: table_of().to_parquet(file),
    "rows.arrow": write_arrow,
    "odd [1] name*.csv": lambda file: table_of().to_csv(file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_of_every_kind_of_file(name: str, tmp_path: Path) -> None:
    if name.endswith((".gz", "sv", ".parquet", ".arrow")):
        pytest.importorskip("datasets")
    WRITERS[name](tmp_path / name)
    assert read_documents(str(tmp_path / name)) == TEXTS
    (tmp_path / "more.txt").write_text("of them", encoding="utf-8-sig")
    assert sorted(map(str, read_documents(str(tmp_path)))) == sorted([*TEXTS, "of them"])


def test_a_table_without_datasets_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "rows.csv").write_text("text\nOnce\n")
    with pytest.raises(RankwiseError, match=r"rows\.csv is a table.*pip install 'rankwise\[data\]'"):
        read_documents(str(tmp_path / "rows.csv"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.parquet", "no table", "cannot read .*rows.parquet"),
        ("rows.csv", "story\nOnce\n", "rows.csv, row 1: there is no field 'text'"),
        ("rows.csv", "text\n3\n", "rows.csv, row 1: the field 'text' is neither text"),
        ("rows.json", '[{"text": "Once"}, 5]', "rows.json, row 2: there is no field 'text'"),
        ("rows.json", '[{"text": "Once"}', "rows.json: not a JSON array"),
        ("rows.jsonl", '{"text": null}\n', "is empty"),
    ],
)
def test_what_is_wrong_with_rows(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RankwiseError, match=message):
        read_documents(str(tmp_path / name))


def test_a_device_is_no_text() -> None:
    with pytest.raises(RankwiseError, match="neither a file nor a folder"):
        read_documents("/dev/zero")


def test_options_that_no_source_can_use_are_refused(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.txt").write_text("Once")
    (tmp_path / "rows.csv").write_text("story\nOnce\n")
    plain, rows = str(tmp_path / "plain" / "a.txt"), str(tmp_path / "rows.csv")
    for source in (plain, str(tmp_path / "plain"), "stdlib:train", "self"):
        with pytest.raises(RankwiseError, match="text_column='story'"):
            refuse_unused([source], "story")
        with pytest.raises(RankwiseError, match=r"dataset_options \(split=test\)"):
            refuse_unused([source, rows], "text", {"split": "test"})
    refuse_unused([plain, rows], "story")
    refuse_unused([str(tmp_path)], "story")
    refuse_unused([plain, "someone/texts"], "story", {"split": "test"})
