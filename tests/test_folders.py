"""A model's folder: what lies beside the weights, what the files say that the config does not, and where a result is put."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from architectures import SMALL, VOCABULARY, build
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import rankwise
from rankwise import RankwiseError
from rankwise.evaluation.evaluate import weights_on_disk
from rankwise.integration.checkpoint import load_config, load_model, load_tokenizer
from rankwise.integration.files import judge_config, weight_files

WINDOWS = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(1))
IDS = torch.arange(3, 30)[None]
WEIGHTS = "model.safetensors"
BESIDE = {"LICENSE", "NOTICE", "modules.json", "preprocessor_config.json", "chat_template.json", "1_Pooling/config.json"}
BESIDE |= {"2_Dense/model.safetensors"}
NOT_COPIED = ("evil.py", ".hidden", "pytorch_model.bin", "old.safetensors.index.json", "recipe.yaml", "elsewhere.txt", "odd")


def compress(model: Any, output: Path | None = None, **options: Any) -> Any:
    given = {"rate": 0.3, "calibration": WINDOWS, "allocation": "uniform"} | options
    return rankwise.compress(model, output=output, **given)


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(folder: Path, **changes: Tensor) -> None:
    save_file(load_file(folder / WEIGHTS) | changes, folder / WEIGHTS, metadata={"format": "pt"})


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def furnished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with much beside its weights."""
    folder = copy(llama, tmp_path_factory.mktemp("furnished") / "model")
    for name in (*BESIDE, *NOT_COPIED[:-2], "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("the original's own")
    modules = [{"path": path} for path in ("", "1_Pooling", "2_Dense", "..", "../model", "nowhere")]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder.parent / "secret").write_text("of somebody else")
    (folder / "elsewhere.txt").symlink_to(folder.parent / "secret")
    (folder / "odd").symlink_to("nowhere")
    return folder


def test_what_lies_beside_the_weights_is_copied(furnished: Path, tmp_path: Path) -> None:
    compress(furnished, tmp_path / "small")
    rankwise.densify(tmp_path / "small", tmp_path / "dense")
    rankwise.decompose(furnished, tmp_path / "artifact", calibration=WINDOWS)
    compress(tmp_path / "artifact", tmp_path / "again", calibration=None, allocation="mask-fisher")
    for name in ("small", "dense", "artifact", "again"):
        found = files_in(tmp_path / name)
        assert found >= BESIDE, name
        assert not found & set(NOT_COPIED) - {"recipe.yaml"}, name
        assert (tmp_path / name / "2_Dense/model.safetensors").read_text() == "the original's own"
    assert "README.md" not in files_in(tmp_path / "dense") | files_in(tmp_path / "artifact")
    assert "import rankwise" in (tmp_path / "small/README.md").read_text()
    assert not {"ranks.json", "recipe.yaml", "report.json", "decomposed.json"} & files_in(tmp_path / "dense")


def cached(folder: Path, hub: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a folder into a cache of the hub, as it lies there: a snapshot of links to blobs."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    own = hub / f"models--{name.replace('/', '--')}"
    for path in files_in(folder):
        blob, link = own / "blobs" / path.replace("/", "-"), own / "snapshots" / ("0" * 40) / path
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (own / "refs").mkdir()
    (own / "refs/main").write_text("0" * 40)


def test_a_name_on_the_hub_has_the_same_beside_it(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model := build("llama")).config._name_or_path = "someone/model"
    cached(furnished, tmp_path / "hub", "someone/model", monkeypatch)
    compress(model).save(tmp_path / "small")
    assert files_in(tmp_path / "small") >= BESIDE
    assert not files_in(tmp_path / "small") & {"evil.py", "pytorch_model.bin"}


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_files_have_the_rights_of_any_new_file(llama: Path, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        rankwise.decompose(llama, tmp_path / "artifact", calibration=WINDOWS, decomposition="svd")  # a run folder is in it
        compress(llama, tmp_path / "small")
    finally:
        os.umask(before)
    rights = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in files_in(tmp_path)}
    assert rights == {0o666 & ~mask}


def test_a_mount_point_is_refused_before_the_work(
    llama: Path, small_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = copy(small_llama, tmp_path / "place")
    before = files_in(place)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == place)
    for work in (
        lambda: compress(llama, place, overwrite=True),
        lambda: rankwise.densify(small_llama, place, overwrite=True),
        lambda: rankwise.decompose(llama, place, calibration=WINDOWS, overwrite=True),
    ):
        with pytest.raises(RankwiseError, match=f"{place} is a mount point"):
            work()
    assert files_in(place) == before


@pytest.mark.parametrize("refused", ["the old one away", "the new one there"])
def test_an_old_result_stays_until_the_new_one_is_there(
    llama: Path, small_llama: Path, tmp_path: Path, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, replace = copy(small_llama, tmp_path / "place"), os.replace
    before = {name: (place / name).read_bytes() for name in files_in(place)}

    def busy(source: Path, to: Path) -> None:
        if (source == place) == (refused == "the old one away") and place in (source, to) and ".old" not in f"{source}":
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(source, to)

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(RankwiseError, match=r"cannot write .*place: Device or resource busy"):
        compress(llama).save(place, overwrite=True)
    assert {name: (place / name).read_bytes() for name in files_in(place)} == before
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    monkeypatch.undo()
    compress(llama, rate=0.5).save(place, overwrite=True)
    assert json.loads((place / "report.json").read_text())["rate"] == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied by the config; in the files embeddings and head differ."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    build("llama-gqa-tied").save_pretrained(folder)
    embeddings = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    change_weights(folder, **{"lm_head.weight": embeddings + 0.1 * torch.randn_like(embeddings)})
    return folder


@pytest.mark.parametrize("include", [(), ("lm_head", "*")], ids=["head dense", "head compressed"])
def test_what_the_files_untie_stays_untied(untied: Path, tmp_path: Path, include: tuple[str, ...]) -> None:
    result = compress(untied, tmp_path / "small", include=include)
    assert (result.ranks.get("lm_head") is not None) == bool(include)
    assert AutoConfig.from_pretrained(tmp_path / "small").tie_word_embeddings is False
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "small")), logits(result.model))
    rankwise.densify(tmp_path / "small", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(dense), logits(result.model), rtol=1e-3, atol=1e-4)


def test_a_head_of_its_own_beside_what_is_tied(tmp_path: Path) -> None:
    """A T5 whose encoder and decoder share embeddings, as the config says, and whose head does not."""
    build("t5", tie_word_embeddings=True).save_pretrained(tmp_path / "t5")
    change_weights(tmp_path / "t5", **{"lm_head.weight": torch.randn(VOCABULARY, 48)})
    result = compress(tmp_path / "t5", tmp_path / "small", include=("lm_head", "*"))
    assert result.ranks["lm_head"] is not None
    loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "small")
    assert loaded.encoder.embed_tokens.weight is loaded.decoder.embed_tokens.weight
    both = [model(input_ids=IDS, decoder_input_ids=IDS).logits for model in (loaded.eval(), result.model)]
    torch.testing.assert_close(*both)


@pytest.fixture(scope="module")
def with_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model whose head is low-rank too."""
    folder = tmp_path_factory.mktemp("with-head") / "small"
    compress(build("mixtral"), folder, include=("lm_head", "*"))
    return folder


def test_a_result_loads_without_its_head(with_head: Path, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(with_head)
    base = AutoModel.from_pretrained(with_head)
    with torch.no_grad():
        torch.testing.assert_close(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    again, info = AutoModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        torch.testing.assert_close(base(IDS).last_hidden_state, again(IDS).last_hidden_state)
    model, info = AutoModelForSequenceClassification.from_pretrained(with_head, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    with torch.no_grad():
        torch.testing.assert_close(model.model(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_a_result_without_a_head_loads_with_one(tmp_path: Path) -> None:
    base = build("llama-gqa-tied").model
    base.save_pretrained(tmp_path / "base")
    compress(tmp_path / "base", tmp_path / "small")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tmp_path / "small")(IDS).last_hidden_state
        torch.testing.assert_close(model.model(IDS).last_hidden_state, expected)


def test_a_model_with_none_of_the_matrices_is_no_result(small_llama: Path) -> None:
    stored = json.loads((small_llama / "config.json").read_text())
    config = transformers.BertConfig(**SMALL, **{name: stored[name] for name in ("architectures", "quantization_config")})
    with pytest.raises(ValueError, match="a BertModel has none of the matrices"):
        transformers.BertModel.from_pretrained(small_llama, config=config)


def fewer_layers(model: Any) -> None:
    del model.model.layers[-1]


def narrower(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = nn.Parameter(linear.weight[:40])
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :40])


def another_head(model: Any) -> None:
    model.lm_head = nn.Linear(48, VOCABULARY, bias=True)


def adapted(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own use of it
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fewer_layers, r"model\.layers\.1\.\S+ is not there in the model and \[.*num_hidden_layers says 2"),
        (narrower, r"gate_proj\.weight is \[40, 48\] in the model and \[64, 48\] by the config"),
        (another_head, r"lm_head\.bias is \[96\] in the model and not there by the config"),
        (adapted, "merge the adapter"),
    ],
)
def test_a_model_that_its_config_does_not_make_is_refused(change: Callable[[Any], None], message: str) -> None:
    model = build("llama")
    change(model)
    with pytest.raises(RankwiseError, match=message):
        compress(model)


def test_what_its_config_was_told_of_is_compressed(tmp_path: Path) -> None:
    model = build("llama")
    fewer_layers(model)
    model.config.num_hidden_layers = 1
    result = compress(model, tmp_path / "small")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "small")), logits(result.model))


@pytest.mark.parametrize("memory", [None, "8GB"])
def test_left_over_tensors_are_named_and_left_out(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, memory: str | None
) -> None:
    folder = copy(llama, tmp_path / "model")
    change_weights(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(6), "pooler.weight": torch.rand(3)})
    compress(folder, tmp_path / "small", memory=memory)
    [note] = [record.message for record in caplog.records if "left out" in record.message]
    assert note.endswith("as a LlamaForCausalLM does not have it: pooler.weight")  # the other one transformers itself knows of
    assert "pooler.weight" not in load_file(tmp_path / "small" / WEIGHTS)


def test_a_class_reads_its_own_of_what_a_larger_one_left(tmp_path: Path) -> None:
    bert = transformers.BertForPreTraining(transformers.BertConfig(**SMALL))
    bert.save_pretrained(tmp_path / "bert")
    change_config(tmp_path / "bert", architectures=["BertForMaskedLM"])
    assert type(compress(tmp_path / "bert").model).__name__ == "BertForMaskedLM"


@pytest.mark.parametrize("memory", [None, "8GB"])
@pytest.mark.parametrize("name", ["model.layers.5.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_left_over_tensors_of_the_models_own_modules_are_refused(
    llama: Path, tmp_path: Path, name: str, memory: str | None
) -> None:
    folder = copy(llama, tmp_path / "model")
    change_weights(folder, **{name: torch.zeros(3)})
    with pytest.raises(RankwiseError, match=f"unexpected keys: {name}"):
        compress(folder, tmp_path / "small", memory=memory)


def test_bytes_on_disk_are_those_of_the_weights_that_are_read(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "model")
    size = (folder / WEIGHTS).stat().st_size
    (folder / "consolidated.safetensors").write_bytes(b"0" * 1000)
    assert weights_on_disk(folder) == size
    build("llama").save_pretrained(folder, max_shard_size="50KB")
    (folder / WEIGHTS).unlink()
    assert len(weight_files(folder)) > 1
    assert weights_on_disk(folder) == sum(file.stat().st_size for file in folder.glob("model-*.safetensors"))
    assert weights_on_disk(Path("someone/model")) is None


def test_every_number_in_the_configs_of_transformers_is_one_that_a_model_has() -> None:
    """Read from their source: to import all of them takes longer than everything else here."""
    models = Path(transformers.__file__).parent / "models"
    found = set[tuple[str, str]]()
    for file in models.glob("*/configuration_*.py"):
        found |= set(re.findall(r"\b(\w+)(?::[^=\n]*)?= ?([0-9][0-9_.]*)\b", file.read_text()))
    assert {("num_experts", "16384"), ("vocab_size_per_layer_input", "262_144")} <= found
    for name, value in found:
        judge_config("a model", {name: float(value)})
    for name in ("num_hidden_layers", "n_routed_experts", "encoder_layers", "n_layer", "depth"):
        with pytest.raises(RankwiseError, match=f"{name}=1e.09 is more than any model has"):
            judge_config("a model", {"vision_config": {name: 10**9}})


@pytest.mark.parametrize(
    ("model_type", "named", "served_by"),
    [
        ("internlm3", "InternLM3ForCausalLM", "LlamaForCausalLM"),
        ("internlm3", "LlamaForCausalLM", "LlamaForCausalLM"),  # as a result of the former has it
        ("jetmoe", "JetMoEForCausalLM", "JetMoeForCausalLM"),
    ],
)
def test_a_class_of_another_name(model_type: str, named: str, served_by: str, tmp_path: Path) -> None:
    kept = {} if model_type == "internlm3" else {"num_local_experts": 2, "num_experts_per_tok": 1, "kv_channels": 12}
    config = AutoConfig.for_model(model_type, **SMALL | kept)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    change_config(tmp_path / "model", architectures=[named], auto_map={"AutoModelForCausalLM": "their.own"})
    result = compress(tmp_path / "model", tmp_path / "small")
    loaded = load_model(tmp_path / "small", load_config(tmp_path / "small"))
    assert type(loaded).__name__ == type(result.model).__name__ == served_by
    assert loaded.config.model_type == model_type
    torch.testing.assert_close(logits(loaded), logits(result.model))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", "someone/kernel"])
def test_an_attention_that_is_not_here_is_done_without(
    key: str, value: str, llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy(llama, tmp_path / "model")
    change_config(folder, **{key: value})
    model = load_model(folder, load_config(folder))
    assert [f"asks for the attention {value}" in record.message for record in caplog.records] == [True]
    torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(llama)))


def test_a_tokenizer_of_sentencepiece_names_what_to_install(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    folder = copy(llama, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(RankwiseError, match="pip install sentencepiece"):
        load_tokenizer(folder)


def test_a_name_on_the_hub_without_safetensors(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy(llama, tmp_path / "model")
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    cached(folder, tmp_path / "hub", "someone/old", monkeypatch)
    with pytest.raises(RankwiseError, match=r"someone/old: it has no weights in safetensors .*convert it"):
        load_model("someone/old", load_config("someone/old"))


def test_a_link_to_nothing_that_nobody_needs(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "model")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "README.md"):
        (folder / name).symlink_to("nowhere")
    assert compress(folder).ranks


def test_an_adapter_beside_the_weights_says_both_ways(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(RankwiseError, match=r"merge it .*, or remove adapter_config\.json where it is merged already"):
        load_config(folder)
