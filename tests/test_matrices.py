"""What is a linear layer and nothing else may be compressed; of all other matrices it is said why they stay dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from architectures import SMALL, build
from torch import Tensor, nn

from rankwise import RankwiseError, compress
from rankwise.layers import experts
from rankwise.layers.matrices import find_matrices, unstack_experts


def reasons(model: nn.Module, **options: Any) -> dict[str, str]:
    unstack_experts(model)
    return find_matrices(model, **options)[1]


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Experts(nn.Module):
    """Stacked as transformers does it, but without its decorator's word on how they are run."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 16))
        self.down_proj = nn.Parameter(torch.randn(4, 16, 16))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return gate_up


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(16, 16)
        self.doubled = Doubled(16, 16)
        self.experts = Experts()
        self.gate = nn.Linear(16, 8)
        self.mix = nn.Parameter(torch.randn(16, 16))
        self.pos_emb = nn.Parameter(torch.randn(4, 4, 16))


def test_what_stays_dense_and_why() -> None:
    router = "a router (name it in include to compress it)"
    assert reasons(Block()) == {
        "doubled": "a Doubled, whose forward is its own",
        "gate": router,
        "mix": "a matrix of a Block, which rankwise does not know",
        "experts.gate_up_proj": "stacked matrices in a Experts, which rankwise does not know",
        "experts.down_proj": "stacked matrices in a Experts, which rankwise does not know",
    }
    assert "gate" not in reasons(Block(), include=("*",))
    assert reasons(Block(), include=("*",))["doubled"] == "a Doubled, whose forward is its own"
    assert reasons(Block(), exclude=("doubled",))["doubled"]  # a pattern may name it
    with pytest.raises(RankwiseError, match="matches none"):
        find_matrices(Block(), exclude=("experts",))


def test_routers_and_layers_with_a_forward_of_their_own_in_real_models() -> None:
    assert reasons(build("llama4"))["model.layers.0.feed_forward.router"] == "a Llama4Router, whose forward is its own"
    assert "a router" in reasons(build("dbrx"))["transformer.blocks.0.ffn.router.layer"]
    assert "a router" in reasons(build("jetmoe"))["model.layers.0.mlp.router.layer"]
    assert set(reasons(build("falcon"))) == {"lm_head"}  # its layers are of a class of their own, and plain


def test_a_model_of_which_little_can_be_compressed_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    windows = torch.randint(3, SMALL["vocab_size"], (12, 16))
    for name in ("jetmoe", "mixtral"):
        compress(build(name), 0.3, calibration=windows, allocation="uniform", decomposition="whitened")
    assert [record.message for record in caplog.records if "may be" in record.message] == [
        "only 4% of the model's parameters are in matrices that may be compressed: a rate counts these alone, unless it is of "
        "the whole model (--scope model)"
    ]


def test_tables_and_mixes_are_no_matrices() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    rwkv = transformers.RwkvForCausalLM(transformers.RwkvConfig(vocab_size=64, attention_hidden_size=32, **sizes))
    assert set(reasons(rwkv)) == {"head"}
    vit = transformers.ViTModel(transformers.ViTConfig(**sizes, num_attention_heads=4, image_size=32, patch_size=8))
    assert reasons(vit) == {}
    config = transformers.SiglipVisionConfig(**sizes, num_attention_heads=4, image_size=32, patch_size=8)
    assert set(reasons(transformers.SiglipVisionModel(config))) == {"head.attention.in_proj_weight"}


@pytest.mark.parametrize("said", ["as now", "as in transformers 5.14"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "llama4", "dbrx"])
def test_unstacked_experts_do_as_before_and_are_stacked_again(name: str, said: str) -> None:
    model = build(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for module in model.modules():
            if said != "as now" and not vars(module).get("has_post_expert_norm", True):
                del module.has_post_expert_norm  # which 5.14 does not know
        paths = unstack_experts(model)
        assert len(paths) == 2
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    for path in paths:
        experts.restack(model.get_submodule(path))
    assert [n for n, _ in model.named_parameters()] == list(before)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_mixtures_are_whole_again_where_taking_them_apart_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=2))
    before = [n for n, _ in model.named_parameters()]
    apart, first = experts.unstack, model.model.layers[0].mlp.experts

    def fails(module: nn.Module) -> None:
        if module is not first:
            raise MemoryError
        apart(module)

    monkeypatch.setattr(experts, "unstack", fails)
    with pytest.raises(MemoryError):
        unstack_experts(model)
    assert [n for n, _ in model.named_parameters()] == before
