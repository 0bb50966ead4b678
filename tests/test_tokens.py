"""From documents to windows, and the text that a model writes itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from rankwise import RankwiseError
from rankwise.calibration.tokens import sampled_windows, windows_of
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


def test_a_model_writes_on_past_the_end_of_text_whatever_its_generation_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = tiny_model(), 40
    ends = [*range(2, VOCABULARY)]
    own = GenerationConfig(bos_token_id=1, eos_token_id=ends, temperature=1e-3, top_k=1, max_new_tokens=3, do_sample=True)
    monkeypatch.setattr(model, "generation_config", own)
    got = sampled_windows(model, LENGTH, samples, seed=0)
    assert model.generation_config is own
    assert got.shape == (samples, LENGTH)
    assert (got[:, 0] == 1).all()
    assert len(got[:, 1].unique()) > 5  # neither greedy nor cut to the likeliest
    assert (got[:, -1] != 0).sum() > samples / 2  # not padded


def test_what_a_model_writes_is_drawn_by_the_seed_alone() -> None:
    model = tiny_model()
    state = torch.random.get_rng_state()
    first = sampled_windows(model, LENGTH, 4, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(sampled_windows(model, LENGTH, 4, seed=3), first)
    assert not torch.equal(sampled_windows(model, LENGTH, 4, seed=4), first)
