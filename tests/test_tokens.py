"""From documents to windows, and the text that a model writes itself."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from rankwise import RankwiseError
from rankwise.calibration import pieces
from rankwise.calibration.own_text import own_windows
from rankwise.calibration.tokens import windows_of
from rankwise.testing.allocators import VOCABULARY, tiny_model

LENGTH = 8


class Numbers:
    """A tokenizer of numbers with spaces between; 0 begins a document."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0, *map(int, text.split())]}


DOCUMENTS = [" ".join(str(1 + 100 * d + i) for i in range(21 + d)) for d in range(9)]
ALL_IDS = [i for document in DOCUMENTS for i in Numbers()(document)["input_ids"]]


def windows(samples: int | None = None, seed: int = 0) -> torch.Tensor:
    return windows_of(Numbers(), DOCUMENTS, LENGTH, samples, seed)  # type: ignore[arg-type]


def test_without_samples_the_text_is_taken_in_order_and_once() -> None:
    assert windows().flatten().tolist() == ALL_IDS[: len(ALL_IDS) // LENGTH * LENGTH]


@pytest.mark.parametrize("samples", [1, 5, 1000])
def test_samples_are_windows_of_the_text_that_do_not_overlap(samples: int) -> None:
    got = windows(samples)
    assert got.shape == (min(samples, len(ALL_IDS) // LENGTH), LENGTH)
    tokens = got[got > 0].tolist()
    assert len(set(tokens)) == len(tokens)
    assert set(tokens) <= set(ALL_IDS)
    steps = got.diff(dim=1)[(got[:, :-1] > 0) & (got[:, 1:] > 0)]
    assert (steps == 1).all()  # within a document


def test_samples_are_drawn_by_the_seed() -> None:
    assert torch.equal(windows(5, seed=1), windows(5, seed=1))
    assert not torch.equal(windows(5, seed=1), windows(5, seed=2))


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(RankwiseError, match="has 4 tokens, fewer than one window of 8"):
        windows_of(Numbers(), ["1 2 3"], LENGTH)  # type: ignore[arg-type]


def character_tokenizer(*, marks: bool) -> PreTrainedTokenizerFast:
    """A token for each word and each run of spaces, 0 and 1 around a text; with `marks`, a space before a text's first word, as
    SentencePiece has it."""
    split = pre_tokenizers.Split(Regex(r"\s+|\S"), "isolated")
    names = {name: i for i, name in enumerate(["<s>", "</s>", "<unk>", "\n", " ", "\n\n", "▁", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Prepend("▁") if marks else None
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


texts = st.lists(st.text("abc \n", min_size=1, max_size=30), min_size=1, max_size=40).map("".join)


@given(texts, st.integers(3, 40))
def test_pieces_are_the_text_cut_at_line_ends(text: str, longest: int) -> None:
    with mock.patch.object(pieces, "LONGEST", longest):
        cut = [text[piece.start : piece.end] for piece in pieces.pieces_of(text)]
    assert "".join(cut) == text
    assert all(0 < len(piece) <= longest for piece in cut)
    for before, after in pairwise(cut):
        if not before.endswith("\n"):  # within a line, longer than a piece
            assert "\n" not in before
            assert len(before) + len(after.partition("\n")[0]) >= longest or " " in before + after


@pytest.mark.parametrize("marks", [False, True])
@given(st.lists(st.text("abcdefgh ", min_size=1, max_size=20).map(str.strip).filter(bool), min_size=1, max_size=30))
def test_pieces_have_the_tokens_of_the_whole(marks: bool, lines: list[str]) -> None:
    tokenizer, text = character_tokenizer(marks=marks), "\n".join(lines)
    expected = tokenizer(text)["input_ids"]
    with mock.patch.object(pieces, "LONGEST", 25):
        assert windows_of(tokenizer, [text], len(expected)).tolist() == [expected]


def test_no_more_of_a_long_text_is_read_than_is_wanted() -> None:
    read: list[int] = []

    class Counted(Numbers):
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            read.append(len(text))
            return super().__call__(text, **options)

    line = " ".join(map(str, range(1, 200)))
    text = f"{line}\n" * 20_000
    got = windows_of(Counted(), [text], LENGTH, 50)  # type: ignore[arg-type]
    assert got.shape == (50, LENGTH)
    assert sum(read) < 5 * pieces.LONGEST < len(text) / 10
    firsts = {windows_of(Counted(), [text + "7 " * 40], LENGTH, 50, seed)[0, 0].item() for seed in range(8)}  # type: ignore[arg-type]
    assert len(firsts) > 1


def test_short_documents_are_drawn_as_wholes() -> None:
    """Today's windows stay: the order is a permutation of the documents."""
    order = torch.randperm(len(DOCUMENTS), generator=torch.Generator().manual_seed(4)).tolist()
    expected = [i for index in order for i in Numbers()(DOCUMENTS[index])["input_ids"]]
    got = windows(1000, seed=4)
    assert got.flatten().tolist() == expected[: got.numel()]


def test_a_model_writes_on_past_the_end_of_text_whatever_its_generation_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = tiny_model(), 40
    ends = [*range(2, VOCABULARY)]
    own = GenerationConfig(bos_token_id=1, eos_token_id=ends, temperature=1e-3, top_k=1, max_new_tokens=3, do_sample=True)
    monkeypatch.setattr(model, "generation_config", own)
    got = own_windows(model, LENGTH, samples, seed=0)
    assert model.generation_config is own
    assert got.shape == (samples, LENGTH)
    assert (got[:, 0] == 1).all()
    assert len(got[:, 1].unique()) > 5  # neither greedy nor cut to the likeliest
    assert (got[:, -1] != 0).sum() > samples / 2  # not padded


def test_what_a_model_writes_is_drawn_by_the_seed_alone() -> None:
    model = tiny_model()
    state = torch.random.get_rng_state()
    first = own_windows(model, LENGTH, 4, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(own_windows(model, LENGTH, 4, seed=3), first)
    assert not torch.equal(own_windows(model, LENGTH, 4, seed=4), first)


@pytest.mark.parametrize("room", [1, 10_000])
def test_what_a_model_writes_does_not_depend_on_how_much_of_it_has_room(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    whole = own_windows(model, LENGTH, 7, seed=3, opening=[1, 2, 3])
    monkeypatch.setattr("rankwise.calibration.batches.WORKING_MEMORY", room)
    assert torch.equal(own_windows(model, LENGTH, 7, seed=3, opening=[1, 2, 3]), whole)


def test_what_a_model_writes_has_its_own_distribution() -> None:
    model, samples = tiny_model(), 8000
    written = own_windows(model, 3, samples, seed=0, opening=[1, 2, 3])
    expected = model(torch.tensor([[1]])).logits[0, -1].softmax(-1)
    second = written[~(written == torch.tensor([1, 2, 3])).all(1), 1]
    own = model.generation_config.bos_token_id
    assert own is None or (written[:, 0] == own).all()
    found = second.bincount(minlength=VOCABULARY) / len(second)
    assert (found - expected).abs().max() < 5 * (expected.max() / len(second)).sqrt()


def test_few_windows_of_a_long_text_come_from_many_places() -> None:
    """Neighbours are alike: statistics of one place are those of no other."""
    text = "".join(f"{number} {number}\n" for number in range(100_000))
    places = sorted(int(window[2]) // 100 for window in windows_of(Numbers(), [text], 256, samples=64))  # type: ignore[arg-type]
    assert len(set(places)) >= 24
    assert places[0] < 250
    assert places[-1] > 750
