"""LLRC, our preset: ranks learned by gradient at the hard masks, then the kept masks' values.

1. Start: the best of four plans of a knapsack with the dense option: on prices from one backward pass (mask Fisher, exact to
   second order), on the metric's spectrum (of few sequences the better estimate), brought to nats by the mask Fisher, or by the
   KL of large errors where that is measured already, on the geometric mean of both, and on a measured KL per matrix at three
   ranks (`kl_knapsack.py`, right about large errors).
2. Rounds: the gradient of KL(original || student) with respect to every mask weight, at the current hard masks, with the best
   of the first three prices as curvature, prices each component as a Newton step would: keeping component i (mask 1) is worth
   -g_i + h_i, adding a dropped one (mask 0) is worth -g_i - h_i. Prices move towards these worths and go to the knapsack again:
   the budget is met exactly at each step, and no penalty weight has to be tuned. Of several steps (the worths are good only
   nearby) the one with the least KL on the selection text is taken; when none lowers it by 1 %, the rounds end. So the result
   is never worse than the start.
3. The kept masks' values, those of dense matrices too, are trained on the same KL and folded into the factors.

The idea of training nothing but masks over singular values, against the original model, is LLRC's (Sundrani et al. 2025,
arXiv 2512.13733); prices from gradients and curvature are Optimal Brain Damage's (LeCun et al. 1989).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from rankwise.allocation.kl_knapsack import PART_RUN, KLKnapsack, tokens_of_each
from rankwise.allocation.knapsack import knapsack
from rankwise.allocation.problem import Allocation, Problem
from rankwise.calibration.tokens import Batch, tokens_in
from rankwise.masks.descent import Descent
from rankwise.masks.layers import Masks
from rankwise.masks.student import Student
from rankwise.masks.values import train_values

logger = logging.getLogger(__name__)
Prices = dict[str, Tensor]  # matrix -> [k] float64, nats per token
STEPS = (0.7, 0.4, 0.2, 0.1)  # from the prices before towards the worths
TINY = 1e-300
LEAST_PART = 2**10  # tokens that components are priced on
LEAST_GAIN = 0.01  # of the KL, by a round that another one follows
MASKED = 1.5
POINTS, MEASURED, LEAST_MEASURED = 3, 2, 256  # per matrix; of the training text, for all; tokens through each
VALUE_PASSES = 1.0  # of value training over the text
STEP_TOKENS, LEAST_STEPS, MOST_STEPS = 256, 16, 120
LEARNING_RATE = 0.003  # of steps of `STEP_TOKENS`; the root of as much more for larger ones, whose gradients are less noisy


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LLRC:
    """points: KLs measured per matrix for the third start; rounds of re-pricing at most; steps of value training and its
    learning_rate. 0 points, rounds or steps leave that part out. By default there are three points, on so few tokens that all
    matrices together read the training text twice, but none where that leaves less than 256; as many steps, up to 120, as it
    takes to read the text once; and a learning rate of 0.003 for steps of 256 tokens, the root of as much more for larger ones.
    pricing_tokens: how much of the training text the mask Fisher and each round's gradients are taken on, one part after the
    other; by default a quarter."""

    decomposition: ClassVar[str] = "kronecker"
    points: NonNegativeInt | None = None
    rounds: NonNegativeInt = 4
    pricing_tokens: PositiveInt | None = None
    value_steps: NonNegativeInt | None = None
    learning_rate: PositiveFloat | None = None

    def allocate(self, problem: Problem) -> Allocation:
        """The selection with the least KL on the selection text, its mask values trained."""
        student = problem.student
        parts = self._parts(student.training)
        plans = _priced_plans(problem, student.fisher(next(parts)))
        history: list[dict[str, Any]] = [plan.record for plan in plans]
        best = min(plans, key=lambda plan: plan.kl)
        curvature = best.prices
        by_measuring = self._measuring(student.training, len(problem.shapes))
        if by_measuring is not None:
            chosen, prices = by_measuring.priced(problem)
            other = _Plan("start by measured KL", chosen, prices, student.divergence(chosen.masks))
            history.append(other.record)
            best = min(best, other, key=lambda plan: plan.kl)
        for number in range(1, self.rounds + 1):
            gradients = student.gradients(best.chosen.masks, next(parts))
            worths = {n: worth(best.chosen.masks[n], gradients[n], h) for n, h in curvature.items()}
            plan = min((best.towards(worths, step, f"round {number}", problem) for step in STEPS), key=lambda plan: plan.kl)
            history.append(plan.record)
            before, best = best.kl, min(best, plan, key=lambda plan: plan.kl)
            if plan.kl > (1 - LEAST_GAIN) * before:
                break
        chosen = self.with_values(student, Allocation(best.chosen.ranks, best.chosen.masks, history), best.kl)
        for record in chosen.history:
            logger.info("%s: KL %.5f on the selection text", record["step"], record["kl"])
        return chosen

    def with_values(self, student: Student, chosen: Allocation, kl: float) -> Allocation:
        """The same components with their values trained, where that is better than the `kl` of before on the selection text."""
        options, losses = self._value_training(student.training), list[float]()
        if not options.steps:
            return chosen
        trained = train_values(student, chosen.masks, options, losses)
        after = student.divergence(trained)
        record = {"step": "values", "kl": after, "losses": [float(f"{loss:.4g}") for loss in losses]}
        return replace(chosen, masks=trained if after < kl else chosen.masks, history=[*chosen.history, record])

    def value_reads(self, training: Sequence[Batch], selection: Sequence[Batch]) -> tuple[float, float]:
        """Tokens forward, the teacher's too, and back, of training values alone."""
        values = self._value_training(training)
        return 2 * values.steps * values.tokens + 2 * tokens_in(selection), values.steps * values.tokens

    def prices(self, problem: Problem) -> Prices:
        """What dropping each component costs, by the best of the first three starts."""
        fisher = problem.student.fisher(next(self._parts(problem.student.training)))
        return min(_priced_plans(problem, fisher), key=lambda plan: plan.kl).prices

    def reads(self, training: Sequence[Batch], selection: Sequence[Batch], matrices: int) -> tuple[float, float]:
        """Tokens forward and back at most, a pass of full-length factors counted as one and a half."""
        part, (forward, back) = self._part(training), self.value_reads(training, selection)
        pricing = MASKED * (1 + self.rounds) * part
        back += pricing
        forward += pricing + self.rounds * part + (len(STEPS) * self.rounds + 3) * tokens_in(selection)
        if (by_measuring := self._measuring(training, matrices)) is not None:
            forward += by_measuring.reads(training, selection, matrices)[0]
        return forward, back

    def _measuring(self, training: Sequence[Batch], matrices: int) -> KLKnapsack | None:
        """The third start."""
        if self.points is not None:
            return KLKnapsack(points=self.points) if self.points else None
        tokens = int(MEASURED * tokens_in(training) / (PART_RUN * POINTS * matrices))
        return KLKnapsack(points=POINTS, tokens=min(tokens, tokens_of_each(matrices))) if tokens >= LEAST_MEASURED else None

    def _part(self, batches: Sequence[Batch]) -> int:
        """Tokens that components are priced on at a time."""
        return min(self.pricing_tokens or max(LEAST_PART, tokens_in(batches) // 4), tokens_in(batches))

    def _value_training(self, batches: Sequence[Batch]) -> Descent:
        """As many steps as the text is worth."""
        read = VALUE_PASSES * tokens_in(batches)
        steps = min(MOST_STEPS, max(LEAST_STEPS, int(read / STEP_TOKENS))) if self.value_steps is None else self.value_steps
        tokens = min(2048, tokens_in(batches), max(STEP_TOKENS, int(read / max(steps, 1))))
        rate = self.learning_rate or LEARNING_RATE * math.sqrt(tokens / STEP_TOKENS)
        return Descent(steps, rate, tokens)

    def _parts(self, batches: Sequence[Batch]) -> Iterator[list[Batch]]:
        """Parts of the text, round and round; all of it each time where it is no more than one."""
        number = math.ceil(self._part(batches) / next(iter(batches[0].values())).numel())
        text = itertools.cycle(batches)
        while True:
            yield list(itertools.islice(text, min(number, len(batches))))


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LLRCQuick(LLRC):
    """The best of the first three starts and nothing else: where time is short, it is better spent on more text."""

    points: NonNegativeInt | None = 0
    rounds: NonNegativeInt = 0
    value_steps: NonNegativeInt | None = 0


class _Plan(NamedTuple):
    """A selection, the prices it was bought at, and what it costs on the selection text."""

    step: str
    chosen: Allocation
    prices: Prices
    kl: float

    @classmethod
    def of(cls, step: str, problem: Problem, prices: Prices) -> _Plan:
        chosen = choose(problem, prices)
        return cls(step, chosen, prices, problem.student.divergence(chosen.masks))

    def towards(self, worths: Prices, step: float, name: str, problem: Problem) -> _Plan:
        """The plan at prices that went `step` of the way to `worths`."""
        return self.of(name, problem, {n: (1 - step) * price + step * worths[n] for n, price in self.prices.items()})

    @property
    def record(self) -> dict[str, Any]:
        return {"step": self.step, "kl": self.kl}


def _priced_plans(problem: Problem, fisher: Prices) -> list[_Plan]:
    """The first three starts."""
    spectrum = measured_in_nats(problem) if problem.levels else in_nats(problem.spectra, fisher)
    both = {name: (spectrum[name] * price).sqrt() for name, price in fisher.items()}
    starts = {"mask Fisher": fisher, "the spectrum": spectrum, "both": both}
    return [_Plan.of(f"start by {name}", problem, prices) for name, prices in starts.items()]


def measured_in_nats(problem: Problem) -> Prices:
    """What dropping each component costs by the metric, sigma^2, in nats: as much as such errors were measured to cost."""
    return {name: problem.levels[name] * spectrum.double().cpu().square() for name, spectrum in problem.spectra.items()}


def in_nats(spectra: Mapping[str, Tensor], fisher: Prices) -> Prices:
    """What dropping each component costs by the metric, sigma^2, in nats: by the one factor that brings most matrices to the
    level of the mask Fisher. Not each to its own: of those that matter most, that can be far too low."""
    squares = {name: spectrum.double().cpu().square() for name, spectrum in spectra.items()}
    levels = torch.stack([fisher[name].sum() / square.sum().clamp_min(TINY) for name, square in squares.items()])
    return {name: square * levels.median() for name, square in squares.items()}


def worth(mask: Tensor | None, gradient: Tensor, curvature: Tensor) -> Tensor:
    """What each component [k] is worth in nats per token at the hard mask, to second order; never negative.

    mask: [k] of zeros and ones, None for all ones; gradient: dKL/dmask [k]; curvature: half the second derivative [k].
    """
    kept = torch.ones_like(gradient) if mask is None else mask.to(gradient)
    return (-gradient + (2 * kept - 1) * curvature).clamp_min(0)


def choose(problem: Problem, prices: Prices) -> Allocation:
    """Spend the budget on the dearest components, dense where that pays: any components, not only the first ones."""
    order = {name: price.argsort(descending=True, stable=True) for name, price in prices.items()}
    ranks = knapsack({n: prices[n][order[n]] for n in prices}, problem.shapes, problem.budget)
    masks: Masks = {}
    for name, rank in ranks.items():
        masks[name] = None
        if rank is not None:
            mask = torch.zeros(len(prices[name]))
            mask[order[name][:rank]] = 1
            masks[name] = mask
    return Allocation(ranks, masks)
