"""How long a run will take: the tokens that each stage reads, at the speed that the model has on a first batch here. It is said
before the work, and what is left of it after each stage, by how the stages before have kept to theirs."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from rankwise import slicing
from rankwise.calibration.batches import first_tokens
from rankwise.calibration.moments import GRADIENTS
from rankwise.calibration.signal import divergence, frozen, signal_of
from rankwise.calibration.tokens import tokens_in
from rankwise.decomposition.metric import metric_named
from rankwise.evaluation.costs import tokens_of_each
from rankwise.layers.trellis import TABLES
from rankwise.memory import give_back
from rankwise.progress import say
from rankwise.refinement.refinement import Refinement
from rankwise.starting import Run

logger = logging.getLogger(__name__)
PROBE = 256  # tokens that the speed is measured on
BACK = 1.5  # what a pass back costs, of a pass forward
MOMENTS = 1.6  # what adding them up makes of a pass
SOLVED = 1.5e10  # operations of a decomposition a second
STATE = 260  # operations for a number and a state of a trellis
LATER = 0.55  # of a model, that a measurement of one matrix runs
FOUND = 0.1  # of its time: a stage that took less found its result from an earlier run, and tells nothing of the pace


@dataclass
class Estimate:
    """expected: seconds of each stage by name, as planned; taken: what those that are over took."""

    expected: dict[str, float]
    taken: dict[str, float]

    @classmethod
    def of(
        cls,
        run: Run,
        metric: str,
        allocator: Any,
        alone: int,
        refinements: Sequence[Refinement],
        widths: Collection[int] = (),
        narrows: bool = False,
    ) -> Estimate:
        """The stages of `compress`, which measures `alone` matrices by themselves in the end; 0 for an allocation that does not
        tell what it `reads`: tokens forward and back.

        allocator: None where nothing is chosen, and no matrix decomposed. widths: the bits in which each matrix is rounded
        before it; narrows: whether MLPs may lose neurons before it.
        """
        needs, data = metric_named(metric).NEEDS, run.data
        back = BACK if GRADIENTS & needs else 0.0
        matrices = len(run.shapes)
        asks = hasattr(allocator, "reads")
        read = allocator.reads(data.training, data.selection, matrices) if asks else (0.0, 0.0)
        refining = [sum(parts) for parts in zip((0.0, 0.0), *(r.reads(data.training) for r in refinements), strict=True)]
        second = _seconds_of_a_token(run)
        solving = sum(s.full_rank**2 * (9 * s.full_rank + 6 * max(s.out_features, s.in_features)) for s in run.shapes.values())
        later = {"refinement": second * (refining[0] + BACK * refining[1])} if refinements else {}
        narrowing = {"narrowing": second * LATER * slicing.MEASURED + _ordering(run) / SOLVED} if narrows else {}
        return cls(
            {
                "calibration": second * tokens_in(data.training) * (1 + back) * MOMENTS * bool(needs),
                "decomposition": solving / SOLVED * (allocator is not None),
                **narrowing,
                "allocation": second * (read[0] + BACK * read[1]) + _rounding(run, widths) / SOLVED,
                "measuring": second * 2 * tokens_in(data.measuring),
                "looking closer": second * LATER * alone * tokens_of_each(alone),
            }
            | later,
            {},
        )

    def __str__(self) -> str:
        """What is left, in hours and minutes, the part of each stage in brackets."""
        worked = [stage for stage, seconds in self.taken.items() if seconds > FOUND * self.expected[stage] > 0]
        pace = sum(self.taken[stage] for stage in worked) / sum(self.expected[stage] for stage in worked) if worked else 1.0
        left = {stage: pace * seconds for stage, seconds in self.expected.items() if stage not in self.taken}
        parts = ", ".join(f"{stage} {tqdm.format_interval(seconds)}" for stage, seconds in left.items() if seconds >= 1)
        return f"about {tqdm.format_interval(sum(left.values()))} to go" + (f" ({parts})" if parts else "")

    def after(self, stage: str, seconds: float) -> None:
        """Say what is left once a stage is over."""
        if stage in self.expected:
            self.taken[stage] = seconds
            if len(self.taken) < len(self.expected):
                say(str(self))


@dataclass
class Clock:
    """Seconds of each stage, by name; with an estimate, what is left is said after each."""

    seconds: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)
    estimate: Estimate | None = None

    def lap(self, name: str) -> None:
        """The stage `name` is over, and what it has freed is given back."""
        give_back()
        now = time.perf_counter()
        self.seconds[name], self.since = round(now - self.since, 2), now
        logger.info("%s took %.1f s", name, self.seconds[name])
        if self.estimate is not None:
            self.estimate.after(name, self.seconds[name])


def _ordering(run: Run) -> float:
    """Operations of ordering the neurons of MLPs, which are taken for the inputs of all matrices with fewer outputs."""
    return sum(4 * shape.in_features**3 for shape in run.shapes.values() if shape.in_features > shape.out_features)


def _rounding(run: Run, widths: Collection[int]) -> float:
    """Operations of rounding in these bits, the errors of the roundings and the factors of both moments with it."""
    sides = [(shape.out_features, shape.in_features) for shape in run.shapes.values()]
    paths = sum(STATE * len(TABLES[bits]) for bits in widths if bits in TABLES)
    return sum(m * n * (len(widths) * (3 * m + 5 * n) + paths) + 3 * (m**3 + n**3) for m, n in sides if widths)


def _seconds_of_a_token(run: Run) -> float:
    """Of a pass forward and its logits, measured."""
    batches = first_tokens(run.data.training, PROBE)
    with frozen(run.model), torch.no_grad():
        for _ in range(2):  # the first time is longer
            since = time.perf_counter()
            for batch in batches:
                signal = signal_of(run.model, batch)
                divergence(signal, signal)
    return (time.perf_counter() - since) / tokens_in(batches)
