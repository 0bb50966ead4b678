"""Packed for bfloat16 on a CPU a model computes the very same, and keeps its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, build
from transformers import AutoModelForCausalLM

import rankwise
from rankwise import RankwiseError
from rankwise.calibration.signal import values_of
from rankwise.calibration.tokens import with_decoder_inputs
from rankwise.runtime.pack import PackedLinear, has_kernels

WINDOWS = torch.randint(3, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.skipif(not has_kernels(), reason="needs the bfloat16 kernels of oneDNN")


def compressed(name: str) -> Any:
    options = {"allocation": "uniform", "decomposition": "svd"}
    return rankwise.compress(build(name).bfloat16(), 0.3, calibration=WINDOWS, **options).model.eval()


@pytest.mark.parametrize("name", ["llama", "llama-gqa-tied", "t5", "mixtral", "gpt2", "bert-classifier"])
@torch.no_grad()
def test_the_same_model(name: str, tmp_path: Path) -> None:
    model = compressed(name)
    batch = with_decoder_inputs(model, {"input_ids": WINDOWS, "labels": WINDOWS})
    before, parameters = values_of(model, batch)[0], model.num_parameters()
    model.save_pretrained(tmp_path / "before")
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    assert rankwise.pack(rankwise.pack(rankwise.optimize(model))) is model
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) >= 6
    torch.testing.assert_close(values_of(model, batch)[0], before)
    assert model.num_parameters() == parameters
    after = model.state_dict()
    assert tensors.keys() == after.keys()
    assert all(torch.equal(t, after[n]) for n, t in tensors.items())
    model.save_pretrained(tmp_path / "after")
    files = [(tmp_path / when / "model.safetensors").read_bytes() for when in ("before", "after")]
    assert files[0] == files[1]


def test_shared_weights_stay() -> None:
    model = rankwise.pack(compressed("llama-gqa-tied"))
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_generation_is_the_same(small_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_llama, dtype=torch.bfloat16)
    plain = model.generate(WINDOWS[:2], max_new_tokens=12, do_sample=False)
    assert torch.equal(rankwise.pack(model).generate(WINDOWS[:2], max_new_tokens=12, do_sample=False), plain)


def test_what_comes_before_may_be_trained() -> None:
    model = rankwise.pack(compressed("llama"))
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    model(input_ids=WINDOWS).logits.float().square().mean().backward()
    assert embedding.grad.abs().sum() > 0


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(RankwiseError, match="bfloat16 on a CPU"):
        rankwise.pack(build("llama"))
