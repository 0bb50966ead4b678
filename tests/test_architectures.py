"""Every architecture: what was compressed in memory is what is loaded from disk, what is factorised at full rank is what was
there, and nobody runs a compressed folder without rankwise by mistake."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, CAUSAL, OF_THEIR_OWN, VOCABULARY, build
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankwise import Compressed, RankwiseError, compress, densify
from rankwise.calibration.batches import batches_of
from rankwise.calibration.moments import collect
from rankwise.calibration.signal import values_of
from rankwise.decomposition.metric import METRICS
from rankwise.decomposition.solver import decompose
from rankwise.layers.linear import bias_of, swapped, weight_of
from rankwise.layers.lowrank import LowRankLinear, PairLinear
from rankwise.layers.matrices import find_matrices, unstack_experts

RATE = 0.3
WINDOWS = torch.randint(3, VOCABULARY, (12, 32), generator=torch.Generator().manual_seed(1))
GENERATING = [name for name, (auto, _, _) in ARCHITECTURES.items() if auto in (CAUSAL, "AutoModelForSeq2SeqLM")]
DRAWN = {"mixtral", "t5", "bert"}  # experts, an encoder with a decoder, no logits
LLRC = {"llama-gqa-tied", "gpt2", "mixtral", "bert", "t5"}  # the others are compressed the fast way
FAST = {"allocation": "uniform", "decomposition": "whitened"}
LEARNED = {"allocation": "llrc", "options": {"points": 0, "rounds": 1, "value_steps": 2}}

every = pytest.mark.parametrize("name", ARCHITECTURES)


@functools.cache
def compressed(name: str, rate: float = RATE, **options: Any) -> Compressed:
    """Shared by the tests, which leave the model as it is."""
    options = options or (LEARNED if name in LLRC else FAST)
    return compress(build(name), rate, calibration=WINDOWS, **options)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return values_of(model, batches_of(model, WINDOWS[:2])[0])[0]


def load(folder: Path) -> PreTrainedModel:
    """As a user would, with the class that the config names; the tensors where allocated ones are, as the last bit of a product
    of odd sizes tells how its factors lie in a file."""
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    model, info = cls.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), {kind: keys for kind, keys in info.items() if keys}
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


@every
def test_loaded_is_what_was_saved(name: str, tmp_path: Path) -> None:
    result = compressed(name)
    expected = logits(result.model)
    result.save(tmp_path / "first")
    loaded = load(tmp_path / "first")
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "second", max_shard_size="20KB")
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "second")), expected)


@pytest.mark.page
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in DRAWN else pytest.mark.slow) for n in ARCHITECTURES])
def test_the_page_has_every_matrix(name: str, tmp_path: Path) -> None:
    result = compress(build(name), RATE, calibration=WINDOWS, **FAST)
    result.save(tmp_path / "folder")
    page = (tmp_path / "folder" / "report.html").read_text()
    assert all(matrix in page for matrix in result.ranks)
    assert result.report["costs"]["kl"].keys() == {matrix for matrix, rank in result.ranks.items() if rank is not None}


@pytest.mark.parametrize("name", OF_THEIR_OWN)
def test_weights_stored_filled_or_run_in_another_way(name: str, tmp_path: Path) -> None:
    dense = build(name)
    shapes = {n: p.shape for n, p in dense.named_parameters()}
    model = compress(dense, RATE, calibration=WINDOWS, **FAST).model
    expected = logits(model)
    model.save_pretrained(tmp_path / "first")
    loaded = load(tmp_path / "first")
    torch.testing.assert_close(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "second")
    torch.testing.assert_close(logits(load(tmp_path / "second")), expected)
    loaded.dequantize().save_pretrained(tmp_path / "dense")
    plain = load(tmp_path / "dense")
    assert {n: p.shape for n, p in plain.named_parameters()} == shapes
    torch.testing.assert_close(logits(plain), expected, rtol=1e-3, atol=1e-4)


def test_a_model_that_reads_its_layers_weights_reads_them_in_the_same_way(tmp_path: Path) -> None:
    """Falcon-Mamba adds a bias and takes it off again where it is told that it is quantized, which loses bits."""
    model = compress(build("falcon-mamba").bfloat16(), RATE, calibration=WINDOWS, **FAST).model
    model.save_pretrained(tmp_path)
    expected = logits(model)
    assert (logits(load(tmp_path)) - expected).abs().max() < 1e-3 * expected.std()


@pytest.mark.parametrize("name", GENERATING)
def test_generates_with_a_cache(name: str, tmp_path: Path) -> None:
    result = compressed(name)
    result.save(tmp_path / "folder")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    prompt = {"inputs": WINDOWS[:2, :12], "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    expected = result.model.generate(**prompt, **options)
    assert torch.equal(load(tmp_path / "folder").generate(**prompt, **options), expected)
    assert torch.equal(result.model.generate(**prompt, **options, use_cache=False), expected)


@every
def test_budget_is_met_and_everything_accounted_for(name: str) -> None:
    dense = build(name)
    unstack_experts(dense)
    linear = {n for n, module in dense.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    result = compressed(name)
    report = result.report
    counts = report["parameters"]["linear"]
    largest = max(out + inp for out, inp in (weight_of(dense.get_submodule(n)).shape for n in result.ranks))
    allowed = round((1 - RATE) * counts["reference"], 6)
    assert allowed - max(0.002 * allowed, largest) <= counts["compressed"] <= allowed
    assert report["parameters"]["model"] == {
        "reference": dense.num_parameters(),
        "compressed": result.model.num_parameters(),
    }
    held = [*result.model.parameters(), *(b for name, b in result.model.named_buffers() if name.endswith(".order"))]
    assert report["bytes"]["model"]["compressed"] == sum(tensor.nbytes for tensor in held)
    places = {n: dense.get_submodule(n.rpartition(".")[0]) for n, p in dense.named_parameters() if p.squeeze().ndim > 1}
    others = {n for n, module in places.items() if not isinstance(module, nn.Linear | Conv1D | nn.Embedding)}
    assert linear | others == result.ranks.keys() | report["left_dense"].keys()
    assert not result.ranks.keys() & report["left_dense"].keys()
    assert all(report["left_dense"].values())


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        pytest.param(name, metric, marks=() if name in LLRC or metric == "kronecker" else pytest.mark.slow)
        for name in ARCHITECTURES
        for metric in METRICS
    ],
)
def test_full_length_factors_are_the_dense_model(name: str, metric: str) -> None:
    model = build(name)
    expected = logits(model)
    unstack_experts(model)
    shapes, _ = find_matrices(model)
    needs = METRICS[metric].NEEDS
    statistics = collect(model, shapes, batches_of(model, WINDOWS), needs)
    layers = {}
    for matrix in shapes:
        if not statistics.of(matrix).holds(needs):
            continue  # BERT's pooler, which the last hidden state does not depend on
        module = model.get_submodule(matrix)
        d = decompose(weight_of(module), *METRICS[metric].roots(statistics.of(matrix))).to(dtype=torch.float32)
        layers[matrix] = PairLinear.from_factors(d.second, d.first, bias_of(module))
    with swapped(model, layers):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=2e-5)


@every
def test_a_rate_below_one_parameter_changes_nothing(name: str, tmp_path: Path) -> None:
    expected = logits(build(name))
    result = compressed(name, rate=1e-9, **FAST)
    assert set(result.ranks.values()) == {None}
    assert torch.equal(logits(result.model), expected)
    result.save(tmp_path / "folder")
    assert torch.equal(logits(load(tmp_path / "folder")), expected)


WITHOUT_RANKWISE = """
import sys, torch, transformers
from pathlib import Path
torch.set_num_threads(1)
folder, names = Path(sys.argv[1]), sys.argv[2].split()
windows, logits = torch.load(folder / "windows"), {}
for path in sorted((folder / "small").iterdir()):
    config = transformers.AutoConfig.from_pretrained(path)
    try:
        getattr(transformers, config.architectures[0]).from_pretrained(path)
    except RuntimeError as error:
        assert "mismatch" in str(error).lower(), error
    else:
        print(path)
for name in names:
    path = folder / "dense" / name
    config = transformers.AutoConfig.from_pretrained(path)
    assert not hasattr(config, "quantization_config"), name
    model, info = getattr(transformers, config.architectures[0]).from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), (name, info)
    sides = ["input_ids", "decoder_input_ids"] if config.is_encoder_decoder else ["input_ids"]
    with torch.no_grad():
        output = model(**dict.fromkeys(sides, windows))
    logits[name] = output["logits" if "logits" in output else "last_hidden_state"]
assert "rankwise" not in sys.modules
torch.save(logits, folder / "logits")
"""


def test_without_rankwise_a_compressed_folder_does_not_load(tmp_path: Path) -> None:
    """And a densified one does, to the same model."""
    cases: dict[str, Iterable[str]] = {"llama": (), "mixtral": ["*experts*"], "qwen3-moe": (), "gpt-oss": ["*experts*"]}
    cases |= {"gpt2": (), "t5": (), "bert": ["*.query"], "nomic-bert": ["*.q_proj"], "dbrx": ["*experts*"]}
    for name, include in cases.items():
        compressed(name, **FAST, include=tuple(include)).model.save_pretrained(tmp_path / "small" / name)
    with_fewer_neurons_alone(tmp_path / "small" / "narrow")
    expected = {}
    for name in ARCHITECTURES:
        result = compressed(name)
        result.save(tmp_path / name)
        densify(tmp_path / name, tmp_path / "dense" / name)
        expected[name] = logits(result.model)
    torch.save(WINDOWS[:2], tmp_path / "windows")
    script = [sys.executable, "-c", WITHOUT_RANKWISE, tmp_path, " ".join(ARCHITECTURES)]
    process = subprocess.run(script, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "", "loaded as a model with random weights"
    for name, got in torch.load(tmp_path / "logits").items():
        torch.testing.assert_close(got, expected[name], rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def with_fewer_neurons_alone(folder: Path) -> None:
    """A folder in which nothing is of low rank, of a Llama every other neuron of which is hardly heeded."""
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] *= 0.01
    keep = {"*attn*": 1.0}
    result = compress(model, 0.1, calibration=WINDOWS, allocation="mask-fisher", neurons="fewer", keep=keep, output=folder)
    assert result.report["narrowed"]
    assert not any(result.ranks.values())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "bfloat16") for name in ("llama", "gpt2", "gemma3", "mixtral", "gpt-oss", "t5", "bert-mlm")),
        *((name, "float16") for name in ("llama", "gpt-oss", "t5")),
        *(pytest.param(name, "float16", marks=pytest.mark.slow) for name in ("gpt2", "gemma3", "mixtral", "bert-mlm")),
    ],
)
def test_half_precision(name: str, dtype: str, tmp_path: Path) -> None:
    """Of models from disk: transformers keeps parts of some (T5, gpt-oss) in float32 when it loads them as float16."""
    build(name).save_pretrained(tmp_path / "dense")
    result = compress(tmp_path / "dense", RATE, calibration=WINDOWS, dtype=dtype, **FAST)
    result.save(tmp_path / "folder")
    loaded = load(tmp_path / "folder")
    assert getattr(torch, dtype) in {p.dtype for p in loaded.parameters()}
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in result.model.named_parameters()}
    assert torch.equal(logits(loaded), logits(result.model))


def test_batches_with_labels() -> None:
    """As an encoder-decoder's data collator makes them."""
    batches = [{"input_ids": w[None], "labels": w[None, :20].clone()} for w in WINDOWS]
    for batch in batches:
        batch["labels"][:, 16:] = -100
    report = compress(build("t5"), RATE, calibration=batches, **FAST).report
    assert (report["windows"], report["tokens"]) == (2, 2 * 15)  # 16 inputs, of which the last predicts nothing
    with pytest.raises(RankwiseError, match="decoder_input_ids"):
        compress(build("t5"), RATE, calibration=[{"input_ids": WINDOWS}], **FAST)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_experts_left_dense_stay_stacked(name: str, tmp_path: Path) -> None:
    """Other software knows the stacked form only."""
    stacked = {n for n, p in build(name).named_parameters() if p.ndim == 3}
    result = compressed(name, **FAST, include=("*self_attn*",))
    assert stacked <= {n for n, _ in result.model.named_parameters()}
    assert result.model.config.quantization_config.experts == []
    result.save(tmp_path / "folder")
    assert torch.equal(logits(load(tmp_path / "folder")), logits(result.model))


def test_a_refused_model_is_left_as_it_was() -> None:
    model = build("mixtral")
    before = {n: p.shape for n, p in model.named_parameters()}
    for wrong in ({"rate": 0.9999}, {"include": ("nothing*",)}, {"calibration": torch.zeros(3)}, {"calibration": []}):
        with pytest.raises(RankwiseError):
            compress(model, **{"rate": RATE, "calibration": WINDOWS, **FAST, **wrong})
        assert {n: p.shape for n, p in model.named_parameters()} == before


def test_an_untied_head_is_compressed_when_named(tmp_path: Path) -> None:
    result = compressed("llama", **FAST, include=("lm_head", "*"))
    assert isinstance(result.model.lm_head, LowRankLinear)
    result.save(tmp_path / "folder")
    assert torch.equal(logits(load(tmp_path / "folder")), logits(result.model))


def test_a_tied_head_stays_dense(tmp_path: Path) -> None:
    result = compressed("llama-gqa-tied", **FAST, include=("lm_head", "*"))
    assert "tied" in result.report["left_dense"]["lm_head"]
    result.save(tmp_path / "folder")
    loaded = load(tmp_path / "folder")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with pytest.raises(RankwiseError, match="lm_head: its weight is tied"):
        compressed("llama-gqa-tied", **FAST, include=("lm_head",))


@pytest.mark.parametrize(
    ("name", "side"),
    [
        *(("llama", "left"), ("llama", "right"), ("gpt2", "left"), ("bert-mlm", "right"), ("bert", "left")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("gpt2", "right"), ("bert-mlm", "left"), ("bert", "right"))),
    ],
)
def test_padding_counts_for_nothing(name: str, side: str) -> None:
    """The user's own batches: padded sequences give what the same sequences give one by one."""
    lengths = [9, 17, 24, 32] * 3
    alone = [{"input_ids": w[None, :n], "attention_mask": torch.ones(1, n)} for w, n in zip(WINDOWS, lengths, strict=True)]
    padded = []
    for window, n in zip(WINDOWS, lengths, strict=True):
        ids, mask = torch.zeros(1, 32, dtype=torch.long), torch.zeros(1, 32)
        at = slice(32 - n, None) if side == "left" else slice(n)
        ids[:, at], mask[:, at] = window[:n], 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0).long()
        padded.append({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    one, other = (compress(build(name), RATE, calibration=batches, **FAST) for batches in (alone, padded))
    torch.testing.assert_close(logits(other.model), logits(one.model), rtol=1e-2, atol=1e-3)
    for key in ("kl", "tokens", "perplexity", "reference_perplexity"):
        assert other.report[key] == (one.report[key] and pytest.approx(one.report[key], rel=1e-3)), key


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2", "mixtral", "t5"])
def test_affine_factors_are_saved_loaded_and_paid_for(name: str, tmp_path: Path) -> None:
    result = compressed(name, allocation="uniform", decomposition="centred")
    expected = logits(result.model)
    result.save(tmp_path / "affine")
    loaded = load(tmp_path / "affine")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)  # adding a bias rounds as its memory lies
    assert loaded.num_parameters() == result.report["parameters"]["model"]["compressed"]
    assert result.report["achieved_rate"]["linear"] >= RATE
    if name == "gpt2":  # its layers have biases of their own
        torch.testing.assert_close(logits(loaded.dequantize()), expected, rtol=1e-3, atol=1e-4)
    else:
        with pytest.raises(RankwiseError, match="no bias there"):
            loaded.dequantize()
