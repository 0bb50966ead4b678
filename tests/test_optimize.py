"""Optimised for inference a model computes the same, keeps its checkpoint, and compiles in one graph."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from architectures import VOCABULARY, build
from transformers import AutoModelForCausalLM, StaticCache

import rankwise
from rankwise.calibration.signal import values_of
from rankwise.calibration.tokens import with_decoder_inputs
from rankwise.runtime.optimize import JointLinear

WINDOWS = torch.randint(3, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))


def compressed(name: str) -> torch.nn.Module:
    options = {"allocation": "uniform", "decomposition": "svd"}
    return rankwise.compress(build(name), 0.3, calibration=WINDOWS, **options).model.eval()


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


@pytest.mark.parametrize("optimised", [False, True])
@torch.no_grad()
def test_one_graph(optimised: bool) -> None:
    model = compressed("llama")
    expected = model(input_ids=WINDOWS).logits
    if optimised:
        rankwise.optimize(model)
    torch._dynamo.reset()
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
