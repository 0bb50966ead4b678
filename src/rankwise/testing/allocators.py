"""The laws of an allocator, on a tiny Llama with random weights. In a test of your own allocator:

    @pytest.mark.parametrize("law", ALLOCATOR_LAWS)
    def test_my_allocator(law):
        law(MyAllocator(), tiny_problem)

Give it options that make it quick: a law asks it for up to five budgets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from rankwise.allocation.allocator import Allocator
from rankwise.allocation.plan import Budget, Shapes, parameters
from rankwise.allocation.problem import Allocation, Problem
from rankwise.calibration.moments import collect
from rankwise.calibration.tokens import Batch
from rankwise.decomposition.metric import decompose_in, is_affine, metric_named
from rankwise.decomposition.solver import Decomposition
from rankwise.layers.linear import weight_of
from rankwise.layers.matrices import Shape, find_matrices
from rankwise.masks.layers import is_whole
from rankwise.masks.student import Student

VOCABULARY, LENGTH, WINDOWS = 48, 16, 24
RATES = (0.7, 0.5, 0.3, 0.1)
MULTIPLES = (1, 4)
NOISE = 0.05  # by how much a larger budget may serve worse, relatively: the choice is made on other text

ProblemFactory = Callable[[str, float, int], Problem]  # metric, rate, rank multiple


def tiny_student(metric: str, layers: int = 1, dtype: torch.dtype = torch.float32) -> Student:
    """Return the same random Llama (hidden 32) each time, decomposed in `metric` on random tokens."""
    training, selection = _batches()
    return Student(tiny_model(layers, dtype), _decomposed(metric, layers, dtype), training, selection)


def tiny_problem(metric: str, rate: float, multiple: int = 1) -> Problem:
    """Return the problem of compressing `tiny_student`."""
    student = tiny_student(metric)
    affine = is_affine(metric_named(metric))
    shapes = {name: Shape.of(student.model.get_submodule(name), affine=affine) for name in student.decompositions}
    budget = Budget.of(shapes, rate, "linear", tiny_model().num_parameters(), multiple)
    return Problem(shapes, {name: d.spectrum for name, d in student.decompositions.items()}, budget, student)


@functools.cache
def tiny_model(layers: int = 1, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a Llama whose random weights are large enough for its outputs to depend on its inputs."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * LENGTH,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


@functools.cache
def _batches() -> tuple[list[Batch], list[Batch]]:
    """For training and for selection."""
    windows = torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part} for part in windows.split(2)]
    return batches[2:], batches[:2]


@functools.cache
def _decomposed(metric: str, layers: int, dtype: torch.dtype) -> dict[str, Decomposition]:
    model, chosen = tiny_model(layers, dtype), metric_named(metric)
    matrices = find_matrices(model)[0]
    statistics = collect(model, matrices, _batches()[0], chosen.NEEDS)
    return {
        name: decompose_in(chosen, weight_of(model.get_submodule(name)), statistics.of(name)).to(dtype=dtype) for name in matrices
    }


def budget_is_met(allocator: Allocator, problem: ProblemFactory) -> None:
    """The budget is never exceeded, and used up to 0.2 % or one step of the largest matrix; ranks are
    multiples below break-even, or dense."""
    for rate in RATES:
        for multiple in MULTIPLES:
            asked, answer = _answer(allocator, problem, rate, multiple)
            left = asked.budget.parameters - parameters(answer.ranks, asked.shapes)
            step = multiple * max(shape.per_rank for shape in asked.shapes.values())
            assert 0 <= left <= max(0.002 * asked.budget.parameters, step), f"rate {rate}: {left} of {asked.budget} left"
            for name, rank in answer.ranks.items():
                allowed = range(multiple, asked.shapes[name].largest_rank(multiple) + 1, multiple)
                assert rank is None or rank in allowed, f"{name}: rank {rank}, with multiple {multiple}"


def masks_fit_the_ranks(allocator: Allocator, problem: ProblemFactory) -> None:
    """Every matrix has a rank; its mask [k] has that many finite non-zero weights, or drops nothing where it is dense."""
    asked, answer = _answer(allocator, problem, 0.3, 1)
    assert answer.ranks.keys() == answer.masks.keys() == asked.shapes.keys()
    for name, rank in answer.ranks.items():
        mask = answer.masks[name]
        assert is_whole(mask) == (rank is None), name
        if mask is not None:
            assert mask.shape == asked.spectra[name].shape, name
            assert bool(torch.isfinite(mask).all()), name
            assert rank is None or int(mask.count_nonzero()) == rank, name


def larger_budgets_serve_better(allocator: Allocator, problem: ProblemFactory) -> None:
    """A larger budget keeps more parameters, and does not raise the KL on the training text by more than noise."""
    kept, worst = 0, float("inf")
    for rate in RATES:
        asked, answer = _answer(allocator, problem, rate, 1)
        now = parameters(answer.ranks, asked.shapes)
        kl = asked.student.divergence(answer.masks, asked.student.training)
        assert now >= kept, f"rate {rate}: {now} parameters, fewer than {kept} at a higher rate"
        assert kl <= (1 + NOISE) * worst, f"rate {rate}: KL {kl}, more than {worst} at a higher rate"
        kept, worst = now, kl


def same_seed_same_answer(allocator: Allocator, problem: ProblemFactory) -> None:
    """Two equal problems have the same answer, bit for bit; whatever else draws random numbers does not matter."""
    first = _answer(allocator, problem, 0.3, 1)[1]
    torch.rand(1)
    second = _answer(allocator, problem, 0.3, 1)[1]
    assert first.ranks == second.ranks
    for name, mask in first.masks.items():
        other = second.masks[name]
        assert mask is other is None or (mask is not None and other is not None and torch.equal(mask, other)), name


def room_for_all_keeps_all(allocator: Allocator, problem: ProblemFactory) -> None:
    """With a budget for everything, everything stays dense."""
    asked = problem(allocator.decomposition, 0.3, 1)
    everything = Budget(parameters(dict.fromkeys(asked.shapes), asked.shapes))
    answer = allocator.allocate(replace(asked, budget=everything))
    assert answer.ranks == dict.fromkeys(asked.shapes), answer.ranks


def smallest_budget_is_reached(allocator: Allocator, problem: ProblemFactory) -> None:
    """With a budget for the smallest rank everywhere, that is the answer."""
    for multiple in MULTIPLES:
        asked = problem(allocator.decomposition, 0.3, multiple)
        answer = allocator.allocate(replace(asked, budget=Budget(_least(asked.shapes, multiple), multiple)))
        assert answer.ranks == dict.fromkeys(asked.shapes, multiple), answer.ranks


def model_is_left_alone(allocator: Allocator, problem: ProblemFactory) -> None:
    """The answer changes nothing in the model, its factors or the training flags."""
    asked = problem(allocator.decomposition, 0.3, 1)
    model, decompositions = asked.student.model, asked.student.decompositions

    def state() -> list[torch.Tensor]:
        factors = [t for d in decompositions.values() for t in vars(d).values()]
        return [t.clone() for t in (*model.state_dict().values(), *factors) if t is not None]

    modules, asking, before = [*model.modules()], [p.requires_grad for p in model.parameters()], state()
    allocator.allocate(asked)
    assert [*map(id, model.modules())] == [*map(id, modules)]
    assert [p.requires_grad for p in model.parameters()] == asking
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(old, new) for old, new in zip(before, state(), strict=True))


ALLOCATOR_LAWS: tuple[Callable[[Allocator, ProblemFactory], None], ...] = (
    budget_is_met,
    masks_fit_the_ranks,
    larger_budgets_serve_better,
    same_seed_same_answer,
    room_for_all_keeps_all,
    smallest_budget_is_reached,
    model_is_left_alone,
)


def _answer(allocator: Allocator, problem: ProblemFactory, rate: float, multiple: int) -> tuple[Problem, Allocation]:
    asked = problem(allocator.decomposition, rate, multiple)
    return asked, allocator.allocate(asked)


def _least(shapes: Shapes, multiple: int) -> int:
    return sum(shape.parameters(multiple) for shape in shapes.values())
