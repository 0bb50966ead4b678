"""What one pass collects is what hooks, autograd and sequences taken one by one give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import VOCABULARY, build
from torch import Tensor
from transformers import PreTrainedModel

from rankwise import RankwiseError
from rankwise.calibration.moments import KeptStatistics, Statistics, collect
from rankwise.calibration.signal import frozen
from rankwise.calibration.tokens import Batch
from rankwise.layers.matrices import find_matrices, unstack_experts
from rankwise.run_folder import write_tensors

ALL = ("input", "absolute", "output", "fisher")
SEED = 5
WINDOWS = torch.randint(3, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(0))
LENGTHS = (12, 7, 9)  # of the padded batch's sequences
BATCHES: list[Batch] = [
    {"input_ids": WINDOWS[:2]},
    {"input_ids": WINDOWS[2:5], "attention_mask": (torch.arange(12) < torch.tensor(LENGTHS)[:, None]).long()},
    {"input_ids": WINDOWS[5:]},
]
SEQUENCES = [*WINDOWS[:2], *(w[:n] for w, n in zip(WINDOWS[2:5], LENGTHS, strict=True)), *WINDOWS[5:]]


def llama() -> tuple[PreTrainedModel, list[str]]:
    model = build("llama-gqa-tied").double()
    return model, list(find_matrices(model)[0])


def sampled_labels() -> Callable[[Tensor], Tensor]:
    """Labels of logits [tokens, vocabulary] by inverse transform, one uniform number per token, of padding too."""
    generator = torch.Generator().manual_seed(SEED)

    def draw(logits: Tensor) -> Tensor:
        uniform = torch.rand(WINDOWS.shape[1], 1, generator=generator)[: len(logits)]
        return (logits.float().softmax(-1).cumsum(-1) <= uniform).sum(-1).clamp(max=VOCABULARY - 1)

    return draw


def by_hand(model: PreTrainedModel, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """The moments of every matrix from its sequences alone, without padding; gradients by autograd on the weights."""
    draw = sampled_labels()
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            output.retain_grad()
            seen[name] = inputs[0], output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    for sequence in SEQUENCES:
        model.zero_grad()
        logits = model(sequence[None]).logits[0]
        F.cross_entropy(logits, draw(logits.detach()), reduction="sum").backward()
        for name, (x, output) in seen.items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            assert weight.grad is not None
            assert output.grad is not None
            x, g = x.detach()[0], output.grad[0]
            new = {
                "input": torch.einsum("ti,tj->ij", x, x),
                "absolute": x.abs().sum(0),
                "output": torch.einsum("ti,tj->ij", g, g),
                "fisher": weight.grad.square().sum(0),
            }
            for key, value in new.items():
                sums[name][key] = sums[name].get(key, torch.zeros(())) + value
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return sums


def test_every_moment_is_that_of_the_sequences_taken_alone() -> None:
    model, names = llama()
    statistics = collect(model, names, BATCHES, ALL, SEED)
    expected = by_hand(model, names)
    for name in names:
        moments = statistics.of(name)
        assert moments.count == sum(map(len, SEQUENCES))
        for key in ALL:
            value = getattr(moments, key)
            assert value.dtype == (torch.float32 if key == "output" else torch.float64)
            scale = expected[name][key].abs().max().item()
            torch.testing.assert_close(
                value.double(), expected[name][key], rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
            )


def test_only_what_is_needed_is_collected() -> None:
    model, names = llama()
    moments = collect(model, names, BATCHES, ("absolute",)).of(names[0])
    assert [key for key in ALL if getattr(moments, key) is not None] == ["absolute"]


def test_matrices_that_read_the_same_activations_share_a_site() -> None:
    model, names = llama()
    site_of = collect(model, names, BATCHES, ("input",)).site_of
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        assert {site_of[attention + p] for p in ("q_proj", "k_proj", "v_proj")} == {attention + "q_proj"}
        assert {site_of[mlp + p] for p in ("gate_proj", "up_proj")} == {mlp + "gate_proj"}
        for alone in (attention + "o_proj", mlp + "down_proj"):
            assert site_of[alone] == alone
    assert len(set(site_of.values())) == 8


def test_moments_of_two_halves_add_up() -> None:
    model, names = llama()
    whole, first, second = (collect(model, names, part, ("input",)) for part in (BATCHES, BATCHES[:1], BATCHES[1:]))
    for name in names:
        total = first.of(name).input + second.of(name).input
        torch.testing.assert_close(whole.of(name).input, total, rtol=1e-12, atol=0)


def test_an_expert_that_no_token_reaches_has_no_count() -> None:
    model = build("mixtral", num_local_experts=8)
    unstack_experts(model)
    names = [name for name in find_matrices(model)[0] if "experts" in name]
    tokens = 3
    statistics = collect(model, names, [{"input_ids": WINDOWS[:1, :tokens]}], ALL)
    reached = {name: statistics.of(name).holds(ALL) for name in names}
    assert any(reached.values())
    assert not all(reached.values())
    for layer in range(2):
        gates = [statistics.of(name).count for name in names if f"layers.{layer}." in name and "gate_up" in name]
        assert len(gates) == 8
        assert sum(gates) == 2 * tokens  # two experts for each token
    for name in names:
        assert reached[name] == (statistics.of(name).count > 0)


def test_statistics_survive_the_run_folder() -> None:
    model, names = llama()
    before = collect(model, names, BATCHES, ALL, SEED)
    after = Statistics.from_tensors(dict(sorted(before.to_tensors().items())), torch.device("cpu"))
    assert list(after.site_of.items()) == list(before.site_of.items())
    for name in names:
        old, new = vars(before.of(name)), vars(after.of(name))
        assert old.pop("count") == new.pop("count")
        assert all(torch.equal(old[key], new[key]) for key in ALL)


def test_kept_statistics_are_those_that_were_collected(tmp_path: Path) -> None:
    model = build("mixtral", num_local_experts=8)
    unstack_experts(model)
    names = list(find_matrices(model)[0])
    collected = collect(model, names, [{"input_ids": WINDOWS[:1, :3]}], ALL)  # too little to reach every expert
    write_tensors(tmp_path / "statistics.safetensors", collected.to_tensors())
    kept = KeptStatistics(tmp_path / "statistics.safetensors", collected.site_of, torch.device("cpu"))
    for name in names:
        old, new = vars(collected.of(name)), vars(kept.of(name))
        assert old.keys() == new.keys()
        assert all(old[key] is new[key] or bool((old[key] == new[key]).all()) for key in old if key != "count")
        assert old["count"] == new["count"]
    (tmp_path / "statistics.safetensors").unlink()
    with pytest.raises(RankwiseError, match=r"statistics.safetensors cannot be read"):
        kept.of(names[0])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_put_back_as_it_was(fails: bool) -> None:
    model, names = llama()
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    model.config.use_cache = True

    def state() -> dict[str, Any]:
        return {
            "training": [module.training for module in model.modules()],
            "asking": [(name, p.requires_grad) for name, p in model.named_parameters()],
            "cache": model.config.use_cache,
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            "gradients": [p.grad for p in model.parameters()],
        }

    before = state()
    if fails:
        with pytest.raises(IndexError):
            collect(model, names, [*BATCHES, {"input_ids": torch.full((1, 4), VOCABULARY)}], ALL)
    else:
        collect(model, names, BATCHES, ALL)
    assert state() == before


def test_inside_frozen_nothing_trains() -> None:
    model, _ = llama()
    model.train()
    model.config.use_cache = True
    with frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        assert model.config.use_cache is False


@pytest.mark.parametrize("needs", [("input",), ("output",)])
def test_values_that_are_not_finite_are_refused(needs: tuple[str, ...]) -> None:
    model, names = llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(RankwiseError, match="not finite"):
        collect(model, names, BATCHES, needs)


def test_activations_too_large_for_their_squares_are_refused_by_name() -> None:
    model, names = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 1e30  # the norm brings the outputs back to finite values
    with pytest.raises(RankwiseError, match=r"layers\.1\.mlp\.down_proj"):
        collect(model, names, BATCHES, ("input",))
