"""Targets in bytes are met to the byte of the checkpoint, targets of speed in the measured table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, build
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise import compress, starting, targets
from rankwise.allocation.knapsack import knapsack
from rankwise.allocation.plan import Budget, parameters
from rankwise.errors import RankwiseError
from rankwise.layers.matrices import Shape
from rankwise.recipe import Recipe
from rankwise.run_folder import RunFolder
from rankwise.runtime.latency import Latency, TimedShape, time_layers

WINDOWS = torch.randint(3, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
FAST = {"calibration": WINDOWS, "allocation": "uniform", "decomposition": "svd"}
HEADERS = 16_000  # bytes that the bound on the headers of these tiny models may be off


@pytest.mark.parametrize("name", ["llama", "llama-gqa-tied", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_the_checkpoint_takes_what_was_asked(name: str, dtype: torch.dtype, share: float, tmp_path: Path) -> None:
    model = build(name).to(dtype)
    model.save_pretrained(tmp_path / "dense")
    target = int(share * sum(file.stat().st_size for file in (tmp_path / "dense").glob("*.safetensors")))
    compress(model, target_bytes=target, output=tmp_path / "small", **FAST)
    size = sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))
    assert target - HEADERS < size <= target


def test_the_command_line(rankwise: Callable[..., Any], llama: Path, story: Path, tmp_path: Path) -> None:
    fixed = ["--calibration", story, "--samples", 10, "--length", 32, "--allocation", "uniform", "-o", tmp_path / "out"]
    ended = rankwise("compress", llama, "--target-bytes", "160kB", *fixed, "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["recipe"]["target_bytes"] == 160_000
    assert report["rate"] == report["achieved_rate"]["linear"]
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= 160_000
    assert "At most 160,000 bytes" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--target-bytes", "1GB"], "takes only"),
        (["--target-bytes", "1kB"], "cannot be reached"),
        (["--target-bytes", "much"], "1.5GB"),
        (["--target-bytes", "0"], "greater than 0"),
        (["--target-bytes", "1MB", "--rate", "0.2"], "two targets"),
        (["--target-speedup", "1.2", "--rate", "0.2"], "two targets"),
        (["--target-speedup", "0.9"], "greater than 1"),
        (["--target-speedup", "1000"], "cannot be reached|no rank makes"),
    ],
)
def test_bad_targets(
    options: list[str], complaint: str, rankwise: Callable[..., Any], llama: Path, story: Path, tmp_path: Path
) -> None:
    ended = rankwise("compress", llama, "--calibration", story, "--length", 32, "-o", tmp_path / "out", *options)
    assert ended.code == 2, ended.err
    assert any(part in ended.err for part in complaint.split("|"))
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


def table(shapes: dict[str, Shape], rest: int = 1000) -> Latency:
    """As if a call took 5 microseconds and a weight one nanosecond."""
    timed = {}
    for name, shape in shapes.items():
        ranks = (1, shape.largest_rank())
        times = tuple(10_000 + shape.parameters(rank) for rank in ranks)
        timed[name] = TimedShape.of_times(shape, 5_000 + shape.dense, ranks, times)
    return Latency(timed, rest + sum(shape.dense for shape in timed.values()))


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.tuples(st.integers(150, 400), st.integers(150, 400)), min_size=1, max_size=5), part=st.floats(0.5, 0.99))
def test_a_budget_of_time_is_kept_by_the_knapsack(sizes: list[tuple[int, int]], part: float) -> None:
    shapes = table({str(i): Shape(*size) for i, size in enumerate(sizes)}).shapes
    budget = Budget(int(part * sum(shape.dense for shape in shapes.values())))
    generator = torch.Generator().manual_seed(0)
    prices = {n: torch.rand(s.full_rank, generator=generator).sort(descending=True).values for n, s in shapes.items()}
    if sum(shape.parameters(1) for shape in shapes.values()) > budget.parameters:
        return
    ranks = knapsack(prices, shapes, budget)
    assert parameters(ranks, shapes) <= budget.parameters
    for name, rank in ranks.items():
        assert rank is None or shapes[name].parameters(rank) < shapes[name].dense  # never slower than dense


def test_timed_shapes() -> None:
    shape = table({"": Shape(300, 200, form="pair")}).shapes[""]
    assert shape.parameters(None) == shape.dense == 65_000
    assert shape.per_rank == 500
    assert [shape.parameters(rank) for rank in (1, 100)] == [10_500, 60_000]
    assert shape.largest_rank() == 109
    assert shape.largest_rank(32) == 96
    slow = TimedShape.of_times(Shape(300, 200), 9_000, (1, 119), (10_500, 69_500))
    assert slow.largest_rank() == 0


def test_few_bits_are_as_fast_as_their_kernels() -> None:
    shape = TimedShape.of_times(Shape(300, 200), 9_000, (1, 50), (5_000, 8_000), ((4, 2_000), (8, 4_000)))
    latency = Latency({"one": shape, "other": shape}, 28_000)

    def speedup(ranks: tuple[int | None, int | None], **bits: int) -> float:
        return latency.speedup(dict(zip(("one", "other"), ranks, strict=True)), latency.shapes, bits)

    assert speedup((None, None), one=8) == 28 / 23
    assert speedup((None, None), one=8, other=4) == 28 / 16
    assert speedup((None, None), one=3) == 1  # no kernel: the dense weight is multiplied
    assert speedup((1, None), one=8) == 28 / 24
    half = latency.speedup(dict.fromkeys(latency.shapes), {"one": Shape(150, 200), "other": Shape(300, 200)}, {"one": 4})
    assert half == 28_000 / (28_000 - 8_000)


@pytest.mark.parametrize("allocation", ["mask-fisher", "llrc", "uniform"])
def test_the_target_holds_in_the_table(allocation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "time_layers", lambda model, shapes: table(shapes, rest=20_000))
    model = build("llama", hidden_size=144, intermediate_size=288, num_hidden_layers=1)
    options = {"options": {"rounds": 1, "value_steps": 2}} if allocation == "llrc" else {}
    result = compress(model, target_speedup=1.3, calibration=WINDOWS, decomposition="svd", allocation=allocation, **options)
    assert 1.3 <= result.report["predicted_speedup"] < 1.4


def test_measuring_times_every_matrix() -> None:
    model = build("llama")
    run = starting.start(model, WINDOWS, None, Recipe.of(rate=0.2), [], RunFolder())
    found = time_layers(run.model, run.shapes, repeats=1)
    assert found.shapes.keys() == run.shapes.keys()
    for name, shape in found.shapes.items():
        assert (shape.out_features, shape.in_features) == (run.shapes[name].out_features, run.shapes[name].in_features)
        assert list(shape.times) == sorted(shape.times)
        assert min(shape.dense, *shape.times) > 0
        assert not shape.in_bits  # in float32 there is no kernel
    assert found.speedup(dict.fromkeys(found.shapes), run.shapes) == 1
    bfloat16 = build("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=1).bfloat16()
    run = starting.start(bfloat16, WINDOWS, None, Recipe.of(rate=0.2, device="cpu"), [], RunFolder())
    timed = time_layers(run.model, run.shapes, repeats=1).shapes.values()
    assert all([bits for bits, _ in shape.in_bits] == [4, 8] and min(time for _, time in shape.in_bits) > 0 for shape in timed)
    with pytest.raises(RankwiseError, match="needs a causal"):
        time_layers(build("t5"), {})
