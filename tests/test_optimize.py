"""Optimised for inference a model computes the same, keeps its checkpoint, and compiles in one graph."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, build
from transformers import (
    AutoModelForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    PreTrainedModel,
    StaticCache,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import rankwise
from rankwise.calibration.signal import values_of
from rankwise.calibration.tokens import with_decoder_inputs
from rankwise.runtime.optimize import JointLinear

WINDOWS = torch.randint(3, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))


def compressed(name: str, **changes: Any) -> torch.nn.Module:
    options = {"allocation": "uniform", "decomposition": "svd"}
    return rankwise.compress(build(name, **changes), 0.3, calibration=WINDOWS, **options).model.eval()


def joined(model: torch.nn.Module) -> list[str]:
    return [name.rpartition(".first")[0] for name, module in model.named_modules() if isinstance(module, JointLinear)]


@pytest.mark.parametrize(("name", "count"), [("llama", 6), ("t5", 16), ("mixtral", 6), ("gpt2", 0), ("bert-classifier", 6)])
@torch.no_grad()
def test_the_same_model(name: str, count: int, tmp_path: Path) -> None:
    model = compressed(name)
    batch = with_decoder_inputs(model, {"input_ids": WINDOWS, "labels": WINDOWS})
    before, tensors = values_of(model, batch)[0], {n: t.clone() for n, t in model.state_dict().items()}
    assert rankwise.optimize(rankwise.optimize(model)) is model
    assert len(joined(model)) == count
    torch.testing.assert_close(values_of(model, batch)[0], before)
    after = model.state_dict()
    assert tensors.keys() == after.keys()
    assert all(torch.equal(t, after[n]) for n, t in tensors.items())
    model.save_pretrained(tmp_path)
    assert torch.equal(values_of(type(model).from_pretrained(tmp_path), batch)[0], before)


def test_siblings_may_be_called_in_any_order_and_by_several_threads() -> None:
    model = rankwise.optimize(compressed("llama"))
    attention = model.get_submodule("model.layers.0.self_attn")
    layers = [attention.k_proj, attention.q_proj, attention.v_proj]
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(200):
            x = torch.randn(2, 48, generator=generator)
            for layer in layers[seed % 3 :] + layers[:1]:
                expected = x @ layer.weight.T
                if not torch.allclose(layer(x), expected, atol=1e-4):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_trained_factor_gets_its_gradient() -> None:
    model = rankwise.optimize(compressed("llama"))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.first.weight.requires_grad_(True)
    layer(torch.randn(2, 48)).sum().backward()
    assert layer.first.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("optimised", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_one_graph(optimised: bool) -> None:
    model = compressed("llama", num_hidden_layers=1)
    expected = model(input_ids=WINDOWS).logits
    if optimised:
        rankwise.optimize(model)
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")  # raises at a graph break
    torch.testing.assert_close(graph(input_ids=WINDOWS, use_cache=False).logits, expected)
    cache = StaticCache(model.config, max_cache_len=16)
    graph(input_ids=WINDOWS[:, :15], past_key_values=cache, use_cache=True)
    step = graph(input_ids=WINDOWS[:, 15:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(step.logits[:, 0], expected[:, -1])


def test_generation_is_the_same(small_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_llama)
    plain = model.generate(WINDOWS[:2], max_new_tokens=12, do_sample=False)
    assert torch.equal(rankwise.optimize(model).generate(WINDOWS[:2], max_new_tokens=12, do_sample=False), plain)


VISION = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SPEECH = {"d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
SPEECH |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": VOCABULARY, "max_source_positions": 16}


def whisper() -> PreTrainedModel:
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(WhisperConfig(**SPEECH, **tokens, num_mel_bins=8, max_target_positions=32))


# q, k and v of an encoder and of a decoder, k and v of what the decoder reads of the encoder
OTHERS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, torch.Tensor], int]] = {
    "an encoder-decoder that makes no inputs": (
        lambda: M2M100ForConditionalGeneration(M2M100Config(**{k: v for k, v in SPEECH.items() if "source" not in k})),
        {"input_ids": WINDOWS, "decoder_input_ids": WINDOWS},
        3 + 3 + 2,
    ),
    "pictures": (
        lambda: ViTModel(ViTConfig(**VISION, image_size=16, patch_size=8)),
        {"pixel_values": torch.randn(6, 3, 16, 16)},
        6,
    ),
    "speech": (whisper, {"input_features": torch.randn(6, 8, 32), "decoder_input_ids": WINDOWS}, 3 + 3 + 2),
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_models_that_read_something_else_than_text(name: str) -> None:
    make, batch, count = OTHERS[name]
    options = {"allocation": "uniform", "decomposition": "svd"}
    model = rankwise.compress(make(), 0.3, calibration=[batch], **options).model.eval()
    before = values_of(model, batch)[0]
    assert len(joined(rankwise.optimize(model))) == count
    torch.testing.assert_close(values_of(model, batch)[0], before)


def test_without_a_call_of_the_model_its_factors_stay_apart(caplog: pytest.LogCaptureFixture) -> None:
    model = compressed("llama")
    expected = model(input_ids=WINDOWS).logits
    model.main_input_name = "nothing"
    assert joined(rankwise.optimize(model)) == []
    assert "no call of LlamaForCausalLM is known" in caplog.text
    torch.testing.assert_close(model(input_ids=WINDOWS).logits, expected)
