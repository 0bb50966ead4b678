"""What was asked for: keywords, recipe, plan and artifact brought together, and defaults where nothing is said."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise import bundled, distributed, narrowing
from rankwise.allocation.allocator import FORWARD_ONLY, Allocator, allocator_named, is_known, known_as, spelled
from rankwise.allocation.given import Given, of_plan
from rankwise.calibration.data import listed
from rankwise.calibration.text import refuse_unused
from rankwise.decomposition.metric import metric_named
from rankwise.errors import RankwiseError
from rankwise.footprint import Shortage, shortage
from rankwise.integration.artifact import Artifact
from rankwise.integration.checkpoint import refuse_elsewhere
from rankwise.memory import gigabytes
from rankwise.options import CompressOptions
from rankwise.plans import Plan
from rankwise.recipe import ALL, FEWER, IN_MEMORY, MIXED, Recipe
from rankwise.refinement.refinement import Refinement, refinements_named
from rankwise.starting import Calibration

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What was asked for, as far as it is known without the model. neurons_said: whether they were asked for, too;
    planning: whether a plan is all that is wanted."""

    model: str | Path | PreTrainedModel
    calibration: Calibration
    tokenizer: PreTrainedTokenizerBase | None
    recipe: Recipe
    allocator: Allocator
    artifact: Artifact | None
    refinements: list[Refinement]
    neurons_said: bool = True
    planning: bool = False

    @property
    def metric(self) -> str:
        return str(self.recipe.decomposition)

    @property
    def trains(self) -> bool:
        return not isinstance(self.allocator, FORWARD_ONLY)

    def within_memory(self) -> tuple[Asked, Shortage | None]:
        """The same with a promise of memory where the run does not fit without, and why."""
        if (idle := distributed.idle_gpus(self.recipe.device)) is not None:
            logger.warning(idle)
        if self.recipe.memory:
            return self, None
        short = shortage(self.model, self.calibration, self.recipe, [self.metric], self.trains)
        if short is None:
            return self, None
        if self.recipe.narrows and not self.neurons_said:
            whole = replace(self, recipe=self.recipe.model_copy(update={"neurons": ALL}))
            if shortage(self.model, self.calibration, whole.recipe, [self.metric], self.trains) is None:
                logger.warning("with fewer neurons it %s: all neurons stay (--neurons fewer goes block by block)", short)
                return whole, None
        return replace(self, recipe=self.recipe.model_copy(update={"memory": gigabytes(short.promise)})), short


def asked_for(
    model: str | Path | PreTrainedModel | None,
    rate: float | None,
    calibration: Calibration | None,
    tokenizer: PreTrainedTokenizerBase | None,
    allocation: str | Allocator | None,
    recipe: Recipe | str | Path | None,
    plan: Plan | str | Path | None,
    options: CompressOptions,
) -> Asked:
    """The keywords of `compress` with defaults, recipe, plan and artifact taken into account. Raises `RankwiseError`."""
    asked: dict[str, Any] = {"rate": rate, "calibration": calibration, "allocation": allocation, **options}
    fields = {name: value for name, value in asked.items() if value is not None}
    if plan is not None:
        if "allocation" in fields or "keep" in fields:
            raise RankwiseError("a plan names every rank itself: remove allocation and keep")
        plan = plan if isinstance(plan, Plan) else Plan.read(plan)
        fields |= {"ranks": dict(plan.ranks), "kept_neurons": dict(plan.kept_neurons), "widths": dict(plan.bits)}
        recipe = plan.recipe if recipe is None else recipe
    if recipe is not None:
        fields = (recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)).under(fields)
    calibration = fields.pop("calibration", None)
    if model is None:
        model, calibration = bundled.MODEL, "stdlib:train" if calibration is None else calibration
    refuse_elsewhere(model)
    calibration = listed(calibration)
    artifact = Artifact.at(model)
    allocation = fields.pop("allocation", _usual(fields, artifact))
    if fields.get("ranks") is not None and isinstance(allocation, str) and not is_known(allocation):
        allocation = Given({})  # an allocator of somebody's own has chosen them
    if artifact is not None:
        fields = artifact.options(calibration, fields)
        calibration = artifact.windows()
    calibration = "self" if calibration is None else calibration
    settled, allocator = _recipe(calibration, allocation, fields)
    if settled.ranks is not None:
        allocator = of_plan(dict(settled.ranks), allocator)
    refuse_unused([settled.calibration], settled.text_column, settled.dataset_options)
    neurons_said = settled.neurons is not None or bool(settled.kept_neurons)
    if settled.neurons is None:
        said = settled.ranks is not None or artifact is not None or settled.in_bits
        fewer = not said and narrowing.by_default(allocator, str(settled.decomposition))
        settled = settled.model_copy(update={"neurons": FEWER if fewer else ALL})
    refinements = refinements_named(settled.refine or "")
    return Asked(model, calibration, tokenizer, settled, allocator, artifact, refinements, neurons_said)


def _usual(fields: Mapping[str, Any], artifact: Artifact | None) -> str:
    """The allocation where none is named."""
    if fields.get("bits") not in (None, "stored"):
        return MIXED
    if artifact is not None:
        return "mask-fisher"
    if fields.get("ranks") is not None:
        return "llrc:quick"  # of ranks that nobody tells more of, no values are trained
    return "llrc:quick" if fields.get("effort") == "quick" and "preset" not in fields else "llrc"


def _recipe(calibration: Calibration, allocation: str | Allocator, options: dict[str, Any]) -> tuple[Recipe, Allocator]:
    """The recipe with the decomposition settled, and its allocator."""
    source = str(calibration) if isinstance(calibration, str | Path) else IN_MEMORY
    name, preset, own = spelled(allocation) if isinstance(allocation, str) else known_as(allocation)
    asked, more = options.get("preset", preset), options.get("options", {})
    if preset not in ("default", asked):
        raise RankwiseError(f"allocation {allocation!r} and preset {asked!r} are two presets: name one")
    options = options | {"preset": asked, "options": {**own, **more} if isinstance(more, Mapping) else more}
    recipe = Recipe.of(**{"calibration": source, "allocation": name} | options)
    if isinstance(allocation, str):
        allocation = allocator_named(recipe.allocation, recipe.preset, recipe.options)
        typed = {name: getattr(allocation, name) for name in recipe.options}  # words became numbers
        recipe = recipe.model_copy(update={"options": typed})
    metric = allocation.decomposition if recipe.decomposition is None else recipe.decomposition
    if recipe.in_bits and "input" not in metric_named(metric).NEEDS:
        raise RankwiseError(
            f"bits need the second moment of the inputs, which {metric} does not use: remove decomposition",
        )
    if recipe.narrows:
        narrowing.refuse_metric(metric)
    return recipe.model_copy(update={"decomposition": metric}), allocation
