"""Half-precision models: computed in float32 on a CPU and where it matters on a GPU, stored as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from test_optimize import whisper
from torch import Tensor
from transformers import AutoModelForCausalLM

import rankwise as package
from rankwise.calibration.signal import call
from rankwise.layers import precision

CPU = torch.device("cpu")
WINDOWS = torch.randint(60, (12, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    values = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert precision.is_finite(values)
    for place in (0, 17, 1500, 2999):
        spoiled = values.clone()
        spoiled.view(-1)[place] = bad
        assert not precision.is_finite(spoiled), place
    assert precision.is_finite(values[:0])


def bfloat16() -> Any:
    return build("llama").bfloat16().eval()


def test_float64_is_computed_where_there_is_any() -> None:
    assert precision.exact_device(torch.device("mps")) == CPU
    assert precision.exact_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert precision.exact(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float64


def test_what_a_model_computes_in() -> None:
    assert precision.computes_in(torch.float32, CPU)
    assert precision.computes_in(torch.float64, CPU)
    assert not precision.computes_in(torch.bfloat16, CPU)
    assert precision.computes_in(torch.bfloat16, torch.device("cuda"))
    assert not precision.computes_in(torch.float16, torch.device("cuda"))


@pytest.mark.page
@pytest.mark.parametrize(
    "options",
    [
        {"rate": 0.3, "refine": "blocks", "neurons": "fewer"},
        {"rate": 0.3, "allocation": "kl-knapsack", "neurons": "all"},
        {"target_bytes": "30KB", "bits": "mixed"},
    ],
    ids=["neurons", "ranks", "bits"],
)
def test_a_device_that_computes_in_half_precision_measures_matrices_in_float32(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU does. No layer of the one dtype reads numbers of the other, and what is written is of one."""
    monkeypatch.setattr(precision, "computes_in", lambda dtype, device: True)
    result = package.compress(bfloat16(), calibration=WINDOWS, **options)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert result.report["costs"]["kl"]
    assert torch.isfinite(call(result.model, {"input_ids": WINDOWS}).logits).all()


def test_a_model_computes_in_float32_inside_and_is_the_same_afterwards() -> None:
    model = bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact = bfloat16().float()
    batch = {"input_ids": WINDOWS}
    with precision.widened(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert torch.equal(call(model, batch).logits, call(exact, batch).logits)
    after = model.state_dict()
    assert all(after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_sounds_are_read_in_the_dtype_that_the_model_computes_in(stored: torch.dtype) -> None:
    model = whisper().to(stored).eval()
    sound, text = torch.randn(12, 1, 8, 32).bfloat16(), torch.randint(3, 90, (12, 1, 8))
    batches = [{"input_features": x, "decoder_input_ids": y} for x, y in zip(sound, text, strict=True)]
    result = package.compress(model, 0.3, calibration=batches, allocation="uniform", effort="quick")
    assert result.report["kl"] > 0
    assert {p.dtype for p in result.model.parameters()} == {stored}


def test_as_many_neurons_stay_as_of_the_same_weights_in_float32(tmp_path: Path) -> None:
    """Ranks may differ, as they are chosen for the refitted matrices as they are stored."""
    bfloat16().save_pretrained(tmp_path)
    options: dict[str, Any] = {"calibration": WINDOWS, "allocation": "llrc:quick", "neurons": "fewer"}
    stored, wide = (package.compress(tmp_path, 0.3, dtype=dtype, **options).report["narrowed"] for dtype in (None, "float32"))
    assert stored == wide
    assert stored


@pytest.mark.parametrize("allocation", ["uniform", "llrc"])
def test_the_result_is_stored_as_the_original_was(tmp_path: Path, allocation: str) -> None:
    """What stays dense is the very same, and the ranks are those of the same weights in float32."""
    folder = tmp_path / "model"
    bfloat16().save_pretrained(folder)
    options: dict[str, Any] = {"calibration": WINDOWS, "allocation": allocation}
    options |= {"options": {"rounds": 1, "value_steps": 0}, "neurons": "all"} if allocation == "llrc" else {}
    result = package.compress(folder, 0.3, output=tmp_path / "small", **options)
    assert result.ranks == package.compress(folder, 0.3, dtype="float32", **options).ranks
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    original: dict[str, Tensor] = bfloat16().state_dict()
    kept = [name for name, tensor in loaded.state_dict().items() if name in original and tensor.shape == original[name].shape]
    assert "model.embed_tokens.weight" in kept
    assert all(torch.equal(loaded.state_dict()[name], original[name]) for name in kept if "proj" not in name)
    sizes = result.report["bytes"]["model"]
    assert sizes["reference"] == sum(p.nbytes for p in bfloat16().parameters())
    orders = [buffer for name, buffer in loaded.named_buffers() if name.endswith(".order")]
    assert sizes["compressed"] == sum(tensor.nbytes for tensor in (*loaded.parameters(), *orders))
