"""Long texts in pieces, so that no more of them is tokenised than is wanted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rankwise.calibration.chat import Conversation, in_template
from rankwise.errors import RankwiseError

LONGEST = 2**15  # characters of a piece
# Where a piece ends, best first. Tokenizers hold on to spaces and line ends that follow each other, so that a cut between other
# characters changes no token. Within a line only where there is no line end.
CUTS = [re.compile(cut, re.DOTALL) for cut in (r".*\S\n(?=\S)", r".*\n", r".*\S(?= \S)")]


@dataclass(frozen=True)
class Piece:
    """Characters `start` to `end` of a text; or a conversation, which stays whole."""

    document: str | Conversation
    start: int = 0
    end: int = 0

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Its ids, with the special tokens of a text's beginning and end where it is there. Raises `RankwiseError`."""
        if not isinstance(self.document, str):
            return _ids(tokenizer, in_template(tokenizer, self.document), special=False)
        text, first, last = self.document[self.start : self.end], self.start == 0, self.end == len(self.document)
        if first and last:
            return _ids(tokenizer, text)
        ids = _ids(tokenizer, text, special=False) if first else _following(tokenizer, self.document[self.start - 1], text)
        if not (first or last):
            return ids
        before, after = _around(_ids(tokenizer, text, special=False), _ids(tokenizer, text))
        return before + ids if first else ids + after


def pieces_of(document: str | Conversation, longest: int | None = None) -> Iterator[Piece]:
    """The document in pieces of at most `longest` characters (by default LONGEST), cut at line ends: within a line only where it
    alone is longer than a piece."""
    if not isinstance(document, str):
        yield Piece(document)
        return
    start, size, longest = 0, len(document), min(longest or LONGEST, LONGEST)
    while size - start > longest:
        cuts = (cut.match(document, start, start + longest) for cut in CUTS)
        end = next((match.end() for match in cuts if match), start + longest)
        yield Piece(document, start, end)
        start = end
    yield Piece(document, start, size)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise RankwiseError(f"the tokenizer cannot read the text: {error}") from None


def _around(ids: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
    """The special tokens before and after `ids` in `whole`."""
    size = len(ids)
    at = next((i for i in range(len(whole) - size + 1) if whole[i : i + size] == ids), 0)
    return whole[:at], whole[at + size :]


def _following(tokenizer: PreTrainedTokenizerBase, character: str, text: str) -> list[int]:
    """The ids of `text` after a character: without the space that some tokenizers put before whatever comes first."""
    before, both = (_ids(tokenizer, part, special=False) for part in (character, character + text))
    return both[len(before) :] if both[: len(before)] == before else _ids(tokenizer, text, special=False)
