"""Numbers of few bits: how they are chosen, and that a folder of them is one like any other."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, build
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rankwise import Plan, RankwiseError, Recipe, bench, compress, decompose, densify, lora_targets, optimize, plan, refine
from rankwise.allocation.mixed import kl_of_errors
from rankwise.decomposition.rounding import roundings
from rankwise.layers.matrices import find_matrices
from rankwise.layers.quantised import WIDTHS, QuantisedLinear
from rankwise.reporting.inspect import inspect
from rankwise.targets import bytes_in_bits

WINDOWS = torch.randint(3, VOCABULARY, (12, 32), generator=torch.Generator().manual_seed(1))
IDS = torch.arange(3, 30)[None]
QUICK: dict[str, Any] = {"calibration": WINDOWS, "bits": "mixed", "options": {"points": 1, "tokens": 32}}


def drawn(*sides: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sides, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def in_three_bits(tmp_path: Path) -> Path:
    compress(build("llama-gqa-tied").to(torch.bfloat16), bits=3, calibration=WINDOWS, output=tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize(
    "told",
    [
        {"format_version": 6, "group": 64, "coding": "trellis"},
        {"format_version": 5, "group": 32},
        {"format_version": 3},
    ],
    ids=str,
)
def test_a_folder_that_says_it_is_of_another_format_is_refused(told: dict[str, Any], in_three_bits: Path) -> None:
    file = in_three_bits / "config.json"
    config = json.loads(file.read_text())
    held = config["quantization_config"]
    assert (held.pop("format_version"), held.pop("group"), held.pop("coding"), held.pop("sizes")) == (6, 32, "trellis", {})
    config["quantization_config"] = held | told
    file.write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError), match=r"mismatch|group is 64, not 32|scales have units"):
        AutoModelForCausalLM.from_pretrained(in_three_bits)


@pytest.mark.parametrize(("coding", "version"), [("floats", 3), ("grid", 5)])
def test_a_folder_of_an_earlier_format_loads_and_is_saved_as_it_was(
    coding: Any, version: int, in_three_bits: Path, tmp_path: Path
) -> None:
    """Before format 5 a scale of 64 numbers was in the model's dtype, and before format 6 no bits were on a trellis."""
    model = AutoModelForCausalLM.from_pretrained(in_three_bits)
    of_three = [(name, m) for name, m in model.named_modules() if type(m) is QuantisedLinear and m.bits == 3]
    assert of_three
    for name, layer in of_three:
        unit = layer.unit if coding == "grid" else None
        steps = layer.steps.repeat_interleave(2, 1)[:, : -(-layer.in_features // 32)] if coding == "grid" else layer.steps
        earlier = QuantisedLinear.of(layer.whole_numbers, steps, unit, layer.bits, layer.bias, coding)
        model.set_submodule(name, earlier)
    model.config.quantization_config.coding = coding
    shutil.copytree(in_three_bits, tmp_path / "earlier")
    model.save_pretrained(tmp_path / "earlier")
    config = json.loads((tmp_path / "earlier" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == version
    assert config.get("group") == (32 if version == 5 else None)
    assert "coding" not in config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "earlier")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    loaded.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "earlier" / file).read_bytes()
    original = build("llama-gqa-tied").to(torch.bfloat16)
    refined = refine(tmp_path / "earlier", original, refine="blocks passes=1", calibration=WINDOWS, output=tmp_path / "refined")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "refined")
    assert torch.equal(again(IDS).logits, refined.model(IDS).logits)
    densify(tmp_path / "earlier", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(dense(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(("bits", "version"), [(8, 3), (6, 5), (4, 5), (2, 6)])
def test_a_folder_is_of_the_first_format_that_can_tell(bits: int, version: int, tmp_path: Path) -> None:
    compress(build("llama-gqa-tied"), bits=bits, calibration=WINDOWS, output=tmp_path / "small")
    assert json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]["format_version"] == version


def test_a_measured_error_costs_what_was_measured() -> None:
    known, measured = np.array([1e-3, 1e-1]), np.array([2e-3, 5e-1])
    found = kl_of_errors(np.array([1e-1, 1e-3, 1e-2, 1e-5, 1e-4]), known, measured)
    assert found[:2] == pytest.approx([5e-1, 2e-3])
    assert found[3:] == pytest.approx([2e-5, 2e-4])  # below what is measured, in proportion
    assert np.all(np.diff(found[[3, 4, 1, 2, 0]]) > 0)


@pytest.fixture(scope="module", params=[("llama", torch.float32), ("llama-gqa-tied", torch.bfloat16)], ids=str)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Path]:
    """A folder of mixed bits, its result in memory, and the dense folder."""
    folder = tmp_path_factory.mktemp("bits")
    name, dtype = request.param
    model = build(name).to(dtype)
    model.save_pretrained(folder / "dense")
    dense = sum(file.stat().st_size for file in (folder / "dense").glob("*.safetensors"))
    return (
        folder / "small",
        compress(folder / "dense", target_bytes=int(0.45 * dense), output=folder / "small", **QUICK),
        folder / "dense",
    )


def test_the_folder_takes_what_was_asked_and_says_what_it_holds(made: tuple[Path, Any, Path]) -> None:
    folder, result, _ = made
    size = (folder / "model.safetensors").stat().st_size
    assert size <= result.recipe.target_bytes
    assert set(result.report["bits"].values()) <= set(WIDTHS)
    rows = {row["matrix"]: row for row in inspect(folder)}
    tables = {"model.embed_tokens": 8, "lm_head": 8}
    assert {name: row["bits"] for name, row in rows.items()} | tables == result.report["bits"]
    held = result.report["bytes"]["model"]["compressed"]
    tensors = {t.data_ptr(): t.nbytes for t in result.model.state_dict().values()}
    assert held == sum(tensors.values())


def test_the_folder_loads_as_it_was(made: tuple[Path, Any, Path], tmp_path: Path) -> None:
    folder, result, _ = made
    with torch.no_grad():
        wanted = result.model(IDS).logits
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(loaded(IDS).logits, wanted)
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(IDS).logits, wanted)
        assert torch.isfinite(loaded.to(torch.float16)(IDS).logits).all()
        assert loaded.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, IDS.shape[1] + 3)


def test_a_plan_holds_bits_and_makes_the_same_folder(made: tuple[Path, Any, Path], tmp_path: Path) -> None:
    folder, result, dense = made
    told = plan(dense, target_bytes=result.recipe.target_bytes, **QUICK)
    assert told.ranks == result.ranks
    assert told.bits == {name: bits for name, bits in result.report["bits"].items() if name in result.ranks}
    assert told.kl == result.report["kl"]
    told.save(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == told
    assert Plan.read(folder).bits == told.bits
    applied = compress(dense, plan=tmp_path / "plan.json", calibration=WINDOWS, output=tmp_path / "again")
    assert applied.report["kl"] == told.kl
    weights = [(place / "model.safetensors").read_bytes() for place in (folder, tmp_path / "again")]
    assert weights[0] == weights[1]
    assert Recipe.read(tmp_path / "again") == applied.recipe


def test_an_edited_plan_of_bits_is_applied_as_it_is(made: tuple[Path, Any, Path], tmp_path: Path) -> None:
    folder, _, dense = made
    before = Plan.read(folder)
    one, other, third = [name for name, rank in before.ranks.items() if rank is None and name in before.bits][:3]
    edited = before.edited({third: 5}, bits={one: 6 if before.bits[one] == 8 else 8, other: None})
    changes = str(edited - before)
    assert changes.startswith("3 matrices change")
    assert f"{before.bits[other]} bits -> stored" in changes
    assert "dense -> 5" in changes
    assert f"5, {before.bits[third]} bits" in str(edited)
    edited.save(tmp_path / "plan.json")
    applied = compress(dense, plan=tmp_path / "plan.json", calibration=WINDOWS, output=tmp_path / "small")
    assert {name: bits for name, bits in applied.report["bits"].items() if name in applied.ranks} == edited.bits
    assert applied.ranks == edited.ranks
    assert applied.model is not None
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        assert torch.equal(loaded(IDS).logits, applied.model(IDS).logits)


@pytest.mark.parametrize(
    ("bits", "options", "complaint"),
    [
        ({"model.layers.0.self_attn.q_proj": 7}, {}, "7 bits for 'model.layers.0.self_attn.q_proj'"),
        ({"lm_tail": 4}, {}, "bits for lm_tail, but no rank"),
        ([4], {}, "for bits"),
        ({}, {"memory": "4GB"}, "needs the whole model in memory"),
        ({}, {"decomposition": "svd"}, "second moment of the inputs"),
    ],
)
def test_what_contradicts_a_plan_of_bits_is_refused(
    bits: Any, options: dict[str, Any], complaint: str, made: tuple[Path, Any, Path], tmp_path: Path
) -> None:
    folder, _, dense = made
    Plan.read(folder).save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    content["bits"] = content["bits"] | bits if isinstance(bits, dict) else bits
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(RankwiseError, match=re.escape(complaint)):
        compress(dense, plan=tmp_path / "plan.json", calibration=WINDOWS, output=tmp_path / "small", **options)
    assert not (tmp_path / "small").exists()


def test_the_dense_copy_is_the_same_model(made: tuple[Path, Any, Path], tmp_path: Path) -> None:
    folder, result, original = made
    densify(folder, tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    tied = AutoModelForCausalLM.from_pretrained(original).config.tie_word_embeddings
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    assert {n: p.shape for n, p in plain.named_parameters()} == {
        n: p.shape for n, p in AutoModelForCausalLM.from_pretrained(original).named_parameters()
    }
    with torch.no_grad():
        before, after = result.model(IDS).logits, plain(IDS).logits
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[before.dtype]
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance)


def test_every_matrix_of_few_bits_is_guarded(made: tuple[Path, Any, Path]) -> None:
    folder, result, _ = made
    stored = load_file(folder / "model.safetensors")
    assert result.report["bits"]
    for name in result.report["bits"]:
        assert stored[f"{name}.weight"].numel() == 0


@pytest.mark.usefixtures("no_peaks", "fresh_compiler")
def test_what_a_loaded_model_goes_through(made: tuple[Path, Any, Path], tmp_path: Path) -> None:
    folder, result, original = made
    with torch.no_grad():
        wanted = result.model(IDS).logits
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(copy.deepcopy(loaded)(IDS).logits, wanted)
        assert torch.equal(torch.compile(loaded, fullgraph=True, backend="eager")(IDS).logits, wanted)
        on_cpu = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
        places = dict.fromkeys(on_cpu, "cpu") | {"model.layers.1": "disk"}
        offloaded = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offloaded")
        assert torch.equal(offloaded(IDS).logits, wanted)
    with pytest.raises(RankwiseError, match="rankwise densify"):
        lora_targets(loaded, "q_proj")
    measured = bench(folder, original, batches=[1], prompt=8, new_tokens=2, repeats=1)
    assert {row["ideal"] for row in measured["speed"]} == {1.0}
    assert measured["weight_bytes"]["compressed"] < 0.5 * measured["weight_bytes"]["reference"]


@pytest.mark.parametrize("bits", [[], {"model.layers.0.self_attn.q_proj": 7}, {"model.layers.0.self_attn.q_proj": "4"}])
def test_bits_that_there_are_not_are_refused(bits: Any, made: tuple[Path, Any, Path], tmp_path: Path) -> None:
    for file in made[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["bits"] = bits
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="bits is not an object of matrices and their bits"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_ranks_and_bits_are_both_chosen_where_both_pay(tmp_path: Path) -> None:
    """Matrices that are of low rank but for little are written so, though bits are at hand, and others in bits."""
    torch.manual_seed(0)
    model = build("llama")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head and "down" not in name:
            left, right = drawn(module.out_features, 2), drawn(2, module.in_features, seed=1)
            module.weight.data = 0.1 * left @ right + 1e-4 * module.weight.data
    dense = sum(p.nbytes for p in model.parameters())
    result = compress(model, target_bytes=int(0.2 * dense), output=tmp_path / "out", **QUICK)
    low = {name for name, rank in result.ranks.items() if rank is not None}
    assert 0 < len(low) < len(result.ranks)
    assert result.report["kl"] < 1e-3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, result.model(IDS).logits)  # type: ignore[misc]


def test_bits_are_chosen_from_the_moments_of_what_was_decomposed(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "dense")
    decompose(tmp_path / "dense", calibration=WINDOWS, output=tmp_path / "decomposed")
    asked = {name: value for name, value in QUICK.items() if name != "calibration"} | {"target_bytes": 2 * model.num_parameters()}
    in_memory = compress(tmp_path / "decomposed", **asked)
    saved = compress(tmp_path / "decomposed", output=tmp_path / "out", **asked)
    assert saved.report["bits"] == in_memory.report["bits"]
    assert saved.report["kl"] == in_memory.report["kl"]


def test_ranks_stand_beside_bits_only_where_that_is_measured_to_be_better() -> None:
    """The plan with the least KL on the selection text is the one that is kept."""
    for part in 0.2, 0.26, 0.4:
        model = build("llama")
        dense = sum(parameter.nbytes for parameter in model.parameters())
        result = compress(model, target_bytes=int(part * dense), **QUICK)
        kls = {record["step"]: record["kl"] for record in result.report["history"]}
        others = [kls.get(plan, torch.inf) for plan in ("bits alone", "the same bits everywhere")]
        assert any(result.ranks.values()) <= (kls["bits or ranks"] < min(others))


def test_bits_are_the_same_everywhere_where_choosing_them_is_measured_to_be_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """What every matrix alone costs may mislead: prices upside down lose to no choice at all."""
    monkeypatch.setattr("rankwise.allocation.mixed.kl_of_errors", lambda errors, *_: 1 / (1 + errors))
    model = build("llama")
    everywhere = bytes_in_bits(model, find_matrices(model)[0], 4)
    result = compress(model, target_bytes=everywhere, **QUICK)
    kls = {record["step"]: record["kl"] for record in result.report["history"]}
    assert kls["the same bits everywhere"] < kls["bits or ranks"]
    assert {result.report["bits"][name] for name in result.ranks} == {4}
    assert result.report["bytes"]["model"]["compressed"] <= everywhere


def test_a_mixture_of_experts_and_a_transposed_layer(tmp_path: Path) -> None:
    for name in ("mixtral", "gpt2"):
        model = build(name)
        target = int(0.5 * sum(p.nbytes for p in model.parameters()))
        result = compress(model, target_bytes=target, output=tmp_path / name, **QUICK)
        with torch.no_grad():
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
            assert torch.equal(loaded(IDS).logits, result.model(IDS).logits)  # type: ignore[misc]
            densify(tmp_path / name, tmp_path / f"{name}-dense")
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-dense")
            torch.testing.assert_close(plain(IDS).logits, loaded(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--rate", "0.5"], "bits=mixed spends bytes"),
        (["--target-bytes", "150kB", "--allocation", "llrc"], "no ranks are chosen"),
        (["--target-bytes", "150kB", "--memory", "4GB"], "needs the whole model in memory"),
        (["--target-bytes", "150kB", "--keep", "*.q_proj=0.5"], "remove keep"),
        (["--target-bytes", "150kB", "--decomposition", "svd"], "second moment of the inputs"),
        (["--target-bytes", "150kB", "--decomposition", "activation"], "second moment of the inputs"),
        (["--target-bytes", "1kB"], "cannot be reached"),
        (["--target-bytes", "1GB"], "takes only"),
    ],
)
def test_bad_requests(
    options: list[str], complaint: str, rankwise: Callable[..., Any], llama: Path, story: Path, tmp_path: Path
) -> None:
    fixed = ["--bits", "mixed", "--calibration", story, "--length", 32, "-o", tmp_path / "out"]
    ended = rankwise("compress", llama, *fixed, *options)
    assert ended.code == 2
    assert complaint in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2", "mixtral"])
def test_the_same_bits_everywhere(name: str, bits: int, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "dense")
    asked: dict[str, Any] = {"calibration": WINDOWS, "bits": bits, "output": tmp_path / "small"}
    result = compress(tmp_path / "dense", **asked)
    assert set(result.ranks.values()) == {None}
    assert {result.report["bits"][name] for name in result.ranks} == {bits}
    assert result.recipe.rate is None
    card = (tmp_path / "small" / "README.md").read_text()
    assert "low" not in card
    assert f"{bits} bits for every matrix" in card
    compress(tmp_path / "dense", plan=tmp_path / "small", calibration=WINDOWS, output=tmp_path / "planned")
    assert (tmp_path / "planned" / "model.safetensors").read_bytes() == (tmp_path / "small" / "model.safetensors").read_bytes()
    assert Recipe.read(tmp_path / "small") == result.recipe
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert result.model is not None
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, result.model(IDS).logits)
    assert 0 < result.report["kl"] < {4: 0.5, 8: 1e-2}[bits]


def test_rounding_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama").save_pretrained(tmp_path / "dense")
    asked: dict[str, Any] = {"calibration": WINDOWS, "bits": 4}
    found: list[int] = []

    def counted(*given: Any) -> Any:
        if len(found) == 5:
            raise KeyboardInterrupt
        found.append(1)
        return roundings(*given)

    with monkeypatch.context() as interrupted:
        interrupted.setattr("rankwise.few_bits.roundings", counted)
        with pytest.raises(KeyboardInterrupt):
            compress(tmp_path / "dense", output=tmp_path / "small", **asked)
    again: list[int] = []
    monkeypatch.setattr("rankwise.few_bits.roundings", lambda *given: (again.append(1), roundings(*given))[1])
    resumed = compress(tmp_path / "dense", output=tmp_path / "small", resume=True, **asked)
    assert len(again) == len(resumed.ranks) - 5


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--rate", "0.5"], "bits=4 and rate are two targets"),
        (["--target-bytes", "150kB"], "bits=4 and target_bytes are two targets.*bits=mixed"),
        (["--allocation", "llrc"], "no ranks are chosen"),
        (["--memory", "4GB"], "needs the whole model in memory"),
        (["--decomposition", "svd"], "second moment of the inputs"),
    ],
)
def test_bad_requests_beside_the_same_bits(
    options: list[str], complaint: str, rankwise: Callable[..., Any], llama: Path, story: Path, tmp_path: Path
) -> None:
    ended = rankwise("compress", llama, "--bits", "4", "--calibration", story, "--length", 32, "-o", tmp_path / "out", *options)
    assert ended.code == 2
    assert re.search(complaint, ended.err)
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


def test_the_allocation_stands_beside_no_other() -> None:
    with pytest.raises(RankwiseError, match="no ranks are chosen"):
        compress(build("llama"), 0.3, calibration=WINDOWS, allocation="mixed")


def test_an_optimized_folder_is_the_same_model(made: tuple[Path, Any, Path], tmp_path: Path) -> None:
    folder, result, _ = made
    with torch.no_grad():
        fast = optimize(AutoModelForCausalLM.from_pretrained(folder))
        wanted = result.model(IDS).logits
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[wanted.dtype]
        torch.testing.assert_close(fast(IDS).logits, wanted, rtol=tolerance, atol=tolerance)
        fast.save_pretrained(tmp_path / "again")
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(IDS).logits, wanted)
