"""MLPs with fewer hidden neurons: which go, what is made of the others, and a folder that loads like any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_targets import table
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import rankwise
from rankwise import RankwiseError, bundled, compress, densify, evaluate, explore, refine, slicing, stages, streaming, targets
from rankwise.contest import hold_contest
from rankwise.decomposition.slicing import refit, sizes_of, slices_of
from rankwise.decomposition.solver import Root
from rankwise.layers.linear import weight_of
from rankwise.layers.matrices import Shape, find_matrices, stack_experts, unstack_experts
from rankwise.layers.neurons import Mlp, find_mlps
from rankwise.reporting.inspect import inspect
from rankwise.runtime.bench import ideal_speedup
from rankwise.runtime.latency import Latency

WINDOWS = torch.randint(3, 90, (60, 16), generator=torch.Generator().manual_seed(0))
FEWER: dict[str, Any] = {"calibration": WINDOWS, "allocation": "mask-fisher", "neurons": "fewer", "rate": 0.4}


def found_in(model: Any) -> list[Mlp]:
    """The MLPs of a model whose experts are unstacked."""
    ids = torch.arange(3, 35).view(2, 16)

    def answer() -> Tensor:
        more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        return model(input_ids=ids, **more)[0]

    return find_mlps(model, find_matrices(model)[0], lambda _: nullcontext(answer))


def lazy(name: str, heed: float = 0.01, **options: Any) -> Any:
    """The architecture with MLPs every other neuron of which is hardly heeded."""
    model = build(name, **options)
    experts = unstack_experts(model)
    with torch.no_grad():
        for mlp in found_in(model):
            weight_of(model.get_submodule(mlp.down))[:, ::2] *= heed
    stack_experts(model, experts)
    return model


@pytest.mark.parametrize(
    ("name", "number", "down", "inner", "layout"),
    [
        ("llama", 2, "model.layers.1.mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj"), "rows"),
        ("gpt2", 2, "transformer.h.1.mlp.c_proj", ("mlp.c_fc",), "rows"),
        ("opt", 2, "model.decoder.layers.1.fc2", ("fc1",), "rows"),
        ("phi3", 2, "model.layers.1.mlp.down_proj", ("mlp.gate_up_proj",), "halves"),
        ("falcon", 2, "transformer.h.1.mlp.dense_4h_to_h", ("mlp.dense_h_to_4h",), "rows"),
        ("mixtral", 8, "model.layers.1.mlp.experts.down_matrices.3", ("mlp.experts.gate_up_matrices.3",), "halves"),
        ("gpt-oss", 8, "model.layers.1.mlp.experts.down_matrices.3", ("mlp.experts.gate_up_matrices.3",), "pairs"),
        ("t5", 4, "decoder.block.1.layer.2.DenseReluDense.wo", ("DenseReluDense.wi_0", "DenseReluDense.wi_1"), "rows"),
        ("bert", 2, "", (), ""),  # its two matrices stand in modules of their own
    ],
)
def test_the_mlps_of_a_model(name: str, number: int, down: str, inner: tuple[str, ...], layout: str) -> None:
    model = build(name)
    unstack_experts(model)
    found = {mlp.down: (mlp.inner, mlp.layout) for mlp in found_in(model)}
    if not down:
        assert not found
        return
    assert len(found) == number
    assert all(path.endswith(end) for path, end in zip(found[down][0], inner, strict=True))
    assert found[down][1] == layout


def problem(outputs: int, width: int, tokens: int, seed: int) -> tuple[Tensor, Root, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    W, X, g = (torch.randn(*size, generator=draw).double() for size in ((outputs, width), (tokens, width), (9, outputs)))
    return W, Root.of(g.T @ g, 0.1, 9), X.T @ X + 0.01 * torch.eye(width).double()


@given(st.integers(2, 9), st.integers(9, 40), st.integers(4, 60), st.integers(0, 10**6), st.sampled_from([1, 4]))
@settings(deadline=None)
def test_errors_are_those_of_the_best_weight(outputs: int, width: int, tokens: int, seed: int, multiple: int) -> None:
    W, left, C = problem(outputs, width, tokens, seed)
    found = slices_of(W, left, C, multiple)
    assert sorted(found.order.tolist()) == list(range(width))
    assert found.sizes.tolist() == sizes_of(width, multiple)
    L = torch.linalg.cholesky(C)
    for size, error in zip(found.sizes.tolist(), found.errors.tolist(), strict=True):
        kept = found.kept(size)
        best = torch.linalg.lstsq(L[kept].T, (W @ L).T).solution.T  # || W L - W' L[S] ||
        torch.testing.assert_close(refit(W, C, kept), best, rtol=1e-6, atol=1e-8)
        other = W.clone().zero_()
        other[:, kept] = best
        least = left.apply((W - other) @ L).square().sum().item()
        assert error == pytest.approx(least, rel=1e-6, abs=1e-9)


def test_what_nobody_heeds_goes_first() -> None:
    W, left, C = problem(8, 64, 300, 0)
    W[:, 5:20] = 0
    assert set(slices_of(W, left, C).order[:15].tolist()) == set(range(5, 20))


def test_neurons_that_say_the_same_are_not_both_kept() -> None:
    W, left, _ = problem(8, 32, 300, 1)
    X = torch.randn(400, 16, generator=torch.Generator().manual_seed(2)).double()
    doubled = torch.cat([X, 2 * X], 1)
    found = slices_of(W, left, doubled.T @ doubled + 1e-9 * torch.eye(32).double())
    assert found.errors[found.sizes.tolist().index(16)] < 1e-6 * found.errors[-1]


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "phi3", "mixtral", "gpt-oss", "t5", pytest.param("opt", marks=pytest.mark.slow)]
)
def test_a_folder_loads_to_the_bit_and_is_as_large_as_said(name: str, tmp_path: Path) -> None:
    model = lazy(name)
    model.save_pretrained(tmp_path / "model")
    result = compress(tmp_path / "model", output=tmp_path / "small", **FEWER)
    narrowed, report = result.report["narrowed"], result.report
    assert narrowed
    assert report["achieved_rate"]["linear"] >= 0.4
    auto: Any = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "small")
    for key, tensor in result.model.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert loaded.num_parameters() == report["parameters"]["model"]["compressed"]
    held = {row["matrix"]: row["parameters"] for row in inspect(tmp_path / "small")}
    assert sum(held.values()) == report["parameters"]["linear"]["compressed"]
    assert all(report["neurons"][down][0] == narrowed[down][1] < report["shapes"][down][1] for down in report["neurons"])
    densify(tmp_path / "small", tmp_path / "dense")
    dense = auto.from_pretrained(tmp_path / "dense")
    more = {"decoder_input_ids": WINDOWS[:2]} if name == "t5" else {}
    torch.testing.assert_close(dense(WINDOWS[:2], **more).logits, loaded(WINDOWS[:2], **more).logits, rtol=1e-3, atol=1e-3)
    assert dense.num_parameters() == model.num_parameters()


@pytest.fixture
def run(rankwise: Callable[..., Any]) -> Callable[..., Any]:
    """The command line."""
    return rankwise


@pytest.fixture(scope="module")
def lazy_llama(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, every other neuron of which is hardly heeded."""
    folder = Path(shutil.copytree(llama, tmp_path_factory.mktemp("lazy") / "llama"))
    lazy("llama", 0.3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def narrow(lazy_llama: Path, story: Path) -> Path:
    """A tiny Llama with fewer neurons."""
    folder = lazy_llama.with_name("narrow-llama")
    compress(lazy_llama, output=folder, **FEWER | {"calibration": story, "length": 32, "samples": 40})
    return folder


def test_the_format_is_one_that_an_older_version_does_not_read(narrow: Path) -> None:
    assert json.loads((narrow / "config.json").read_text())["quantization_config"]["format_version"] == 4


@pytest.mark.parametrize(
    "sizes",
    [
        [1, 2, 3],
        {"model.layers.0.mlp.down_proj": [48, 1]},
        {"model.layers.0.mlp.down_proj": [48, 0, 1]},
        {"model.layers.0.mlp.down_proj": [48, 65, 1]},
        {"model.layers.0.mlp.down_proj": [48, "32", 1]},
        {"model.layers.0.input_layernorm": [8, 8, 1]},
        {"model.layers.9.mlp.down_proj": [48, 32, 1]},
    ],
)
def test_sizes_that_are_none_are_refused(sizes: Any, narrow: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(narrow, tmp_path / "narrow"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["sizes"] = sizes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RankwiseError)):
        AutoModelForCausalLM.from_pretrained(folder)


def test_it_is_judged_timed_and_refined_like_any_other(narrow: Path, lazy_llama: Path, story: Path, tmp_path: Path) -> None:
    judged = evaluate(narrow, lazy_llama, str(story), samples=4, length=32)
    report = json.loads((narrow / "report.json").read_text())
    assert judged["parameters"] == report["parameters"]
    assert judged["bytes"] == report["bytes"]
    numbers = report["parameters"]["linear"]
    head = AutoModelForCausalLM.from_pretrained(lazy_llama).lm_head.weight.numel()
    ideal = ideal_speedup(AutoModelForCausalLM.from_pretrained(narrow))
    assert ideal["decode"] == pytest.approx((numbers["reference"] + head) / (numbers["compressed"] + head), rel=0.02)
    for how in ("distil passes=4", "blocks passes=6"):
        better = refine(narrow, lazy_llama, refine=how, calibration=story, output=tmp_path / how, samples=200, length=16).report
        assert better["kl"] < better["before_refinement"]["kl"]
        sizes = json.loads((tmp_path / how / "config.json").read_text())["quantization_config"]["sizes"]
        assert sizes == json.loads((narrow / "config.json").read_text())["quantization_config"]["sizes"]


@pytest.mark.parametrize("how", ["distil passes=4", "blocks passes=6"])
def test_refined_in_the_same_run(how: str, lazy_llama: Path, story: Path) -> None:
    report = compress(
        lazy_llama, **FEWER | {"calibration": story, "length": 16, "samples": 200, "refine": how, "rate": 0.5}
    ).report
    assert report["narrowed"]
    assert report["kl"] < report["before_refinement"]["kl"]


def test_a_killed_run_goes_on_to_the_same_bytes(
    lazy_llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = FEWER | {"calibration": story, "length": 32, "samples": 40}
    compress(lazy_llama, output=tmp_path / "whole", **options)
    measure = stages.measure

    def killed(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        compress(lazy_llama, output=tmp_path / "resumed", **options)
    monkeypatch.setattr(stages, "measure", measure)
    compress(lazy_llama, output=tmp_path / "resumed", resume=True, **options)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert one == other


@pytest.mark.parametrize(
    ("name", "allocation", "dtype"),
    [
        ("llama-gqa-tied", "kl-knapsack", torch.float32),
        ("gpt2", "mask-fisher", torch.float32),
        ("phi3", "uniform", torch.bfloat16),
        ("mixtral", "mask-fisher", torch.float32),
    ],
)
def test_block_by_block_it_is_the_same(name: str, allocation: str, dtype: torch.dtype, tmp_path: Path) -> None:
    lazy(name).to(dtype).save_pretrained(tmp_path / "model")
    reports = []
    for memory in (None, "8GB"):
        options = FEWER | {"allocation": allocation, "memory": memory, "output": tmp_path / f"{memory}"}
        reports.append(compress(tmp_path / "model", **options).report)
    whole, streamed = reports
    assert whole["narrowed"]
    for field in ("narrowed", "neurons", "ranks", "shapes", "parameters", "bytes"):
        assert whole[field] == streamed[field], field
    assert streamed["kl"] == pytest.approx(whole["kl"], rel=1e-3)
    configs = [json.loads((tmp_path / f"{memory}" / "config.json").read_text()) for memory in (None, "8GB")]
    assert configs[0] == configs[1]
    one, other = (load_file(tmp_path / f"{memory}" / "model.safetensors") for memory in (None, "8GB"))
    for tensor, expected in one.items():
        torch.testing.assert_close(other[tensor], expected, rtol=1e-2, atol=1e-4, msg=tensor)


def test_block_by_block_it_is_planned_refined_and_gone_on_with(
    lazy_llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = FEWER | {"calibration": story, "length": 16, "samples": 200, "memory": "8GB", "refine": "blocks passes=6"}
    measure = streaming.measure

    def killed(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        compress(lazy_llama, output=tmp_path / "small", **options)
    monkeypatch.setattr(streaming, "measure", measure)
    monkeypatch.setattr(slicing, "slices_of", lambda *_: pytest.fail("neurons were put in order again"))
    full = shutil.disk_usage(tmp_path)._replace(free=0)  # by what the run has written itself
    monkeypatch.setattr("rankwise.streaming.memory.disk_usage", lambda _: full)
    report = compress(lazy_llama, output=tmp_path / "small", resume=True, **options).report
    assert report["narrowed"]
    assert report["kl"] < report["before_refinement"]["kl"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small") is not None
    monkeypatch.undo()
    plan = rankwise.Plan.read(tmp_path / "small")
    applied = compress(lazy_llama, plan=plan, calibration=story, output=tmp_path / "again", memory="8GB").report
    assert applied["neurons"] == report["neurons"]
    assert applied["parameters"] == report["parameters"]
    plan = replace(plan, kept_neurons={"lm_head": 3})
    with pytest.raises(RankwiseError, match="last matrix of none"):
        compress(lazy_llama, plan=plan, calibration=story, output=tmp_path / "other", memory="8GB")


def test_block_by_block_without_room_all_stay(
    lazy_llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr("rankwise.streaming.memory.disk_usage", lambda _: free)
    asked: dict[str, Any] = {"calibration": story, "length": 16, "samples": 40, "memory": "8GB", "output": tmp_path / "small"}
    with pytest.raises(RankwiseError, match=r"fewer neurons need .* beside the output .*, 0.00 GB are free there: make room"):
        compress(lazy_llama, 0.4, neurons="fewer", **asked)
    assert not list(tmp_path.iterdir())
    report = compress(lazy_llama, 0.4, options={"rounds": 1, "value_steps": 0}, **asked).report
    assert "narrowed" not in report
    assert report["recipe"]["neurons"] == "all"
    assert "all neurons stay" in caplog.text


def test_a_failure_leaves_a_model_in_memory_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lazy("llama")
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.named_parameters()}

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(model, **FEWER)
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    lazy("llama").bfloat16().save_pretrained(tmp_path / "model")
    result = compress(tmp_path / "model", output=tmp_path / "small", **FEWER)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert {tensor.dtype for tensor in loaded.state_dict().values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert result.report["narrowed"]


def test_what_is_settled_keeps_its_neurons(lazy_llama: Path, story: Path) -> None:
    keep = {"*layers.0.mlp.down_proj": 1.0}
    report = compress(lazy_llama, **FEWER | {"calibration": story, "length": 32, "samples": 40, "keep": keep}).report
    assert report["narrowed"]
    assert not any("layers.0." in name for name in report["narrowed"])


def test_of_a_real_model_it_leaves_more(shared: Path) -> None:
    options: dict[str, Any] = {"calibration": "stdlib:train", "samples": 40, "length": 64, "allocation": "llrc:quick"}
    kls = [compress(bundled.MODEL, 0.4, neurons=neurons, **options).report["kl"] for neurons in ("fewer", "all")]
    assert kls[0] < 0.8 * kls[1]


@pytest.mark.parametrize("allocation", ["llrc:quick", "mask-fisher", "uniform"])
def test_what_is_too_narrow_for_a_rank_stays_dense(allocation: str) -> None:
    report = compress(lazy("llama", heed=0.0), **FEWER | {"rate": 0.45, "allocation": allocation, "rank_multiple": 16}).report
    narrow = report["narrowed"]
    assert any(min(shape) == 16 for shape in narrow.values())
    assert all(report["ranks"][name] is None for name, shape in narrow.items() if min(shape) == 16)
    size = report["parameters"]["linear"]
    assert size["compressed"] <= 0.55 * size["reference"]


def test_a_speed_is_reached_by_narrower_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "time_layers", lambda model, shapes: table(shapes, rest=20_000))
    sides = {"hidden_size": 144, "intermediate_size": 288, "num_hidden_layers": 1}
    model = lazy("llama", 0.0, **sides)
    shapes, _ = find_matrices(model)
    report = compress(model, **FEWER | {"rate": None, "target_speedup": 1.3}).report
    assert report["narrowed"]
    assert 1.3 <= report["predicted_speedup"] < 1.4
    layers = {
        name: Shape(*report["narrowed"].get(name, (shape.out_features, shape.in_features))) for name, shape in shapes.items()
    }
    assert report["predicted_speedup"] == table(shapes, rest=20_000).speedup(report["ranks"], layers)


def test_a_speed_that_no_ranks_reach_is_reached_by_neurons_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(model: Any, shapes: dict[str, Shape]) -> Latency:
        """Any rank takes as long as a dense matrix."""
        found = table(shapes, rest=20_000)
        timed = {name: replace(shape, times=tuple(time + 10**6 for time in shape.times)) for name, shape in found.shapes.items()}
        return replace(found, shapes=timed)

    monkeypatch.setattr(targets, "time_layers", slow)
    sides = {"hidden_size": 144, "intermediate_size": 288, "num_hidden_layers": 1}
    model = lazy("llama", 0.0, **sides)
    report = compress(model, **FEWER | {"rate": None, "target_speedup": 1.3}).report
    assert set(report["ranks"].values()) == {None}
    assert report["narrowed"]
    assert 1.3 <= report["predicted_speedup"] < 1.4
    with pytest.raises(RankwiseError, match="rank 1 in every matrix, with the fewest neurons, decodes"):
        compress(lazy("llama", 0.0), **FEWER | {"rate": None, "target_speedup": 50.0})
    keep = {"*.o_proj": 1.0}
    report = compress(lazy("llama", 0.0, **sides), **FEWER | {"rate": None, "target_speedup": 1.3, "keep": keep}).report
    assert 1.3 <= report["predicted_speedup"] < 1.4
    keep = {"*.down_proj": 1.0}  # whose neurons all stay
    with pytest.raises(RankwiseError, match="cannot be reached"):
        compress(lazy("llama", 0.0, **sides), **FEWER | {"rate": None, "target_speedup": 1.3, "keep": keep})
    with pytest.raises(RankwiseError, match="cannot be reached: rank 1 in every matrix decodes"):
        compress(lazy("llama", 0.0), **FEWER | {"rate": None, "target_speedup": 1.3, "neurons": "all"})


def test_what_is_explored_is_what_is_made(lazy_llama: Path, story: Path, tmp_path: Path) -> None:
    text: dict[str, Any] = {"calibration": str(story), "length": 32, "samples": 40}
    points = explore(lazy_llama, rates=[0.4], bits=[], output=tmp_path / "explored", **text)["points"]
    made = compress(lazy_llama, 0.4, effort="quick", **text)
    report = made.report
    assert report["narrowed"]
    (row,) = hold_contest(
        lazy_llama, [0.4], [str(story)], tmp_path / "contest", allocations=["llrc:quick"], judge_samples=2, **text
    )
    assert row["ranks"] == made.ranks
    assert row["kept_parameters"] == report["parameters"]["linear"]["compressed"]
    assert points[1]["kl"] == report["kl"]
    assert points[1]["bytes"] == report["bytes"]["model"]["compressed"]
    assert points[1]["share"] < 1
    assert points[1]["speedup"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rate": None, "bits": "4"}, "fewer neurons and bits=4"),
        ({"neurons": "some"}, "neurons='some'"),
        ({"decomposition": "svd"}, "fewer neurons need kronecker or whitened, not svd"),
        ({"decomposition": "centred"}, "not centred"),
    ],
)
def test_what_it_cannot_stand_beside(options: dict[str, Any], said: str, lazy_llama: Path, story: Path, tmp_path: Path) -> None:
    asked = FEWER | {"calibration": story, "output": tmp_path / "out"} | options
    if "bits" in options:
        asked.pop("allocation")
    with pytest.raises(RankwiseError, match=said):
        compress(lazy_llama, **asked)
    assert not list(tmp_path.iterdir())


def test_on_the_command_line(lazy_llama: Path, story: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    common = [
        "compress",
        lazy_llama,
        "--rate",
        0.4,
        "--calibration",
        story,
        "--length",
        32,
        "--samples",
        40,
        "--neurons",
        "fewer",
    ]
    dry = run(*common, "--allocation", "mask-fisher", "--dry-run", "-o", tmp_path / "plan.json")
    assert "MLPs with fewer neurons" in dry.out, dry.err
    done = run(*common, "--allocation", "mask-fisher", "-o", tmp_path / "small")
    assert done.code == 0, done.err
    assert "of their" in done.out
    assert AutoModel.from_pretrained(tmp_path / "small") is not None
    for plan in (tmp_path / "plan.json", tmp_path / "small"):
        applied = run("compress", lazy_llama, "--calibration", story, "--plan", plan, "-o", tmp_path / "again", "--overwrite")
        assert applied.code == 0, applied.err
        config, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("small", "again"))
        assert config["quantization_config"] == other["quantization_config"]


@pytest.mark.parametrize("kept", [[3], {"a": "3"}, {"a": 0}, {"a": None}, {"a": []}, 7])
def test_neurons_that_are_none_are_a_line(kept: Any, tmp_path: Path) -> None:
    plan = rankwise.Plan({"a": None}, kept_neurons={"a": 3})
    plan.save(tmp_path / "plan.json")
    assert rankwise.Plan.read(tmp_path / "plan.json") == plan
    content = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(content | {"kept_neurons": kept}))
    (tmp_path / "ranks.json").write_text('{"a": 3}')
    (tmp_path / "report.json").write_text(json.dumps({"neurons": kept}))
    for name in ("plan.json", "ranks.json"):
        with pytest.raises(RankwiseError, match="a positive number for the last matrix of each MLP"):
            rankwise.Plan.read(tmp_path / name)


def test_a_plan_of_a_model_in_memory_leaves_it_as_it_was() -> None:
    model = lazy("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = rankwise.plan(model, **FEWER)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert made.kept_neurons
    dense = sum(shape.dense for shape in made.shapes.values())
    assert made.parameters is not None
    assert made.parameters <= 0.6 * dense
    down = next(iter(made.kept_neurons))
    for kept, said in (({"lm_head": 3}, "last matrix of none"), ({down: 64}, "which has 64")):
        with pytest.raises(RankwiseError, match=said):
            compress(model, plan=replace(made, kept_neurons=kept), calibration=WINDOWS)
