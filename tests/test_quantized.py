"""torchao quantizes the factors like any linear layer; bytes are counted as they are held; what cannot be saved is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from rankwise import RankwiseError, bundled, compress
from rankwise.calibration.signal import Signal, divergence
from rankwise.evaluation.size import held_bytes
from rankwise.layers.lowrank import LowRankLinear

GROUP = 32
TEXT = "\n".join(text[:800] for text in bundled.standard_library("held-out")[:16])
WINDOWS = torch.tensor(AutoTokenizer.from_pretrained(bundled.MODEL)(TEXT)["input_ids"][: 48 * 32]).view(48, 32)


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with ranks that are whole groups, so that int4 takes both factors."""
    folder = tmp_path_factory.mktemp("quantized") / "small"
    compress(None, 0.25, output=folder, allocation="uniform", samples=16, length=64, rank_multiple=GROUP)
    return folder


@torch.no_grad()
def kl(reference: PreTrainedModel, other: PreTrainedModel) -> float:
    """Nats per token."""
    p, q = (Signal(model(WINDOWS).logits.float().flatten(0, 1), "categorical") for model in (reference, other))
    return divergence(p, q).item() / WINDOWS.numel()


def factors(model: nn.Module) -> list[Tensor]:
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    return [factor.weight for layer in layers for factor in (layer.first, layer.second)]


INT8: list[Any] = [Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()]


@pytest.mark.parametrize("config", INT8, ids=["weight-only", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8(folder: Path, config: Any, dtype: torch.dtype) -> None:
    """A byte per weight, five of scale and zero point per row; next to nothing in quality."""
    model, quantized = load(folder, dtype=dtype), load(folder, dtype=dtype)
    quantize_(quantized, config)
    assert len(factors(model)) > 20
    rows = sum(weight.shape[0] for weight in factors(model))
    elements = sum(weight.numel() for weight in factors(model))
    layers = nn.ParameterList(factors(quantized))
    assert held_bytes(layers) == elements + 5 * rows
    assert held_bytes(quantized.model.layers) < 0.65 * held_bytes(model.model.layers)
    assert kl(model, quantized) < 0.02
    generated = quantized.generate(WINDOWS[:1, :8], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 12)


def test_int4(folder: Path) -> None:
    """Half a byte per weight, and in float32 eight bytes of scale and zero per group."""
    model, quantized = load(folder), load(folder)
    quantize_(quantized, PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False))
    elements = sum(weight.numel() for weight in factors(model))
    assert held_bytes(nn.ParameterList(factors(quantized))) == elements / 2 + 8 * elements / GROUP
    assert 0.01 < kl(model, quantized) < 2


def test_floats_are_counted_as_ever(folder: Path) -> None:
    model = load(folder)
    assert held_bytes(model) == sum(p.nbytes for p in model.parameters()) == 4 * model.num_parameters()
    assert model.lm_head.weight is model.model.embed_tokens.weight  # counted once


def test_quantized_factors_are_not_saved(folder: Path, tmp_path: Path) -> None:
    quantized = load(folder)
    quantize_(quantized, Int8WeightOnlyConfig())
    with pytest.raises(RankwiseError, match=r"quantized after loading.*quantize again"):
        quantized.save_pretrained(tmp_path / "folder")
    assert not list(tmp_path.rglob("*.safetensors"))
    torch.save(quantized.state_dict(), tmp_path / "weights.pt")
    again = load(folder)
    again.load_state_dict(torch.load(tmp_path / "weights.pt"), assign=True)
    assert torch.equal(again(WINDOWS).logits, quantized(WINDOWS).logits)


@pytest.mark.parametrize("config", [TorchAoConfig(Int8WeightOnlyConfig()), BitsAndBytesConfig(load_in_8bit=True)])
def test_a_second_quantization_config_is_refused(folder: Path, config: Any) -> None:
    with pytest.raises(ValueError, match="RankwiseConfig"):
        load(folder, quantization_config=config)
