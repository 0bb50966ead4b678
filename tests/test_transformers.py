"""What users of transformers and accelerate do with a model holds for a compressed one: placing, tuning, generating, sharing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from forks import launched
from huggingface_hub import HfApi
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments, pipeline
from transformers.cache_utils import StaticCache

from rankwise import bundled, compress

PROMPT = "def read(self, size):\n    return self."
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture(scope="module")
def model(small_bundled: Path) -> PreTrainedModel:
    return load(small_bundled)


@pytest.fixture(scope="module")
def ids(small_bundled: Path) -> Tensor:
    return AutoTokenizer.from_pretrained(small_bundled)(PROMPT, return_tensors="pt").input_ids


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids).logits


def test_names_are_asked_for_as_any_release_asks(model: PreTrainedModel) -> None:
    """Up to 5.20 transformers gives the conversions alone, later the model too."""
    quantizer, conversions = model.hf_quantizer, [object()]
    assert quantizer.update_weight_conversions(conversions) == quantizer.update_weight_conversions(conversions, model)


@pytest.mark.parametrize("memory", ["8MB", "1500KB"])
def test_device_map_auto_and_disk_offload(
    small_bundled: Path, model: PreTrainedModel, ids: Tensor, memory: str, tmp_path: Path
) -> None:
    """With too little memory layers stay on disk, and are read from the folder's own safetensors."""
    placed = load(small_bundled, device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path)
    assert any(p.is_meta for p in placed.parameters()) == (memory == "1500KB")
    assert torch.equal(logits(placed, ids), logits(model, ids))
    assert torch.equal(placed.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


def test_an_offloaded_model_is_saved_again(small_bundled: Path, ids: Tensor, tmp_path: Path) -> None:
    options = {"device_map": "auto", "max_memory": {"cpu": "1500KB"}, "offload_folder": tmp_path / "offload"}
    load(small_bundled, **options).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), ids), logits(load(small_bundled), ids))


def test_gradient_checkpointing(small_bundled: Path, ids: Tensor) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = load(small_bundled).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    kept, computed_again = gradients(False), gradients(True)
    assert {name for name, _ in load(small_bundled).named_parameters()} == kept.keys()
    torch.testing.assert_close(computed_again, kept)


def test_trainer_fine_tunes_the_factors(small_bundled: Path, ids: Tensor, tmp_path: Path) -> None:
    model = load(small_bundled)
    before = model(ids, labels=ids).loss.item()
    examples = [{"input_ids": ids[0], "labels": ids[0]}] * 4
    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=1, learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=examples)  # type: ignore[arg-type]
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    tuned = load(tmp_path / "tuned")
    assert tuned(ids, labels=ids).loss.item() < before - 0.1
    assert torch.equal(logits(tuned, ids), logits(model.eval(), ids))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generates_with_either_cache(model: PreTrainedModel, ids: Tensor, cache: str) -> None:
    expected = model.generate(ids, **GREEDY, use_cache=False)
    assert torch.equal(model.generate(ids, **GREEDY, cache_implementation=cache), expected)


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiles_without_graph_breaks(tmp_path: Path) -> None:
    """The whole model in one graph, for a prompt and for one token on a static cache; fullgraph makes a break an error."""
    windows = torch.randint(3, 90, (12, 16), generator=torch.Generator().manual_seed(0))
    compress(build("llama", num_hidden_layers=1), 0.3, calibration=windows, allocation="uniform", output=tmp_path / "small")
    model, ids = load(tmp_path / "small"), torch.arange(3, 12)[None]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(ids).logits
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
    cache = StaticCache(config=model.config, max_cache_len=16)
    compiled(ids[:, :-1], past_key_values=cache)
    last = compiled(ids[:, -1:], past_key_values=cache, position_ids=torch.tensor([[8]])).logits
    torch.testing.assert_close(last[:, -1], expected[:, -1])


def test_drafts_for_its_own_original(model: PreTrainedModel, ids: Tensor) -> None:
    """Assisted generation gives the original's very text, in fewer calls of the original."""
    original = load(bundled.MODEL)
    calls = []
    original.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = original.generate(ids, **GREEDY)
    alone = len(calls)
    assert torch.equal(original.generate(ids, **GREEDY, assistant_model=model), expected)
    assert len(calls) - alone < alone


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"device_map": "auto"}], ids=["cpu", "device_map"])
def test_pipeline(small_bundled: Path, model: PreTrainedModel, ids: Tensor, options: dict[str, Any]) -> None:
    [answer] = pipeline("text-generation", model=str(small_bundled), **options)(PROMPT, **GREEDY)
    tokenizer = AutoTokenizer.from_pretrained(small_bundled)
    assert answer["generated_text"] == tokenizer.decode(model.generate(ids, **GREEDY)[0], skip_special_tokens=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(small_bundled: Path, model: PreTrainedModel, ids: Tensor, dtype: torch.dtype, tmp_path: Path) -> None:
    half = load(small_bundled, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    rounding = logits(load(bundled.MODEL, dtype=dtype), ids).float() - logits(load(bundled.MODEL), ids)
    error = (logits(half, ids).float() - logits(model, ids)).abs().max()
    assert error < 4 * rounding.abs().max()  # what the dense model loses, about
    half.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), ids), logits(half, ids))
    cast = load(small_bundled)
    cast = cast.half() if dtype == torch.float16 else cast.to(dtype)
    assert {p.dtype for p in cast.parameters()} == {dtype}


class Hub:
    """A hub that takes one commit and keeps its files in a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **_: type("Repo", (), {"repo_id": repo_id}))
        monkeypatch.setattr(HfApi, "create_commit", lambda api, **commit: self.take(**commit))

    def take(self, repo_id: str, operations: list[Any], **_: Any) -> None:
        for operation in operations:
            file = self.folder / repo_id / operation.path_in_repo
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(operation.path_or_fileobj, file)


def test_push_to_hub(
    model: PreTrainedModel, ids: Tensor, small_bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it uploads is a folder that loads, with the guards against loading without rankwise."""
    hub = Hub(tmp_path, monkeypatch)
    model.push_to_hub("someone/small")
    AutoTokenizer.from_pretrained(small_bundled).push_to_hub("someone/small")
    uploaded = hub.folder / "someone/small"
    assert torch.equal(logits(load(uploaded), ids), logits(model, ids))
    assert AutoTokenizer.from_pretrained(uploaded)(PROMPT).input_ids == ids[0].tolist()
    weights = "model.safetensors"
    assert (uploaded / weights).read_bytes() == (small_bundled / weights).read_bytes()


SHARDED = """
import torch, rankwise
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

distributed.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(folder)
ids = torch.arange(1, 25).reshape(2, 12)
whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
wanted = model(ids, labels=ids)
wanted.loss.backward()
gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
model.zero_grad()
mesh = init_device_mesh("cpu", (2,))
for part in (*model.model.layers, model):
    fully_shard(part, mesh=mesh)
got = model(ids, labels=ids)
got.loss.backward()
torch.testing.assert_close(got.logits, wanted.logits)
for name, parameter in model.named_parameters():
    torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], rtol=1e-3, atol=1e-6)
gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if distributed.get_rank() == 0:
    assert gathered.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in gathered.items())
distributed.barrier()
"""


def test_fsdp2_shards_the_factors(small_llama: Path, tmp_path: Path) -> None:
    fork = launched(2, tmp_path, SHARDED, str(small_llama), run=sharing)
    _, err = fork.communicate()
    assert fork.process.exitcode == 0, err


def sharing(folder: Path, arguments: tuple[str, ...]) -> None:
    """What each of two processes does: a script and its argument."""
    script, model = arguments
    exec(script, {"folder": model})
