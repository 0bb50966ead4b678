"""Evaluation against figures computed by hand: texts, intervals, hidden states, generations, and what is kept of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise import RankwiseError, bundled, compress, evaluate
from rankwise.calibration.signal import signal_of
from rankwise.calibration.text import read_documents
from rankwise.calibration.tokens import windows_of
from rankwise.evaluation import intervals
from rankwise.evaluation.compare import compare
from rankwise.evaluation.generation import common_prefix, continuations, repetition
from rankwise.evaluation.hidden import effective_rank, last_states, nuclear_norm, standardised
from rankwise.evaluation.protocols import PROTOCOLS, read_judging_text

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def stories(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained model and the same, compressed."""
    model, folder = shared / "models" / "stories260k", tmp_path_factory.mktemp("stories") / "small"
    text = [json.loads(line)["text"] for line in (shared / "text" / "tinystories-3000.jsonl").read_text().splitlines()[:60]]
    (folder.parent / "seen.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text))
    compress(model, 0.1, calibration=folder.parent / "seen.jsonl", output=folder, allocation="uniform", samples=16, length=128)
    return model, folder


def test_wikitext_by_the_fields_own_code(shared: Path, stories: tuple[Path, Path], tmp_path: Path) -> None:
    """The loop of GPTQ's repository over the rows that the hub's data set has."""
    dense, small = stories
    lines = (shared / "text" / "wiki.test.raw").read_text().split("\n")[:40]
    (tmp_path / "wiki.raw").write_text("\n".join(lines) + "\n")
    rows = [line + "\n" if line.strip() else "" for line in lines]
    ids = AutoTokenizer.from_pretrained(dense)("\n\n".join(rows), return_tensors="pt").input_ids
    length = 512
    report = evaluate(small, dense, f"wikitext2:{tmp_path / 'wiki.raw'}")
    assert (report["length"], report["windows"]) == (length, ids.numel() // length)
    for key, folder in (("reference_perplexity", dense), ("perplexity", small)):
        model, nlls = AutoModelForCausalLM.from_pretrained(folder), []
        for i in range(ids.numel() // length):
            batch = ids[:, i * length : (i + 1) * length]
            with torch.no_grad():
                logits = model(batch).logits
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
            nlls.append(loss.double() * length)
        expected = torch.exp(torch.stack(nlls).sum() / (len(nlls) * length)).item()
        assert report[key] == pytest.approx(expected, rel=1e-5)
    assert report["perplexity_ratio"] == pytest.approx(report["perplexity"] / report["reference_perplexity"])
    low, high = report["intervals"]["perplexity_ratio"]
    assert low < report["perplexity_ratio"] < high


def test_other_protocols(tmp_path: Path) -> None:
    (tmp_path / "ptb.txt").write_text(" no it was n't \n but <unk>\u2028 said \n")
    assert read_judging_text(f"ptb:{tmp_path / 'ptb.txt'}").documents == ["no it was n't but <unk>\u2028 said"]
    (tmp_path / "c4.jsonl").write_text(
        "".join(json.dumps({"text": f"page {i}\u2028"}, ensure_ascii=False) + "\n" for i in range(1200))
    )
    found = read_judging_text(f"c4:{tmp_path / 'c4.jsonl'}")
    assert found.documents == [" ".join(f"page {i}\u2028" for i in range(1100))]
    assert found.windows == PROTOCOLS["c4"].windows == 256
    (tmp_path / "blank.txt").write_text(" \n\n")
    for name in ("ptb", f"wikitext2:{tmp_path / 'blank.txt'}", f"c4:{tmp_path / 'nowhere.jsonl'}"):
        with pytest.raises(RankwiseError, match=r"no such text|is empty"):
            read_judging_text(name)


def test_comparison_by_hand(llama: Path, small_llama: Path) -> None:
    """With padding: every predicted token counts once, whatever its window's length."""
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (llama, small_llama)]
    ids, lengths = torch.randint(3, 60, (5, 20), generator=torch.Generator().manual_seed(0)), [20, 7, 12, 2, 20]
    mask = torch.stack([torch.arange(20) < n for n in lengths]).long()
    batches = [{"input_ids": ids[part], "attention_mask": mask[part]} for part in (slice(0, 2), slice(2, 5))]
    found = compare(lambda b: signal_of(models[0], b), lambda b: signal_of(models[1], b), batches, causal=True)
    kl, same, losses = [], [], [[], []]
    for row, length in zip(ids, lengths, strict=True):
        with torch.no_grad():
            p, q = (model(row[None, :length]).logits[0, :-1].double().log_softmax(-1) for model in models)
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).double())
        for i, log in enumerate((p, q)):
            losses[i].append(-log.gather(1, row[1:length, None]).squeeze(1))
    tokens = sum(lengths) - 5
    assert (found.tokens, found.windows) == (tokens, 5)
    assert found.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-3)
    assert found.agreement == pytest.approx(torch.cat(same).mean().item())
    assert found.flips == pytest.approx(1 - found.agreement)
    assert found.reference_perplexity == pytest.approx(torch.cat(losses[0]).mean().exp().item(), rel=1e-4)
    assert found.perplexity == pytest.approx(torch.cat(losses[1]).mean().exp().item(), rel=1e-4)
    sums, counts = torch.tensor([k.sum() for k in kl]), torch.tensor(lengths) - 1
    assert found.intervals["kl"] == pytest.approx(intervals.of_ratio(sums, counts), rel=1e-2)


def test_a_model_against_itself(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    batches = [{"input_ids": torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))}]
    found = compare(lambda b: signal_of(model, b), lambda b: signal_of(model, b), batches, causal=True)
    assert (found.kl, found.agreement, found.flips, found.perplexity_ratio) == (0, 1, 0, 1)
    assert found.intervals["kl"] == [0, 0]
    assert found.intervals["perplexity_ratio"] == [1, 1]


def test_the_interval_of_a_mean_over_windows() -> None:
    """For equal windows it is the textbook's; for unequal ones it holds the truth as often as it says."""
    generator = np.random.default_rng(0)
    values = torch.from_numpy(generator.normal(size=12))
    expected = stats.t.interval(0.95, 11, values.mean(), values.std() / 12**0.5)
    assert intervals.of_ratio(values * 7, torch.full((12,), 7)) == pytest.approx([float(bound) for bound in expected])
    assert intervals.of_ratio(values[:1], torch.ones(1)) is None
    hits = 0
    for _ in range(1000):
        counts = generator.integers(5, 40, size=20)
        windows = generator.normal(2, 1, size=20) * counts + generator.normal(0, 1, size=20) * counts**0.5
        low, high = intervals.of_ratio(torch.from_numpy(windows), torch.from_numpy(counts))
        hits += low < 2 < high
    assert 0.93 < hits / 1000 < 0.97


@given(st.integers(1, 300), st.data())
@settings(max_examples=50, deadline=None)
def test_intervals_of_accuracies(items: int, data: Any) -> None:
    lost = data.draw(st.integers(0, items))
    won = data.draw(st.integers(0, items - lost))
    low, high = intervals.of_paired_difference(lost, won, items)
    assert -1 <= low < high <= 1
    assert [-bound for bound in intervals.of_paired_difference(won, lost, items)] == pytest.approx([high, low])
    low, high = intervals.of_proportion(lost, items)
    assert 0 <= low <= lost / items <= high <= 1
    assert high > low
    flips = lost + won
    as_extreme = sum(math.comb(flips, k) for k in range(flips + 1) if math.comb(flips, k) <= math.comb(flips, won))
    assert intervals.mcnemar(lost, won) == pytest.approx(min(1, as_extreme / 2**flips))


def test_the_interval_of_a_difference() -> None:
    assert intervals.of_difference(5, [2, 8], 1, [-3, 5]) == pytest.approx([-1, 9])  # 4 +- the root of 9 + 16
    assert intervals.of_difference(5, None, 1, [-3, 5]) is None


@given(st.integers(2, 30), st.integers(1, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_measures_of_hidden_states_by_brute_force(length: int, width: int, seed: int) -> None:
    states = np.random.default_rng(seed).normal(size=(length, width)) + 3
    rows = states - states.mean(axis=0)
    rows = np.stack([row / max(np.sqrt((row**2).sum()), 1e-12) for row in rows])
    Z = standardised(torch.from_numpy(states))
    np.testing.assert_allclose(Z, rows, atol=1e-4)
    sigma = np.linalg.svd(rows, compute_uv=False)
    columns = sorted((np.sqrt((rows[:, j] ** 2).sum()) for j in range(width)), reverse=True)
    assert nuclear_norm(Z) == pytest.approx(sum(columns[: min(length, width)]) / length, rel=1e-3)
    if length >= width:
        assert nuclear_norm(Z) >= sigma.sum() / length * (1 - 1e-4)
    p = sigma**2 / (sigma**2).sum()
    assert effective_rank(Z) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p if x > 1e-12)), rel=1e-3)


def test_effective_rank_counts_directions() -> None:
    basis = torch.linalg.qr(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)))[0]
    assert effective_rank(basis) == pytest.approx(6, rel=1e-4)
    assert effective_rank(basis.T) == pytest.approx(6, rel=1e-4)
    assert effective_rank(basis[:, :1] @ basis[:1]) == pytest.approx(1, rel=1e-4)


def test_last_states_are_what_the_head_reads(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    window = {"input_ids": torch.arange(3, 15)[None]}
    with torch.no_grad():
        states = last_states(model, window)
        torch.testing.assert_close(model.get_output_embeddings()(states), model(**window).logits[0])


def greedy(model: Any, prompt: Tensor, limit: int) -> list[int]:
    ids = prompt.tolist()
    for _ in range(limit):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_continuations_are_greedy_and_end(shared: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / "stories260k")
    prompt = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")("Once upon a time", return_tensors="pt").input_ids[
        0
    ]
    expected = greedy(model, prompt, 12)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0)  # not asked for
    assert continuations(model, prompt[None], 12)[0] == expected
    end = expected[5]
    model.generation_config.eos_token_id = [end]
    assert continuations(model, prompt[None], 12)[0] == expected[: expected.index(end)]


def test_repetition_and_prefixes() -> None:
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 8) == pytest.approx(1 - 1 / 5)
    assert repetition([1, 2]) == 0
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1], [1, 2]) == 1
    assert common_prefix([], [1]) == 0


def test_several_texts(rankwise: Run, shared: Path, stories: tuple[Path, Path], tmp_path: Path) -> None:
    """The first is the headline; the gap is the others' cost above its."""
    dense, small = stories
    (tmp_path / "unlike.txt").write_text("\n".join(bundled.standard_library("held-out"))[:6000])
    texts = [str(small.parent / "seen.jsonl"), str(tmp_path / "unlike.txt")]
    command = ["evaluate", small, "--reference", dense, "--text", texts[0], "--text", texts[1], "--length", 64, "--samples", 12]
    finished = rankwise(*command)
    assert finished.code == 0, finished.err
    for wanted in ("KL above the first's", "effective rank", "repeated 4-grams", "tokens before they part"):
        assert wanted in finished.out
    report = json.loads(rankwise(*command, "--json").out)
    first, other = (report["texts"][name] for name in texts)
    assert list(report["texts"]) == texts
    assert (report["kl"], report["text"], first["gap"]) == (first["kl"], texts[0], None)
    assert other["gap"]["kl"] == pytest.approx(other["kl"] - first["kl"])
    assert other["gap"]["log_perplexity"] == pytest.approx(math.log(other["perplexity_ratio"] / first["perplexity_ratio"]))
    low, high = other["gap"]["intervals"]["kl"]
    assert low < other["gap"]["kl"] < high
    sample = report["generations"]["samples"][0]
    ids = windows_of(AutoTokenizer.from_pretrained(dense), read_documents(texts[0]), 64, 12)[0, :32]
    tokens = greedy(AutoModelForCausalLM.from_pretrained(small), ids, sample["compressed"]["tokens"])
    assert sample["compressed"]["text"] == AutoTokenizer.from_pretrained(dense).decode(tokens)
    assert sample["compressed"]["repetition"] == repetition(tokens)


def test_an_interrupted_evaluation_goes_on(
    rankwise: Run, llama: Path, small_llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    def again(*_: Any) -> None:
        pytest.fail("measured a second time")

    command = ["evaluate", small_llama, "--reference", llama, "--text", story, "--length", 32, "--samples", 9, "--json"]
    command += ["--cache", tmp_path / "kept", "--prompt", "Once upon"]
    with monkeypatch.context() as patch:
        patch.setattr("rankwise.evaluation.pair.generations", interrupted)
        finished = rankwise(*command)
        assert finished.code == 130
        assert "goes on from here" in finished.err
    monkeypatch.setattr("rankwise.evaluation.pair.compare", again)
    monkeypatch.setattr("rankwise.evaluation.pair.hidden_measures", again)
    first = rankwise(*command)
    assert first.code == 0, first.err
    monkeypatch.setattr("rankwise.evaluation.pair.generations", again)
    assert json.loads(rankwise(*command).out) == json.loads(first.out)
    assert json.loads(first.out)["generations"]["samples"][0]["prompt"] == "O n c e   u p o n"


def test_bad_questions(llama: Path, small_llama: Path, story: Path) -> None:
    for options, message in (
        ({"prompts": ["x" * 64]}, "64 tokens: between 1 and 63"),
        ({"prompts": [""]}, "0 tokens"),
        ({"text": []}, "name a text"),
    ):
        with pytest.raises(RankwiseError, match=message):
            evaluate(small_llama, llama, **{"text": str(story), "length": 32, **options})


def test_models_in_memory_are_judged_as_their_folders_are(llama: Path, small_llama: Path, story: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in (small_llama, llama))
    model.train()
    found = evaluate(model, reference, str(story), tokenizer=tokenizer, length=32, samples=5)
    folders = evaluate(small_llama, llama, str(story), length=32, samples=5)
    told = {"rate", "calibration", "reference", "bytes_on_disk"}  # by files alone
    assert {key: value for key, value in found.items() if key not in told} == {
        key: value for key, value in folders.items() if key not in told
    }
    assert found["rate"] == found["achieved_rate"]["linear"]
    assert model.training
    with pytest.raises(RankwiseError, match="has no tokenizer: give one"):
        evaluate(model, reference, str(story))
    with pytest.raises(RankwiseError, match="was not compressed by rankwise"):
        evaluate(reference, reference, str(story), tokenizer=tokenizer)
