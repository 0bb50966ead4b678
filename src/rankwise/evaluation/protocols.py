"""The field's perplexity protocols: how a known text is put together before it is cut into windows.

All of them tokenise one long string once, with the tokenizer's special tokens at its ends, cut it into non-overlapping windows of
2048 tokens (or the model's context), drop what remains, and take exp of the mean negative log likelihood over the predicted
tokens: each window's, but for its first (GPTQ, Frantar et al. 2022, github.com/IST-DASLab/gptq, datautils.py; the tables of
ASVD, SVD-LLM, LLRC and most others are made so).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rankwise.calibration.text import Document, read_documents, read_rows
from rankwise.errors import RankwiseError


@dataclass(frozen=True)
class Protocol:
    """source, column, options: where the text is by default: a data set's name, its text column, what loads it. None: nowhere
        that still loads (PTB's is a script).
    line: what a line of a text file is as a row of the data set; None where a text file is one row.
    separator: between rows. rows, windows: how many of the first are taken; None: all.
    """

    source: str | None
    column: str
    options: Mapping[str, str]
    separator: str
    line: Callable[[str], str] | None = None
    rows: int | None = None
    windows: int | None = None


def _blank_or_whole(line: str) -> str:
    """The data set on the hub keeps the newline of a line with text, and nothing of a blank one."""
    return line if line.strip() else ""


PROTOCOLS = {
    "wikitext2": Protocol(
        "Salesforce/wikitext", "text", {"name": "wikitext-2-raw-v1", "split": "test"}, "\n\n", line=_blank_or_whole
    ),
    "ptb": Protocol(None, "sentence", {}, " ", line=str.strip),
    "c4": Protocol(
        "allenai/c4",
        "text",
        {"data_files": "en/c4-validation.00000-of-00008.json.gz", "split": "train", "streaming": "true"},
        " ",
        rows=1100,
        windows=256,
    ),
}


@dataclass(frozen=True)
class JudgingText:
    """Documents to be tokenised one by one, and the number of first windows that count; None: all."""

    documents: list[Document] = field(repr=False)
    windows: int | None = None


def own_source(text: str) -> str | None:
    """What the user's options for reading are for: the source, or a protocol's local copy; None where a protocol has its own."""
    name, _, path = text.partition(":")
    return (path or None) if name in PROTOCOLS else text


def read_judging_text(source: str, column: str = "text", dataset_options: Mapping[str, str] | None = None) -> JudgingText:
    """The text named by `source`: any that `read_documents` takes, as it is; or a protocol's ("wikitext2", "c4", "ptb"), from the
    hub, or from a local copy ("wikitext2:FILE"; a text file, JSON lines or a folder).

    Raises `RankwiseError` where there is no such text, or it is empty.
    """
    name, _, path = source.partition(":")
    if name not in PROTOCOLS:
        return JudgingText(read_documents(source, column, dataset_options))
    protocol = PROTOCOLS[name]
    if not path:
        if protocol.source is None:
            raise RankwiseError(f"no such text: {name!r} needs a local copy, {name}:FILE")
        rows = read_rows(protocol.source, protocol.column, protocol.options)
    else:
        rows = read_rows(path, column, dataset_options)
        if protocol.line is not None and len(rows) == 1 and isinstance(rows[0], str):
            rows = [protocol.line(line) for line in io.StringIO(rows[0])]
    texts = [row for row in rows[: protocol.rows] if isinstance(row, str)]
    if len(texts) < len(rows[: protocol.rows]):
        raise RankwiseError(
            f"the text {source!r} holds conversations, and {name} joins plain text: remove {name}:",
        )
    text = protocol.separator.join(texts)
    if not text.strip():
        raise RankwiseError(f"the text {source!r} is empty: name another")
    return JudgingText([text], protocol.windows)
