"""Each training-free allocator against its formula, written out once more in numpy on made-up spectra."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rankwise import RankwiseError
from rankwise.allocation.effective_rank import EffectiveRank, effective_rank
from rankwise.allocation.energy import Energy
from rankwise.allocation.error_bound import ErrorBound, UniformError
from rankwise.allocation.evolutionary import Evolutionary, cut, plan_of
from rankwise.allocation.heavy_tail import HeavyTail
from rankwise.allocation.kl_knapsack import KLKnapsack, depth_bias, error_curve
from rankwise.allocation.llrc import choose
from rankwise.allocation.mask_fisher import MaskFisher
from rankwise.allocation.plan import Budget, Ranks, Shapes, parameters
from rankwise.allocation.problem import Allocation, Problem
from rankwise.allocation.rocket import Rocket, weight_errors
from rankwise.allocation.strs import STRS
from rankwise.allocation.threshold import by_threshold, rank_of
from rankwise.allocation.uniform import Uniform
from rankwise.allocation.zero_sum import ZeroSum
from rankwise.calibration.signal import text_labels
from rankwise.decomposition.solver import Decomposition, Root, decompose
from rankwise.layers.linear import swapped, weight_of
from rankwise.layers.matrices import Shape, find_matrices
from rankwise.testing.allocators import VOCABULARY, tiny_problem, tiny_student

Pair = functools.partial(Shape, form="pair")  # as the methods are published
SHAPES = {"a": Pair(12, 8), "b": Pair(6, 10), "c": Pair(9, 9)}
KEEPS = (0.45, 0.6, 0.75, 0.9)
Floats = np.ndarray[Any, Any]


def made_up(shapes: Shapes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Falling spectra of different steepness and scale."""
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(np.sort(rng.gamma(0.5 + row, size=shape.full_rank) * 10.0**row)[::-1].copy())
        for row, (name, shape) in enumerate(shapes.items())
    }


def problem_of(keep: float, student: Any = None, shapes: Shapes = SHAPES, seed: int = 0, multiple: int = 1) -> Problem:
    budget = Budget(int(keep * sum(shape.dense for shape in shapes.values())), multiple)
    return Problem(shapes, made_up(shapes, seed), budget, student)


def all_plans(problem: Problem) -> Iterator[Ranks]:
    """Every plan within the budget."""
    options = [[*range(1, shape.largest_rank() + 1), None] for shape in problem.shapes.values()]
    for ranks in itertools.product(*options):
        plan = dict(zip(problem.shapes, ranks, strict=True))
        if parameters(plan, problem.shapes) <= problem.budget.parameters:
            yield plan


def energies(spectrum: torch.Tensor) -> Floats:
    squares = spectrum.numpy() ** 2
    return squares / squares.sum()


def assert_prefixes(answer: Allocation, problem: Problem) -> None:
    for name, rank in answer.ranks.items():
        mask = answer.masks[name]
        assert (mask is None) == (rank is None)
        if mask is not None and rank is not None:
            assert mask.tolist() == [1.0] * rank + [0.0] * (len(problem.spectra[name]) - rank)


def assert_threshold(answer: Allocation, problem: Problem, scores: Mapping[str, Floats]) -> None:
    """The answer keeps all that the lowest affordable threshold keeps, and the next lower threshold is not affordable."""

    def plan(t: float) -> Ranks:
        counts = {n: max(int((s > t).sum()), 1) for n, s in scores.items()}
        return {n: k if k * problem.shapes[n].per_rank < problem.shapes[n].dense else None for n, k in counts.items()}

    levels = [-math.inf, *sorted({float(x) for s in scores.values() for x in s})]
    affordable = [t for t in levels if parameters(plan(t), problem.shapes) <= problem.budget.parameters]
    least = plan(min(affordable))
    for name, rank in least.items():
        got = answer.ranks[name]
        assert got is None or (rank is not None and got >= rank), name
    left = problem.budget.parameters - parameters(answer.ranks, problem.shapes)
    assert 0 <= left < max(shape.per_rank for shape in problem.shapes.values())
    assert_prefixes(answer, problem)


@pytest.mark.parametrize(
    ("components", "multiple", "rank"),
    [(0, 1, 1), (1, 1, 1), (4, 1, 4), (5, 1, None), (8, 1, None), (0, 2, 2), (3, 2, 2), (4, 2, 4), (5, 2, None)],
)
def test_rank_of_components(components: int, multiple: int, rank: int | None) -> None:
    assert rank_of(components, Pair(12, 8), multiple) == rank  # break-even: 96 / 20 = 4.8


def test_infinite_scores_are_kept_last_of_all_to_go() -> None:
    problem = problem_of(0.6)
    scores = {n: torch.zeros(len(s)) for n, s in problem.spectra.items()}
    scores["a"][:3] = torch.inf
    ranks = by_threshold(problem, scores).ranks
    assert ranks["a"] is None or ranks["a"] >= 3


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("seed", range(4))
def test_energy(keep: float, seed: int) -> None:
    problem = problem_of(keep, seed=seed)
    scores = {
        n: energies(s) / sum((problem.shapes[n].in_features, problem.shapes[n].out_features)) for n, s in problem.spectra.items()
    }
    assert_threshold(Energy().allocate(problem), problem, scores)


@pytest.mark.parametrize("keep", KEEPS)
def test_heavy_tail_reads_the_raw_weights(keep: float) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(shape.in_features, shape.out_features) for name, shape in SHAPES.items()})
    with torch.no_grad():
        model["a"].weight[:, 0] *= 50  # type: ignore[index, operator, union-attr]
    problem = problem_of(keep, student_of(model))
    values = {n: np.linalg.svd(model[n].weight.detach().double().numpy(), compute_uv=False) for n in SHAPES}  # type: ignore[operator, union-attr]
    scores = {n: (s - s.min()) / (s.max() - s.min()) for n, s in values.items()}
    answer = HeavyTail().allocate(problem)
    assert_threshold(answer, problem, scores)
    if keep < 0.7:
        assert answer.ranks["a"] == 1  # one large value, and a tail that is small beside it


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("seed", range(4))
def test_error_bound_is_the_least_sum_of_errors(keep: float, seed: int) -> None:
    problem = problem_of(keep, seed=seed)

    def loss(ranks: Ranks) -> float:
        return sum(energies(problem.spectra[n])[r:].sum() for n, r in ranks.items() if r is not None)

    answer = ErrorBound().allocate(problem)
    assert loss(answer.ranks) == pytest.approx(min(map(loss, all_plans(problem))), rel=1e-4, abs=1e-6)
    assert parameters(answer.ranks, SHAPES) <= problem.budget.parameters
    assert_prefixes(answer, problem)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("seed", range(4))
def test_uniform_error_is_the_least_largest_error(keep: float, seed: int) -> None:
    problem = problem_of(keep, seed=seed)

    def loss(ranks: Ranks) -> float:
        return max(math.sqrt(energies(problem.spectra[n])[r:].sum()) if r is not None else 0.0 for n, r in ranks.items())

    assert loss(UniformError().allocate(problem).ranks) == pytest.approx(min(map(loss, all_plans(problem))), abs=1e-12)


ATTENTION = {f"layers.{i}.{n}_proj": Pair(m, 160) for i in range(3) for n, m in (("q", 160), ("k", 40), ("v", 40), ("o", 160))}


def test_effective_rank_of_a_flat_and_a_single_spectrum() -> None:
    assert effective_rank(torch.full((7,), 3.0)) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 1


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_effective_rank_formula(beta: float) -> None:
    rng, keep = np.random.default_rng(0), 0.4
    problem = replace(
        problem_of(keep, shapes=ATTENTION),
        spectra={n: torch.from_numpy(np.exp(-np.arange(s.full_rank) * rng.uniform(0.02, 0.1))) for n, s in ATTENTION.items()},
    )
    expected: dict[str, float] = {}
    for kind in "qkvo":
        names = [n for n in ATTENTION if n.endswith(f"{kind}_proj")]
        R = np.array([math.exp(-sum(p * math.log(p) for p in energies(problem.spectra[n]))) for n in names])
        w = np.array([ATTENTION[n].per_rank for n in names])
        T = keep * sum(ATTENTION[n].dense for n in names)
        expected |= dict(zip(names, T / np.sqrt(R * w).sum() * np.sqrt(R / w), strict=True))
    givers = [n for n in ATTENTION if n[-6] in "qk"]
    gift = sum(beta * expected[n] * ATTENTION[n].per_rank for n in givers) / 3
    for name in ATTENTION:
        expected[name] *= 1 - beta if name in givers else 1
        expected[name] += gift / ATTENTION[name].per_rank if "v_proj" in name else 0
    ranks = EffectiveRank(beta=beta).allocate(problem).ranks
    scale = 1.0
    if dense := [n for n, r in ranks.items() if r is None]:  # what they save is spent by one factor on the others
        rest = [n for n in ATTENTION if n not in dense]
        left = problem.budget.parameters - sum(ATTENTION[n].dense for n in dense)
        scale = left / sum(expected[n] * ATTENTION[n].per_rank for n in rest)
    for name, rank in ranks.items():
        if rank is None:
            assert scale * expected[name] >= ATTENTION[name].largest_rank()
        else:
            assert rank == pytest.approx(scale * expected[name], abs=1.1), name


def student_of(model: nn.ModuleDict, decompositions: Mapping[str, Decomposition] | None = None) -> Any:
    """What allocators that run no model ask a student for."""
    return SimpleNamespace(weight=lambda name: weight_of(model.get_submodule(name)), decompositions=decompositions)


def random_factors(seed: int = 0) -> tuple[nn.ModuleDict, dict[str, Decomposition]]:
    """Linear layers, decomposed with uneven weights on their inputs."""
    generator = torch.Generator().manual_seed(seed)
    model, decompositions = nn.ModuleDict(), {}
    for name, shape in SHAPES.items():
        layer = nn.Linear(shape.in_features, shape.out_features, bias=False).double()
        scale = torch.rand(shape.in_features, generator=generator, dtype=torch.float64) * 3 + 0.1
        W = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, shape.in_features)
        layer.weight = nn.Parameter(W)
        model[name], decompositions[name] = layer, decompose(W, None, Root(scale))
    return model, decompositions


def errors_of(model: nn.ModuleDict, decompositions: Mapping[str, Decomposition]) -> dict[str, Floats]:
    """||W - B_r A_r|| / ||W|| for every r, one product at a time."""
    errors = {}
    for name, d in decompositions.items():
        W, B, A = (t.detach().numpy() for t in (model[name].weight, d.second, d.first))  # type: ignore[union-attr]
        errors[name] = np.array([np.linalg.norm(W - B[:, :r] @ A[:r]) / np.linalg.norm(W) for r in range(B.shape[1] + 1)])
    return errors


def test_errors_of_the_weights() -> None:
    model, decompositions = random_factors()
    for name, expected in errors_of(model, decompositions).items():
        d = decompositions[name]
        got = weight_errors(model[name].weight, d.second, d.first)  # type: ignore[arg-type]
        assert got.numpy() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("seed", range(3))
def test_knapsack_is_the_least_sum_of_weight_errors_below_the_cap(keep: float, seed: int) -> None:
    model, decompositions = random_factors(seed)
    problem = problem_of(keep, student_of(model, decompositions), seed=seed)
    errors = {n: np.minimum.accumulate(e) for n, e in errors_of(model, decompositions).items()}

    def each(ranks: Ranks) -> list[float]:
        return [0.0 if r is None else errors[n][r] for n, r in ranks.items()]

    answer = Rocket().allocate(problem)
    mean = float(np.mean(each(Uniform().allocate(problem).ranks)))
    plans = [*all_plans(problem)]
    caps = (alpha for alpha in (*(1 + i / 10 for i in range(11)), math.inf) if any(max(each(p)) <= alpha * mean for p in plans))
    alpha = next(caps)
    assert answer.history == [{"step": "cap", "alpha": alpha}]
    assert max(each(answer.ranks)) <= alpha * mean + 1e-9
    best = min(sum(each(p)) for p in plans if max(each(p)) <= alpha * mean)
    assert sum(each(answer.ranks)) == pytest.approx(best, rel=2e-3)
    assert_prefixes(answer, problem)


class Table:
    """A student whose divergence for one truncated matrix is looked up, and for several is their sum."""

    seed, training, selection = 0, [{"input_ids": torch.zeros(8, 2)}] * 3, [{"input_ids": torch.zeros(1, 2)}]

    def __init__(self, losses: Mapping[tuple[str, int], float]) -> None:
        self.losses, self.asked = losses, list[tuple[str, int, int]]()

    def divergence(self, masks: Mapping[str, torch.Tensor | None], batches: Any = None) -> float:
        kept = {n: int(m.sum()) for n, m in masks.items() if m is not None}
        self.asked += [(n, r, len(self.selection if batches is None else batches)) for n, r in kept.items()]
        return sum(self.losses[n, r] for n, r in kept.items())

    def exactly(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def divergence_alone(self, name: str, mask: torch.Tensor, batches: Any) -> float:
        return self.divergence({name: mask}, batches)


@pytest.mark.parametrize("seed", range(6))
def test_strs_search(seed: int) -> None:
    rates, rng = (0.1, 0.4, 0.6, 0.8), np.random.default_rng(seed)
    shapes = {n: Pair(30 + 7 * i, 40) for i, n in enumerate("abcd")}
    rank = {(n, r): int(s.dense * (1 - r)) // s.per_rank for n, s in shapes.items() for r in rates}
    losses = {(n, k): rng.uniform() / k for (n, _), k in rank.items()}
    entries = sorted(rank, key=lambda e: -losses[e[0], rank[e]])  # the paper: by loss, descending

    def plan(mid: int) -> Ranks:
        return {n: min((rank[e] for e in entries[mid:] if e[0] == n), default=None) for n in shapes}

    for mid in range(len(entries) + 1):
        budget = Budget(parameters(plan(mid), shapes))
        best = plan(max(m for m in range(len(entries) + 1) if parameters(plan(m), shapes) <= budget.parameters))
        student: Any = Table(losses)
        answer = STRS(rates=rates, sequences=9).allocate(Problem(shapes, made_up(shapes), budget, student))
        assert answer.ranks == best
        assert {batches for *_, batches in student.asked} == {2}  # 16 sequences are the whole batches that hold 9


@pytest.mark.parametrize("seed", range(4))
def test_zero_sum_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gradients = {n: rng.normal(size=s.full_rank) * np.linspace(1, 0.1, s.full_rank) for n, s in SHAPES.items()}
    student: Any = SimpleNamespace(text_gradients=lambda: {n: torch.from_numpy(g) for n, g in gradients.items()})
    for keep in KEEPS:
        problem = problem_of(keep, student)
        kept, total = {n: s.full_rank for n, s in SHAPES.items()}, 0.0
        while sum(min(k * SHAPES[n].per_rank, SHAPES[n].dense) for n, k in kept.items()) > problem.budget.parameters:
            change = {n: -gradients[n][k - 1] for n, k in kept.items() if k > 1}
            wanted = {n: c for n, c in change.items() if (c >= 0) == (total <= 0)} or change
            name = min(wanted, key=lambda n: abs(wanted[n]))
            kept[name] -= 1
            total += change[name]
        answer = ZeroSum().allocate(problem)
        assert answer.history[0]["predicted change"] == pytest.approx(total)
        for name, k in kept.items():
            rank = answer.ranks[name]
            assert rank is None or (k <= rank <= SHAPES[name].largest_rank()), name
        assert_prefixes(answer, problem)


def test_labels_of_the_text() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0], [0, 8, 9, 10]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]])}
    assert text_labels(batch, causal=True).tolist() == [2, 3, 4, -100, 6, 7, -100, 9, 10, -100]
    assert text_labels(batch, causal=False).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert text_labels({"input_ids": ids}, causal=True).tolist() == [2, 3, 4, -100, 6, 7, 0, -100, 8, 9, 10, -100]


def test_gradient_of_the_text_is_that_of_the_models_own_loss() -> None:
    student = tiny_student("whitened")
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
    leaves = student.leaves()
    with student.frozen(), swapped(student.model, student.masked(leaves)):
        student.model(input_ids=ids, labels=ids).loss.backward()
    padded = {"input_ids": torch.nn.functional.pad(ids, (0, 3)), "attention_mask": (torch.arange(15) < 12).long().expand(2, -1)}
    plain, twice = student.text_gradients([{"input_ids": ids}]), student.text_gradients([padded, {"input_ids": ids}])
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(plain[name].float(), leaf.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(twice[name], plain[name], rtol=1e-3, atol=1e-6)


def test_zero_sum_needs_a_text() -> None:
    problem = tiny_problem("whitened", 0.3)
    problem.student.training = [{"inputs_embeds": torch.randn(1, 4, 32)}]
    with pytest.raises(RankwiseError, match="predicts no tokens"):
        ZeroSum().allocate(problem)


def test_mask_fisher_is_the_first_step_of_llrc() -> None:
    problem = tiny_problem("kronecker", 0.4)
    answer, expected = MaskFisher().allocate(problem), choose(problem, problem.student.fisher())
    assert answer.ranks == expected.ranks
    assert all(m is e is None or torch.equal(m, e) for m, e in zip(answer.masks.values(), expected.masks.values(), strict=True))  # type: ignore[arg-type]


def test_error_curve_of_one_point_has_the_shape_of_the_tail() -> None:
    spectrum = made_up(SHAPES)["a"]
    tail = np.append(energies(spectrum)[::-1].cumsum()[::-1], 0)
    assert error_curve(spectrum, np.array([2]), [0.3]).numpy() == pytest.approx(0.3 * tail / tail[2], rel=1e-9, abs=1e-12)


def test_error_curve_of_several_points() -> None:
    spectrum = made_up(SHAPES)["a"]
    tail = np.append(energies(spectrum)[::-1].cumsum()[::-1], 0)
    curve = error_curve(spectrum, np.array([1, 3, 6]), [0.9, 0.2, 0.01]).numpy()
    assert curve[[1, 3, 6]] == pytest.approx([0.9, 0.2, 0.01])
    assert curve[2] == pytest.approx(math.sqrt(0.9 / tail[1] * 0.2 / tail[3]) * tail[2])
    assert curve[-1] == 0
    rising = error_curve(spectrum, np.array([1, 3]), [0.1, 5.0])  # what noise may measure
    assert (rising.diff() <= 0).all()


@pytest.mark.parametrize(("alpha", "gamma"), [(0.0, 2.0), (1.5, 7.0), (3.0, 0.0)])
def test_depth_bias(alpha: float, gamma: float) -> None:
    names = [f"model.layers.{b}.mlp" for b in (2, 0, 3, 1)] + ["head"]
    sums = [sum((k + 1) ** -alpha for k in range(b, 4)) for b in range(4)]
    expected = [1 + gamma * (sums[b] - sums[3]) / (sums[0] - sums[3]) for b in (2, 0, 3, 1)] + [1.0]
    assert [*depth_bias(names, alpha, gamma).values()] == pytest.approx(expected)


def test_depth_bias_of_one_block() -> None:
    assert depth_bias(["h.0.a", "head"], 1.0, 5.0) == {"h.0.a": 1.0, "head": 1.0}


@pytest.mark.parametrize("keep", KEEPS)
def test_kl_knapsack_without_bias_is_the_least_sum_of_curves(keep: float) -> None:
    spectra, scale = made_up(SHAPES), {"a": 2.0, "b": 1.0, "c": 30.0}

    def loss(name: str, rank: int | None) -> float:
        return 0.0 if rank is None else scale[name] * float(energies(spectra[name])[rank:].sum())

    student: Any = Table({(n, r): loss(n, r) for n, s in SHAPES.items() for r in range(s.full_rank + 1)})
    problem = problem_of(keep, student)
    answer = KLKnapsack(trials=1).allocate(problem)
    assert {(n, r) for n, r, _ in student.asked[:3]} == {("a", 1), ("b", 1), ("c", 1)}
    best = min(sum(loss(n, r) for n, r in p.items()) for p in all_plans(problem))
    assert sum(loss(n, r) for n, r in answer.ranks.items()) == pytest.approx(best, rel=1e-4, abs=1e-6)
    assert_prefixes(answer, problem)


def test_kl_knapsack_keeps_the_best_trial() -> None:
    student = tiny_student("whitened", layers=3)
    shapes = find_matrices(student.model)[0]
    spectra = {n: d.spectrum for n, d in student.decompositions.items()}
    problem = Problem(shapes, spectra, Budget.of(shapes, 0.4, "linear", 0), student)
    answer = KLKnapsack(trials=4, points=2).allocate(problem)
    assert len(answer.history) == 4
    assert answer.history[-1]["kl"] > min(r["kl"] for r in answer.history)
    assert answer.history[0]["step"] == "alpha 0.00, gamma 0.00"
    assert problem.student.divergence(answer.masks) == pytest.approx(min(r["kl"] for r in answer.history))


@pytest.mark.parametrize("levels", [3, 10, 30])
def test_flips_preserve_the_budget(levels: int) -> None:
    problem, random, search = problem_of(0.6, shapes=ATTENTION, multiple=4), Random(0), Evolutionary(levels=levels)
    sizes = start = {n: ATTENTION[n].parameters(r) for n, r in Uniform().allocate(problem).ranks.items()}
    seen = set()
    for _ in range(300):
        sizes = search.flipped(sizes, problem, random)
        assert sum(sizes.values()) == sum(start.values())
        assert all(ATTENTION[n].parameters(4) <= size <= ATTENTION[n].dense for n, size in sizes.items())
        answer = plan_of(sizes, problem)
        assert parameters(answer.ranks, ATTENTION) <= problem.budget.parameters
        seen.add(tuple(answer.ranks.items()))
    assert len(seen) > 100
    assert any(None in (rank for _, rank in ranks) for ranks in seen)


def test_flips_of_one_matrix_are_none() -> None:
    problem = problem_of(0.6, shapes={"a": SHAPES["a"]})
    assert Evolutionary().flipped({"a": 40}, problem, Random(0)) == {"a": 40}


def test_evolution_lowers_the_divergence() -> None:
    problem = tiny_problem("whitened", 0.4)
    uniform, answer = Uniform().allocate(problem), Evolutionary(generations=15, offspring=6, survivors=(2, 1)).allocate(problem)
    start, end = (problem.student.divergence(a.masks, problem.student.training) for a in (uniform, answer))
    assert end < 0.9 * start
    assert len(answer.history) == 15


def test_pieces_of_text() -> None:
    ids = torch.arange(50).view(10, 5)
    pieces = cut([{"input_ids": ids[:7], "attention_mask": ids[:7]}, {"input_ids": ids[7:]}], tokens=10)
    assert [len(piece["input_ids"]) for piece in pieces] == [2, 2, 2, 1, 2, 1]
    assert torch.cat([piece["input_ids"] for piece in pieces]).equal(ids)
    assert all(piece["input_ids"].equal(piece["attention_mask"]) for piece in pieces[:4])
