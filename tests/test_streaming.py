"""With a promise of memory a model is compressed block by block: to the same ranks and the same bytes."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rankwise import RankwiseError, compress
from rankwise.integration.weights import write_safetensors
from rankwise.masks.descent import descend
from rankwise.streaming import decomposition, stream
from rankwise.streaming.activations import Activations, Room
from rankwise.streaming.memory import Share
from rankwise.streaming.student import StreamedStudent

ENOUGH = "8GB"
SMALL: dict[str, Any] = {"samples": 30, "length": 16, "allocation": "uniform"}
WINDOWS = torch.randint(90, (12, 24), generator=torch.Generator().manual_seed(0))
UNLIKE = {"llama", "gemma3", "phi3", "gpt2", "falcon"}  # the others are much like the first
DECODERS = ["llama", "llama-gqa-tied", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "falcon"]


def weights_of(folder: Path) -> dict[str, bytes]:
    """The files that must be the same: all but the recipe, the report and its page, which have times, and the card, which has
    figures."""
    other = ("recipe.yaml", "report.json", "report.html", "README.md")
    files = {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in other}
    assert "config.json" in files
    assert any(name.endswith(".safetensors") for name in files)
    return files


def both(model: Path, output: Path, calibration: Any, rate: float = 0.25, **options: Any) -> tuple[Any, Any]:
    """The report of a run in memory and of a streamed one, once their files are found to be the same."""
    reports = []
    for name, memory in (("whole", None), ("streamed", ENOUGH)):
        reports.append(compress(model, rate, calibration=calibration, output=output / name, memory=memory, **options).report)
    assert weights_of(output / "whole") == weights_of(output / "streamed")
    assert not list(output.glob("*.run"))
    return reports[0], reports[1]


@pytest.mark.parametrize("allocation", ["uniform", "energy", "knapsack", "heavy-tail"])
def test_a_streamed_llama_is_the_same_to_the_byte(llama: Path, story: Path, tmp_path: Path, allocation: str) -> None:
    whole, streamed = both(llama, tmp_path, story, samples=30, length=16, allocation=allocation, decomposition="whitened")
    assert whole["ranks"] == streamed["ranks"]
    assert streamed["kl"] == pytest.approx(whole["kl"], rel=1e-5)
    assert streamed["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-5)
    for key in ("parameters", "bytes", "left_dense", "tokens", "windows", "agreement", "base_model"):
        assert streamed[key] == whole[key], key


@pytest.mark.parametrize(
    ("allocation", "options"), [("kl-knapsack", {"points": 2, "trials": 3}), ("strs", {"rates": (0.2, 0.5), "sequences": 4})]
)
def test_allocators_that_measure_the_model(
    llama: Path, story: Path, tmp_path: Path, allocation: str, options: dict[str, Any]
) -> None:
    both(llama, tmp_path, story, samples=30, length=16, allocation=allocation, decomposition="whitened", options=options)


def differ_by_rounding(model: Path, output: Path, calibration: Any, **options: Any) -> None:
    """A run in memory and a streamed one find the same ranks and, but for rounding, the same weights and KL."""
    reports = []
    for name, memory in (("whole", None), ("streamed", ENOUGH)):
        reports.append(compress(model, 0.3, calibration=calibration, output=output / name, memory=memory, **options).report)
    whole, streamed = reports
    assert whole["ranks"] == streamed["ranks"]
    assert streamed["kl"] == pytest.approx(whole["kl"], rel=1e-3)
    assert streamed["effort"]["backward_tokens"] == whole["effort"]["backward_tokens"]
    steps = [[record["kl"] for record in report["history"] if "kl" in record] for report in reports]
    assert steps[1] == pytest.approx(steps[0], rel=1e-3)
    tensors = [load_file(output / name / "model.safetensors") for name in ("whole", "streamed")]
    assert tensors[0].keys() == tensors[1].keys()
    models = [AutoModelForCausalLM.from_pretrained(output / name) for name in ("whole", "streamed")]
    with torch.no_grad():
        logits = [model(WINDOWS).logits for model in models]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-2, atol=1e-3)


BLOCKS = "blocks passes=8 tokens=64 learning_rate=0.03"


@pytest.mark.parametrize(
    ("name", "refine"),
    [
        ("llama-gqa-tied", f"{BLOCKS}, blocks passes=1 tokens=64"),
        pytest.param("gpt2", BLOCKS, marks=pytest.mark.slow),
        ("mixtral", "blocks passes=2 tokens=64"),
    ],
)
def test_refined_block_by_block(name: str, refine: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "model")
    windows = model.generate(torch.zeros(60, 1, dtype=torch.int64) + 5, do_sample=True, min_new_tokens=23, max_new_tokens=23)
    whole, streamed = both(tmp_path / "model", tmp_path, windows, 0.3, allocation="uniform", refine=refine)
    steps = [[(record["step"], record.get("losses")) for record in report["history"]] for report in (streamed, whole)]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 2 * len(refine.split(", "))
    assert streamed["kl"] == pytest.approx(whole["kl"], rel=1e-5)
    assert streamed["kl"] < streamed["before_refinement"]["kl"] == pytest.approx(whole["before_refinement"]["kl"], rel=1e-5)


def test_what_trains_the_whole_model_does_not_stream(llama: Path, story: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RankwiseError,
        match=r"refine='blocks, distil' trains the whole model at once \(use blocks, or none\)",
    ):
        compress(llama, 0.3, calibration=story, output=tmp_path / "out", memory=ENOUGH, refine="blocks, distil", **SMALL)
    assert not (tmp_path / "out").exists()


def test_a_refined_stream_that_is_killed_goes_on_after_the_last_block(
    llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"calibration": story, "memory": ENOUGH, "refine": BLOCKS, **SMALL}
    compress(llama, 0.3, output=tmp_path / "in-peace", **asked)
    done: list[int] = []

    def training(*given: Any) -> None:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        descend(*given)

    with monkeypatch.context() as killed:
        killed.setattr("rankwise.refinement.blocks.descend", training)
        with pytest.raises(KeyboardInterrupt):
            compress(llama, 0.3, output=tmp_path / "out", **asked)
    monkeypatch.setattr("rankwise.refinement.blocks.descend", lambda *given: (done.append(1), descend(*given)))
    compress(llama, 0.3, output=tmp_path / "out", resume=True, **asked)
    assert len(done) == 2  # blocks, each trained once
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "in-peace")


LEARNED: dict[str, Any] = {"neurons": "all", "options": {"points": 0, "rounds": 2, "value_steps": 3, "pricing_tokens": 256}}


@pytest.mark.parametrize("decomposition", ["kronecker", "whitened", "fisher"])
def test_learned_ranks(llama: Path, story: Path, tmp_path: Path, decomposition: str) -> None:
    options = {"samples": 30, "length": 16, "decomposition": decomposition}
    differ_by_rounding(llama, tmp_path, story, allocation="llrc", **options, **LEARNED)


@pytest.mark.parametrize("allocation", ["mask-fisher", "zero-sum"])
def test_allocators_that_ask_for_gradients(llama: Path, story: Path, tmp_path: Path, allocation: str) -> None:
    differ_by_rounding(llama, tmp_path, story, samples=60, length=16, allocation=allocation, decomposition="kronecker")


@pytest.mark.parametrize(
    "name", ["llama-gqa-tied", "gpt2", "falcon", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma3", "phi3"))]
)
def test_learned_ranks_of_any_decoder(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "model")
    differ_by_rounding(tmp_path / "model", tmp_path, WINDOWS, **LEARNED)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in UNLIKE else pytest.mark.slow) for n in DECODERS])
def test_any_decoder_with_a_list_of_blocks(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "model")
    both(tmp_path / "model", tmp_path, WINDOWS, allocation="energy")


@pytest.mark.parametrize("model", ["stories260k", pytest.param("babyllama-tok105", marks=pytest.mark.slow)])
def test_trained_models(shared: Path, model: str, tmp_path: Path) -> None:
    text = shared / "text" / "tinystories-3000.jsonl"
    whole, streamed = both(shared / "models" / model, tmp_path, text, samples=24, length=128, allocation="energy")
    assert streamed["kl"] == pytest.approx(whole["kl"], rel=1e-4)


def test_several_shards(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    both(tmp_path / "model", tmp_path, WINDOWS, allocation="uniform")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in ("llama", "gemma3", "gpt2")),
        ("llama", torch.float16),
        *(pytest.param(name, torch.float16, marks=pytest.mark.slow) for name in ("gemma3", "gpt2")),
    ],
)
def test_half_precision_is_computed_as_in_memory(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build(name).to(dtype).save_pretrained(tmp_path / "model")
    whole, streamed = both(tmp_path / "model", tmp_path, WINDOWS, allocation="energy", decomposition="whitened")
    assert streamed["kl"] == pytest.approx(whole["kl"], rel=1e-4)
    assert streamed["bytes"] == whole["bytes"]
    assert {t.dtype for t in load_file(tmp_path / "streamed" / "model.safetensors").values() if t.numel()} == {dtype, torch.int32}


def test_values_folded_into_half_precision_weights(tmp_path: Path) -> None:
    build("llama").bfloat16().save_pretrained(tmp_path / "model")
    differ_by_rounding(tmp_path / "model", tmp_path, WINDOWS, **LEARNED)


@pytest.mark.parametrize("room", [Share(0, 0), Share(20_000, 48 * 48 * 8)], ids=["none", "little"])
def test_little_room_changes_nothing(
    llama: Path, story: Path, tmp_path: Path, room: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(llama, 0.25, calibration=story, output=tmp_path / "whole", **SMALL)
    monkeypatch.setattr(stream, "share_out", lambda *_, **__: room)
    compress(llama, 0.25, calibration=story, output=tmp_path / "streamed", memory=ENOUGH, **SMALL)
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "streamed")


def test_an_interrupted_run_goes_on(llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress(llama, 0.25, calibration=story, output=tmp_path / "whole", **SMALL)
    solved = 0

    def limited(solve: Callable[..., Any], most: int) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal solved
            solved += 1
            if solved > most:
                raise KeyboardInterrupt
            return solve(*arguments)

        return call

    solve = decomposition.decompose
    monkeypatch.setattr(decomposition, "decompose", limited(solve, 10))
    with pytest.raises(KeyboardInterrupt):
        compress(llama, 0.25, calibration=story, output=tmp_path / "streamed", memory=ENOUGH, **SMALL)
    solved = 0
    monkeypatch.setattr(decomposition, "decompose", limited(solve, 4))  # what the first run solved is not solved again
    compress(llama, 0.25, calibration=story, output=tmp_path / "streamed", memory=ENOUGH, resume=True, **SMALL)
    assert solved == 4
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "streamed")


def test_interrupted_between_gradients(llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"calibration": story, "samples": 30, "length": 16, "memory": ENOUGH, **LEARNED}
    compress(llama, 0.3, output=tmp_path / "whole", **options)
    differentiate, calls = StreamedStudent.differentiate, 0

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        differentiate(*arguments)

    monkeypatch.setattr(StreamedStudent, "differentiate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(llama, 0.3, output=tmp_path / "resumed", **options)
    first, calls = calls, 3
    compress(llama, 0.3, output=tmp_path / "resumed", resume=True, **options)
    assert first == 3
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "resumed")


LARGE_MATRICES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "vocab_size": 20_000}
LARGE_VOCABULARY = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 200_000}


SIZES = {"matrices": LARGE_MATRICES, "vocabulary": LARGE_VOCABULARY}
RUNS = [" ".join(run) for run in itertools.product(SIZES, ("float32", "bfloat16"), ("energy", "mask-fisher"))]
FEW = ["matrices bfloat16 mask-fisher", "vocabulary float32 energy"]


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param(FEW, id="each once"),
        pytest.param([run for run in RUNS if run not in FEW], id="the others", marks=pytest.mark.slow),
    ],
)
def test_the_promise_is_kept_at_the_very_figure_that_a_refusal_names(runs: list[str], tmp_path: Path) -> None:
    for size, dtype in {tuple(run.split()[:2]) for run in runs}:
        build("llama", **SIZES[size]).to(getattr(torch, dtype)).save_pretrained(tmp_path / f"{size} {dtype}")
    code = """
import os, re, sys, torch, rankwise
windows = torch.arange(12 * 64).view(12, 64)
compress = rankwise.compress
for model, _, allocation in (run.rpartition(" ") for run in sys.argv[1:]):
    if os.fork():  # each in a process of its own, which has loaded the libraries
        assert os.wait()[1] == 0
        continue
    asked = {"calibration": windows, "allocation": allocation, "output": f"{model}-{allocation}"}
    try:
        compress(model, memory="1MB", **asked)
    except rankwise.RankwiseError as refused:
        needed = float(re.search(r"([0-9.]+) GB are needed", str(refused))[1]) + 0.03  # what the first call left behind
        print(needed * 1e9, compress(model, memory=f"{needed}GB", **asked).report["peak_memory_bytes"]["host"])
    break
"""
    done = subprocess.run([sys.executable, "-c", code, *runs], cwd=tmp_path, check=True, capture_output=True, text=True)
    found = [line.split() for line in done.stdout.splitlines()]
    for run, (promised, peak) in zip(runs, found, strict=True):
        assert float(peak) <= float(promised), run


def test_the_workspace_is_what_a_decomposition_takes() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not forget a peak of memory")
    code = """
import torch
from pathlib import Path
from rankwise.calibration.moments import Moments
from rankwise.decomposition.metric import decompose_in, metric_named
from rankwise.memory import peak_memory
from rankwise.layers.matrices import Shape
from rankwise.footprint import workspace
torch.linalg.eigh(torch.eye(300).double())  # the library is loaded
for metric in map(metric_named, ("whitened", "kronecker")):
    for m, n in ((300, 2400), (1100, 1100), (1500, 750)):
        W, moment = torch.randn(m, n).bfloat16(), [torch.eye(n).double(), torch.eye(m)]
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
        before = peak_memory()["host"]
        decompose_in(metric, W, Moments(1, moment[0], output=moment[1]))
        print(m, n, peak_memory()["host"] - before, workspace(Shape(m, n), "output" in metric.NEEDS))
"""
    at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}  # what is freed goes back to the system
    done = subprocess.run([sys.executable, "-c", code], env=at_once, check=True, capture_output=True, text=True)
    for m, n, taken, said in (map(int, line.split()) for line in done.stdout.splitlines()):
        assert 0.7 * said < taken < 1.1 * said + 2**23, (m, n, taken, said)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "8 potatoes"}, "memory='8 potatoes'"),
        ({"memory": "100MB"}, r"0\.10 GB is not enough, \d\.\d\d GB are needed"),
        ({"calibration": "self"}, "name a calibration text"),
        ({"allocation": "ara", "decomposition": "whitened"}, r"allocation 'ara' runs the whole model .* takes \d+\.\d GB"),
        ({"allocation": "llrc", "preset": "paper"}, "allocation 'llrc' runs the whole model"),
        ({"allocation": "uniform", "decomposition": "centred"}, "makes affine factors"),
        ({"output": None}, "name an output folder"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    llama: Path, story: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    asked: dict[str, Any] = SMALL | {"calibration": story, "output": tmp_path / "out", "memory": ENOUGH} | options
    with pytest.raises(RankwiseError, match=message):
        compress(llama, 0.25, **asked)
    assert not list(tmp_path.iterdir())


def test_encoders_with_decoders_are_refused(tmp_path: Path) -> None:
    build("t5").save_pretrained(tmp_path / "model")
    with pytest.raises(RankwiseError, match="has an encoder"):
        compress(tmp_path / "model", 0.2, calibration=torch.ones(9, 8).long(), output=tmp_path / "out", memory=ENOUGH, **SMALL)


def test_matrices_outside_of_blocks_are_left_dense(tmp_path: Path) -> None:
    build("opt").save_pretrained(tmp_path / "model")
    report = compress(tmp_path / "model", 0.2, calibration=WINDOWS, output=tmp_path / "out", memory=ENOUGH, **SMALL).report
    assert "outside of the blocks" in report["left_dense"]["model.decoder.project_in"]
    assert all("layers." in name for name in report["ranks"])


def test_blocks_may_be_handed_what_depends_on_embeddings(
    llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaRotaryEmbedding.forward

    def dependent(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        cos, sin = forward(self, x, position_ids)
        return cos + x.mean(), sin

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", dependent)
    both(llama, tmp_path, story, **SMALL)


def test_missing_weights_are_named(llama: Path, story: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(llama / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RankwiseError, match=r"missing keys: lm_head\.weight"):
        compress(tmp_path / "model", 0.2, calibration=story, output=tmp_path / "out", memory=ENOUGH, **SMALL)


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(7).half(),
        "z": torch.randn(2, 2, 2),
        "guard": torch.empty(4, 0),
        "ü": torch.randn(1, dtype=torch.float64),
        "t": torch.randn(4, 6).T,
        "ids": torch.arange(3),
        "int": torch.arange(3).int(),
        "bool": torch.ones(5).bool(),
    }
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    empty = {name: tensor.to("meta") for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "ours", empty, {"format": "pt"}, lambda name: tensors[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_hidden_states_beyond_the_budget_are_on_disk(tmp_path: Path) -> None:
    room = Room(tmp_path / "scratch", 100)
    hidden = Activations("x", room)
    values = [torch.randn(10), torch.randn(12), torch.randn(20)]
    for _ in range(2):
        for index, value in enumerate(values):
            hidden[index] = value
    assert room.bytes == 12
    assert len(list(room.folder.iterdir())) == 1
    assert all(torch.equal(hidden[i], value) for i, value in enumerate(values))
    hidden.clear()
    assert room.bytes == 100
    assert not list(room.folder.iterdir())
