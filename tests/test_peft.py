"""LoRA on a compressed model: attaches to the factors, trains, merges, saves and loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rankwise import RankwiseError, lora_targets

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own use of it
TEXT = "The low-rank matrix met its budget, and there was much rejoicing.\n" * 2


@pytest.fixture(scope="module")
def ids(small_bundled: Path) -> Tensor:
    return AutoTokenizer.from_pretrained(small_bundled)(TEXT, return_tensors="pt").input_ids


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def adapted(folder: Path, targets: str | Sequence[str]) -> PeftModel:
    torch.manual_seed(0)
    model = load(folder)
    names = targets if isinstance(targets, str) else lora_targets(model, *targets)
    return get_peft_model(model, LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))


def train(model: PeftModel, ids: Tensor, steps: int = 12) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


def test_default_targets_are_refused_not_ignored(small_bundled: Path) -> None:
    with pytest.raises(ValueError, match="PivotedLinear"):
        get_peft_model(load(small_bundled), LoraConfig(target_modules=["q_proj"]))


def test_targets_are_the_factors_where_there_are_any(small_bundled: Path) -> None:
    model = load(small_bundled)
    layer = "model.layers.0.self_attn"
    dense = torch.nn.Linear(model.config.hidden_size, model.config.hidden_size)
    model.set_submodule(f"{layer}.q_proj", dense)
    targets = lora_targets(model, "q_proj", "v_proj")
    assert {t for t in targets if t.startswith(layer)} == {f"{layer}.{n}" for n in ("q_proj", "v_proj.first", "v_proj.second")}
    assert len(targets) == 4 * model.config.num_hidden_layers - 1
    assert lora_targets(model, "layers.1.mlp.up_proj") == [f"model.layers.1.mlp.up_proj.{n}" for n in ("first", "second")]
    with pytest.raises(RankwiseError, match="'proj'"):
        lora_targets(model, "q_proj", "proj")


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")], ids=["all-linear", "named"])
def test_trains_merges_and_saves(small_bundled: Path, ids: Tensor, targets: str | Sequence[str], tmp_path: Path) -> None:
    before = logits(load(small_bundled), ids)
    model = adapted(small_bundled, targets)
    torch.testing.assert_close(logits(model, ids), before)  # LoRA starts at zero
    losses = train(model, ids)
    assert losses[-1] < losses[0] - 0.3
    tuned = logits(model.eval(), ids)

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(small_bundled), tmp_path / "adapter")
    assert torch.equal(logits(again, ids), tuned)
    with again.disable_adapter():
        torch.testing.assert_close(logits(again, ids), before)

    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), tuned, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = load(tmp_path / "merged")
    assert torch.equal(logits(reloaded, ids), logits(merged, ids))
    assert reloaded.num_parameters() == load(small_bundled).num_parameters()  # the ranks did not grow


def test_adapters_of_transformers_itself(small_bundled: Path, ids: Tensor, tmp_path: Path) -> None:
    model = adapted(small_bundled, ("q_proj",))
    train(model, ids, steps=3)
    model.save_pretrained(tmp_path)
    loaded = load(small_bundled)
    loaded.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(loaded, ids), logits(model.eval(), ids))
