"""Refinements of numbers in few bits: other whole numbers and scales, in the same bytes; such folders are judged as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, build
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rankwise import Recipe, compress, evaluate, refine
from rankwise.decomposition.rounding import nearest
from rankwise.layers.quantised import QuantisedEmbedding, QuantisedLinear
from rankwise.refinement.trained import TrainedCodes, TrainedScales

IDS = torch.arange(3, 30)[None]
METHODS = ["blocks passes=6 tokens=256", "distil passes=4 tokens=256"]


def text(model: PreTrainedModel, windows: int, seed: int = 0) -> torch.Tensor:
    """What a random model is sure of: its own most likely words, so that there is something to lose."""
    torch.manual_seed(seed)
    start = torch.randint(3, VOCABULARY, (windows, 2))
    return model.generate(start, do_sample=True, max_length=32, min_length=32, pad_token_id=0)  # type: ignore[operator]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def original(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = build("llama-gqa-tied")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 2  # sharper answers
    return model.to(request.param)


@pytest.fixture(scope="module")
def folder(original: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the `dense` model, the `small` one of 2 bits, on a trellis, and one of `4`, on a grid."""
    folder = tmp_path_factory.mktemp("refine")
    original.save_pretrained(folder / "dense")
    for name, bits in (("small", 2), ("4", 4)):
        compress(folder / "dense", bits=bits, calibration=text(original, 60), output=folder / name)
    return folder


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 140), bits=st.sampled_from((2, 3, 4, 6)), bias=st.booleans())
def test_few_bits_in_training_are_the_layer_they_are_made_of(rows: int, columns: int, bits: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows * columns)
    W, x = torch.randn(rows, columns, generator=generator), torch.randn(3, columns, generator=generator)
    layer = nearest(W, bits).layer(torch.randn(rows, generator=generator) if bias else None)
    trained = TrainedScales(layer) if bits < 4 else TrainedCodes(layer, W)
    before = copy.deepcopy(layer.state_dict())
    assert torch.equal(trained.weight, layer.weight)
    torch.testing.assert_close(trained(x), layer(x))
    again = trained.written_as(layer).state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
    trained(x).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained.parameters())
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())  # it is not trained itself


@pytest.mark.parametrize(
    ("name", "method", "share"), [("small", METHODS[0], 0.95), ("small", METHODS[1], 1.0), ("4", METHODS[1], 1.0)]
)
def test_a_folder_of_few_bits_is_nearer_to_the_original_and_takes_the_same_bytes(
    name: str, share: float, method: str, folder: Path, original: PreTrainedModel, tmp_path: Path
) -> None:
    windows = text(original, 120, 1)
    result = refine(folder / name, folder / "dense", refine=method, calibration=windows, output=tmp_path / "out")
    assert result.model is not None
    assert result.report["kl"] < share * result.report["before_refinement"]["kl"]
    small, again = (AutoModelForCausalLM.from_pretrained(path) for path in (folder / name, tmp_path / "out"))
    ours, theirs = again.state_dict(), small.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder / name, tmp_path / "out")]
    assert sizes[0] == pytest.approx(sizes[1], abs=64)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, result.model(IDS).logits)
        assert not torch.equal(again(IDS).logits, small(IDS).logits)


def test_a_training_of_whole_numbers_that_does_harm_is_taken_back(folder: Path, original: PreTrainedModel) -> None:
    small = AutoModelForCausalLM.from_pretrained(folder / "small").state_dict()
    harmful = "distil passes=1 tokens=32 learning_rate=30"
    result = refine(folder / "small", folder / "dense", refine=harmful, calibration=text(original, 60))
    assert result.model is not None
    assert all(torch.equal(tensor, small[name]) for name, tensor in result.model.state_dict().items())


def test_compress_refines_numbers_of_few_bits_before_it_writes(original: PreTrainedModel, tmp_path: Path) -> None:
    windows, model = text(original, 120), copy.deepcopy(original)
    size = int(0.7 * model.num_parameters())
    asked: dict[str, Any] = {"bits": "mixed", "target_bytes": size, "options": {"points": 1, "tokens": 32}}
    result = compress(model, calibration=windows, refine=METHODS[0], output=tmp_path / "out", **asked)
    assert result.report["kl"] < result.report["before_refinement"]["kl"]
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= size
    again, made = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model.state_dict()
    assert all(torch.equal(tensor, made[name]) for name, tensor in again.state_dict().items())
    assert Recipe.read(tmp_path / "out").refine == METHODS[0]
    tables = again.get_input_embeddings(), again.get_output_embeddings()
    assert isinstance(tables[0], QuantisedEmbedding)
    assert isinstance(tables[1], QuantisedLinear)
    assert tables[0].codes.data_ptr() == tables[1].codes.data_ptr()


def test_folders_of_few_bits_are_judged_each_by_itself(
    folder: Path, original: PreTrainedModel, llama: Path, story: Path, tmp_path: Path
) -> None:
    """Their configs are equal, and their parameters: only whole numbers and scales differ."""
    compress(folder / "dense", bits=2, calibration=text(original, 8, 2), output=tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    asked: dict[str, Any] = {"tokenizer": tokenizer, "length": 32, "samples": 8, "cache": tmp_path / "cache"}
    found = [
        evaluate(AutoModelForCausalLM.from_pretrained(path), original, str(story), **asked)
        for path in (folder / "small", tmp_path / "other")
    ]
    assert found[0]["kl"] != found[1]["kl"]
    held = {t.data_ptr(): t.nbytes for t in AutoModelForCausalLM.from_pretrained(folder / "small").state_dict().values()}
    assert found[0]["bytes"]["model"]["compressed"] == sum(held.values())
