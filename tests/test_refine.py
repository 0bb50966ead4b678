"""Refinements: other values in layers of the same sizes, that are nearer to the original, and a folder like any other."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, build
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rankwise import Compressed, RankwiseError, Recipe, compress, plan, refine
from rankwise.layers.lowrank import FORMS, LowRankLinear, layer_class
from rankwise.masks.descent import Descent, descend, own_parts
from rankwise.masks.student import Student
from rankwise.refinement.distil import Distil
from rankwise.refinement.refinement import REFINEMENTS, refined
from rankwise.refinement.trained import TrainedFactors
from rankwise.run_folder import Checkpoint, RunFolder

IDS = torch.arange(3, 30)[None]
FAST: dict[str, Any] = {"allocation": "mask-fisher"}
METHODS = {  # for tiny models
    "distil": "distil passes=4 tokens=128 learning_rate=0.06",
    "blocks": "blocks passes=8 tokens=128 learning_rate=0.03",
    "both": "blocks passes=8 tokens=128 learning_rate=0.03, distil passes=2 tokens=128 learning_rate=0.06",
}


def text(model: PreTrainedModel, windows: int = 60) -> torch.Tensor:
    """What a random model is sure of: its own most likely words, so that there is something to lose."""
    torch.manual_seed(0)
    start = torch.randint(3, VOCABULARY, (windows, 2))
    return model.generate(start, do_sample=True, max_length=32, min_length=32, pad_token_id=0)  # type: ignore[operator]


QUICK = {"llama-gqa-tied": "both", "gpt2": "distil", "mixtral": "blocks"}  # a method of each by default
SLOW = pytest.mark.slow
one = pytest.mark.parametrize(
    "original",
    ["llama-gqa-tied", *(pytest.param(name, marks=SLOW) for name in ("gpt2", "mixtral"))],
    indirect=True,
    scope="module",
)
both = pytest.mark.parametrize(
    ("original", "method"),
    [
        pytest.param(name, method, id=f"{name}-{kind}", marks=() if QUICK[name] == kind else SLOW)
        for name in QUICK
        for kind, method in METHODS.items()
    ],
    indirect=["original"],
    scope="module",
)


@pytest.fixture(scope="module")
def original(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = build(request.param)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 2  # sharper answers
    return model


@pytest.fixture(scope="module")
def folder(original: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the `dense` model and the `small` one."""
    folder = tmp_path_factory.mktemp("refine")
    original.save_pretrained(folder / "dense")
    compress(folder / "dense", 0.3, calibration=text(original), output=folder / "small", **FAST)
    return folder


def numbers(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}


@both
def test_a_folder_is_nearer_to_the_original_and_of_the_same_size(
    method: str, folder: Path, original: PreTrainedModel, tmp_path: Path
) -> None:
    result = refine(folder / "small", folder / "dense", refine=method, calibration=text(original, 120), output=tmp_path / "out")
    assert result.model is not None
    assert result.report["kl"] < 0.95 * result.report["before_refinement"]["kl"]
    small, again = (AutoModelForCausalLM.from_pretrained(path) for path in (folder / "small", tmp_path / "out"))
    assert numbers(small) == numbers(again)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, result.model(IDS).logits)
        assert not torch.equal(again(IDS).logits, small(IDS).logits)
    assert json.loads((tmp_path / "out" / "ranks.json").read_text()) == json.loads((folder / "small" / "ranks.json").read_text())
    assert Recipe.read(tmp_path / "out").refine == method


@both
def test_compress_refines_before_it_writes(method: str, original: PreTrainedModel, tmp_path: Path) -> None:
    windows = text(original, 120)
    model = copy.deepcopy(original)
    result = compress(model, 0.3, calibration=windows, refine=method, output=tmp_path / "out", **FAST)
    plain = compress(copy.deepcopy(original), 0.3, calibration=windows, **FAST)
    assert result.ranks == plain.ranks
    assert result.report["before_refinement"]["kl"] == pytest.approx(plain.report["kl"], rel=1e-6)
    assert result.report["kl"] < 0.95 * plain.report["kl"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    made = model.state_dict()
    assert all(torch.equal(tensor, made[name]) for name, tensor in again.state_dict().items())
    with torch.no_grad():  # where a tensor lies decides in which order products add up, to other digits in float32
        torch.testing.assert_close(again.double()(IDS).logits, model.double()(IDS).logits, rtol=1e-9, atol=1e-9)


@one
def test_the_same_seed_gives_the_same_weights(folder: Path, original: PreTrainedModel) -> None:
    def made(seed: int) -> dict[str, torch.Tensor]:
        asked: dict[str, Any] = {"refine": METHODS["distil"], "calibration": text(original), "seed": seed}
        model = refine(folder / "small", folder / "dense", **asked).model
        assert model is not None
        return model.state_dict()

    one, same, other = made(0), made(0), made(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


class _Spoiling:
    def refine(self, student: Student, layers: Any, losses: list[float]) -> dict[str, nn.Module]:
        spoiled = copy.deepcopy(dict(layers))
        for layer in spoiled.values():
            for parameter in layer.parameters():
                parameter.data += 1
        return spoiled


@one
def test_what_makes_it_worse_is_taken_back(original: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REFINEMENTS, "spoiling", _Spoiling)
    small = compress(copy.deepcopy(original), 0.3, calibration=text(original), **FAST).model
    assert small is not None
    layers = {name: module for name, module in small.named_modules() if isinstance(module, LowRankLinear)}
    batches = [{"input_ids": window} for window in text(original, 8).split(1)]
    student = Student(build_unstacked(original), {}, batches, batches[:2])
    found, records = refined(student, layers, _Spoiling())  # type: ignore[arg-type]
    assert all(found[name] is layer for name, layer in layers.items())
    assert records[1]["kl"] > records[0]["kl"] == pytest.approx(student.cost(found))


@one
def test_what_serves_one_text_and_harms_another_is_taken_back(original: PreTrainedModel) -> None:
    small = compress(copy.deepcopy(original), 0.3, calibration=text(original), **FAST).model
    assert small is not None
    layers = {name: module for name, module in build_unstacked(small).named_modules() if isinstance(module, LowRankLinear)}
    few = [{"input_ids": window} for window in text(original, 2).split(1)]
    other = [{"input_ids": torch.randint(3, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))}]
    student, by_heart = Student(build_unstacked(original), {}, few, few), Distil(passes=60, tokens=32, learning_rate=0.3)
    learned, records = refined(student, layers, by_heart)
    assert records[1]["kl"] < records[0]["kl"]
    assert student.cost(learned, other) > student.cost(layers, other)
    kept, records = refined(student, layers, by_heart, other)
    assert all(kept[name] is layer for name, layer in layers.items())
    assert records[1]["other_kl"] > records[0]["other_kl"]


def test_another_text_is_read_beside_the_calibration(llama: Path, small_llama: Path, story: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"samples": 12, "length": 16, "refine": "distil passes=0.1"}
    made = refine(small_llama, llama, text=str(story), **asked)
    assert all("other_kl" in record for record in made.report["history"][-2:])
    with pytest.raises(RankwiseError, match="no such text"):
        refine(small_llama, llama, text=str(tmp_path / "nowhere.txt"), **asked)


def test_a_second_refinement_adds_to_the_first(llama: Path, small_llama: Path, story: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"calibration": str(story), "samples": 12, "length": 16, "refine": "distil passes=0.1"}
    first = refine(small_llama, llama, output=tmp_path / "once", **asked).report
    second = refine(tmp_path / "once", llama, **asked).report
    assert second["seconds"]["refinement"] > first["seconds"]["refinement"]
    assert len(second["history"]) == len(first["history"]) + 2
    assert second["recipe"]["refine"] == "distil passes=0.1, distil passes=0.1"


def build_unstacked(model: PreTrainedModel) -> PreTrainedModel:
    from rankwise.layers.matrices import unstack_experts

    model = copy.deepcopy(model)
    unstack_experts(model)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "columns", "rank", "bias"), [(20, 12, 5, True), (12, 20, 12, False), (9, 9, 1, True)])
def test_trained_factors_are_the_layer_they_are_made_of(form: str, rows: int, columns: int, rank: int, bias: bool) -> None:
    torch.manual_seed(0)
    cls = layer_class(form, rows, columns)
    layer = cls.from_factors(torch.randn(rows, rank), torch.randn(rank, columns), torch.randn(rows) if bias else None)
    x, factors = torch.randn(3, columns), TrainedFactors(layer)
    again = factors.written_as(layer)
    assert type(again) is type(layer)
    assert numbers(again).keys() == numbers(layer).keys()
    assert again.rank == rank
    for module in factors, again:
        torch.testing.assert_close(module(x), layer(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(factors.weight, layer.weight, rtol=1e-4, atol=1e-4)
    gram = factors.second.T @ factors.second
    torch.testing.assert_close(gram, factors.first @ factors.first.T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gram, gram.diag().diag(), rtol=1e-3, atol=1e-3)
    assert factors.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


class _KilledError(Exception):
    pass


@one
def test_a_training_that_is_killed_goes_on_where_it_was(
    original: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any step: the weights are those of a training that was left in peace."""
    monkeypatch.setattr("rankwise.run_folder.CHECKPOINT_EVERY", 0.0)
    small = compress(copy.deepcopy(original), 0.3, calibration=text(original), **FAST).model
    assert small is not None
    name, layer = next((n, m) for n, m in small.named_modules() if isinstance(m, LowRankLinear))
    batches = [{"input_ids": window} for window in text(original, 8).split(1)]

    def trained(checkpoint: Checkpoint, killed_at: int = 99) -> tuple[torch.Tensor, list[float]]:
        factors, losses = TrainedFactors(layer), list[float]()
        student = Student(build_unstacked(original), {}, batches, batches[:2], checkpoint=checkpoint)
        work = student.add_gradients

        def add_gradients(*arguments: Any) -> Any:
            if len(losses) == killed_at:
                raise _KilledError
            return work(*arguments)

        monkeypatch.setattr(student, "add_gradients", add_gradients)
        scales, layers = dict.fromkeys(factors.parameters(), 1.0), {name: factors}
        add = functools.partial(student.add_gradients, layers)
        descend(student, own_parts(student, 2048), add, scales, Descent(steps=12), "training", losses)
        return factors.weight, losses

    in_peace, every = trained(Checkpoint())
    checkpoint = RunFolder(tmp_path).checkpoint("refinement", "key")
    for step in 5, 6, 11:
        with pytest.raises(_KilledError):
            trained(checkpoint, step)
        checkpoint.took = 0
    found, losses = trained(checkpoint)
    assert torch.equal(found, in_peace)
    assert losses == every
    assert checkpoint.file is not None
    assert not checkpoint.file.exists()


@one
def test_blocks_that_are_killed_go_on_after_the_last_one_that_was_done(
    folder: Path, original: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"refine": METHODS["blocks"], "calibration": text(original)}
    in_peace = refine(folder / "small", folder / "dense", **asked)
    trained: list[int] = []

    def until(last: int) -> Any:
        def training(*arguments: Any) -> None:
            if len(trained) == last:
                raise _KilledError
            trained.append(1)
            descend(*arguments)

        return training

    monkeypatch.setattr("rankwise.refinement.blocks.descend", until(1))
    with pytest.raises(_KilledError):
        refine(folder / "small", folder / "dense", output=tmp_path / "out", **asked)
    monkeypatch.setattr("rankwise.refinement.blocks.descend", until(99))
    found = refine(folder / "small", folder / "dense", output=tmp_path / "out", resume=True, **asked)
    assert found.report["history"] == in_peace.report["history"]
    assert len(trained) == len(found.report["history"][-1]["losses"])  # blocks, each trained once
    assert in_peace.model is not None
    assert found.model is not None
    again = found.model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in in_peace.model.state_dict().items())


def test_blocks_refuse_what_does_not_go_block_by_block(tmp_path: Path) -> None:
    model = build("t5")
    windows = torch.randint(3, VOCABULARY, (20, 16))
    with pytest.raises(RankwiseError, match="has an encoder too"):
        compress(model, 0.3, calibration=windows, refine="blocks", **FAST)


@one
def test_a_run_that_is_resumed_reads_what_it_has_learned(
    folder: Path, original: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"refine": METHODS["distil"], "calibration": text(original), "output": tmp_path / "out"}
    with monkeypatch.context() as failing:
        failing.setattr("rankwise.refining.sample_texts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            refine(folder / "small", folder / "dense", **asked)
    with pytest.raises(RankwiseError, match="--resume"):
        refine(folder / "small", folder / "dense", **asked)
    monkeypatch.setattr("rankwise.refinement.distil.descend", lambda *_: pytest.fail("trained again"))
    refine(folder / "small", folder / "dense", resume=True, **asked)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.keys()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"refine": "magic"}, "unknown refinement 'magic'; there are blocks, distil"),
        ({"refine": "distil speed=3"}, "its options are passes, tokens, learning_rate"),
        ({"refine": "distil passes=-1"}, "passes"),
        ({"refine": "distil, passes"}, "unknown refinement 'passes'"),
    ],
)
@one
def test_a_refinement_that_there_is_not_is_refused_before_the_work(asked: dict[str, Any], said: str, folder: Path) -> None:
    for run in (
        lambda: compress(folder / "nowhere", 0.3, **asked),
        lambda: refine(folder / "small", folder / "nowhere", **asked),
    ):
        with pytest.raises(RankwiseError, match=said):
            run()


@one
def test_other_bad_requests(folder: Path, original: PreTrainedModel, tmp_path: Path) -> None:
    windows, other = text(original), build("qwen2")
    other.save_pretrained(tmp_path / "other")
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: refine(folder / "small", tmp_path / "other", calibration=windows), "is not the model that"),
        (lambda: refine(folder / "dense", folder / "dense", calibration=windows), "was not written by rankwise"),
        (lambda: refine(folder / "small", folder / "dense", refine=" ", calibration=windows), "name a refinement"),
        (lambda: refine(folder / "small", folder / "dense", calibration=windows, output=folder / "small"), "--overwrite"),
        (
            lambda: compress(folder / "dense", 0.3, refine="distil", memory="1GB", output=tmp_path / "x"),
            "Run without memory",
        ),
    ]
    for run, said in cases:
        with pytest.raises(RankwiseError, match=said):
            run()


def test_how_a_text_is_read_goes_with_the_text(llama: Path, story: Path, tmp_path: Path) -> None:
    """Another text than the recipe's is not asked for the recipe's field."""
    rows, other = tmp_path / "rows.jsonl", {"samples": 12, "length": 16}
    rows.write_text("".join(json.dumps({"story": line}) + "\n" for line in story.read_text().splitlines()))
    made = compress(llama, 0.3, calibration=str(rows), text_column="story", output=tmp_path / "small", **FAST, **other)
    again = refine(tmp_path / "small", llama, refine="distil passes=0.1")
    assert (again.report["refined_on"], again.recipe.text_column) == (str(rows), "story")
    moved = refine(tmp_path / "small", llama, refine="distil passes=0.1", calibration=str(story))
    assert moved.report["refined_on"] == str(story)
    assert compress(llama, 0.2, recipe=made.recipe, calibration=str(story)).recipe.text_column == "text"


@one
def test_a_plan_stops_before_it(original: PreTrainedModel) -> None:
    made = plan(copy.deepcopy(original), 0.3, calibration=text(original), refine="distil", **FAST)
    assert made.recipe is not None
    assert made.recipe.refine == "distil"


def test_numbers_of_sixteen_bits_stay_so(tmp_path: Path) -> None:
    model = build("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    result = compress(tmp_path / "dense", 0.3, calibration=text(model), refine=METHODS["distil"], output=tmp_path / "out", **FAST)
    assert isinstance(result, Compressed)
    assert result.model is not None
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, result.model(IDS).logits)
