"""LLRC's default: never worse than where it started, and each part can be left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import build

from rankwise import compress
from rankwise.allocation import llrc
from rankwise.allocation.kl_knapsack import KLKnapsack
from rankwise.allocation.llrc import LLRC, LLRCQuick, choose, in_nats
from rankwise.allocation.mask_fisher import MaskFisher
from rankwise.allocation.plan import parameters
from rankwise.masks.layers import Masks, is_whole
from rankwise.testing.allocators import tiny_problem


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.6])
def test_no_worse_than_any_step_of_its_history(rate: float) -> None:
    problem = tiny_problem("kronecker", rate)
    answer = LLRC(rounds=3, value_steps=5).allocate(problem)
    kl = problem.student.divergence(answer.masks)
    assert kl == pytest.approx(min(record["kl"] for record in answer.history), rel=1e-5)
    assert parameters(answer.ranks, problem.shapes) <= problem.budget.parameters
    assert all(is_whole(mask) or int(mask.count_nonzero()) == answer.ranks[name] for name, mask in answer.masks.items())


@pytest.mark.parametrize("measured", [False, True])
def test_starts_from_the_best_of_four_plans(measured: bool) -> None:
    problem = tiny_problem("kronecker", 0.4)
    levels = {name: 1e-3 * (number + 1) for number, name in enumerate(problem.shapes)} if measured else {}
    problem = replace(problem, levels=levels)
    prices = problem.student.fisher()
    spectrum = {name: levels[name] * s.double().square() for name, s in problem.spectra.items()} if measured else None
    spectrum = spectrum or in_nats(problem.spectra, prices)
    both = {name: (spectrum[name] * price).sqrt() for name, price in prices.items()}
    starts = [MaskFisher().allocate(problem), choose(problem, spectrum), choose(problem, both)]
    starts.append(KLKnapsack(points=1).allocate(problem))
    expected = [problem.student.divergence(start.masks) for start in starts]
    assert LLRCQuick().allocate(problem).ranks == starts[expected.index(min(expected[:3]))].ranks
    answer = LLRC(points=1, rounds=0, value_steps=0).allocate(problem)
    assert [record["kl"] for record in answer.history] == pytest.approx(expected, rel=1e-6)
    assert answer.ranks == starts[expected.index(min(expected))].ranks


def test_a_round_that_does_not_help_is_taken_back_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tiny_problem("kronecker", 0.4)
    asked = []
    spectra = problem.spectra

    def misleading(masks: Masks, batches: Any) -> dict[str, llrc.Tensor]:
        """As if what is dropped were dear, and what is kept worth nothing."""
        asked.append(batches)
        kept = {name: torch.ones(len(spectra[name])) if mask is None else mask for name, mask in masks.items()}
        return {name: 1e3 * (2 * mask.double() - 1) for name, mask in kept.items()}

    monkeypatch.setattr(problem.student, "gradients", misleading)
    answer = LLRC(points=0, rounds=3, value_steps=0).allocate(problem)
    rounds = [record["kl"] for record in answer.history if record["step"].startswith("round")]
    assert len(rounds) == len(asked) == 1
    start = min(answer.history[:3], key=lambda record: record["kl"])
    assert problem.student.divergence(answer.masks) == pytest.approx(start["kl"])


def test_curvature_and_rounds_read_one_part_of_the_text_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tiny_problem("kronecker", 0.4)
    student = problem.student
    student.training = student.training[:3]
    numbers = {id(batch): number for number, batch in enumerate(student.training)}
    read: list[list[int]] = []

    def reading(measure: Any) -> Any:
        def measured(*arguments: Any) -> Any:
            read.append([numbers[id(batch)] for batch in arguments[-1]])
            return measure(*arguments)

        return measured

    monkeypatch.setattr(student, "fisher", reading(student.fisher))
    monkeypatch.setattr(student, "gradients", reading(student.gradients))
    LLRC(points=0, rounds=2, value_steps=0, pricing_tokens=2 * student.training[0]["input_ids"].numel()).allocate(problem)
    assert len(read) > 1  # rounds end early where none helps
    assert read == [[0, 1], [2, 0], [1, 2]][: len(read)]


def test_the_spectrum_in_nats_has_one_factor_and_the_level_of_most_matrices() -> None:
    problem = tiny_problem("kronecker", 0.4)
    fisher = problem.student.fisher()
    prices = in_nats(problem.spectra, fisher)
    factors = torch.cat([price / problem.spectra[name].double().square() for name, price in prices.items()])
    torch.testing.assert_close(factors, factors[:1].expand_as(factors))
    above = sum(prices[name].sum() >= fisher[name].sum() for name in prices)
    assert abs(2 * above - len(prices)) <= 1


def test_what_it_reads_is_foretold() -> None:
    problem = tiny_problem("kronecker", 0.4)
    student = problem.student
    allocator = LLRC(rounds=2, value_steps=3)
    forward, back = allocator.reads(student.training, student.selection, len(problem.shapes))
    allocator.allocate(problem)
    for told, read in ((forward, student.effort["forward_tokens"]), (back, student.effort["backward_tokens"])):
        assert 0.8 * read <= told <= 4 * read  # rounds may end early


def test_what_runs_without_gradients_stays_dense() -> None:
    """As the indexers of sparse attention do, which choose what is read."""
    model = build("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = torch.no_grad()(mlp.forward)
    windows = torch.randint(3, 90, (12, 16), generator=torch.Generator().manual_seed(0))
    options = {"points": 0, "rounds": 1, "value_steps": 0}
    report = compress(model, 0.2, calibration=windows, options=options, effort="quick").report
    left = {name.rpartition(".")[0] for name in report["left_dense"] if "mlp" in name}
    assert left == {"model.layers.0.mlp"}
    assert any(report["ranks"].values())
