"""`rankwise refine`: win back some of what a finished folder has lost, its sizes unchanged."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise import bundled, stages, starting
from rankwise.allocation.plan import Ranks
from rankwise.allocation.problem import Allocation
from rankwise.calibration.data import listed
from rankwise.calibration.text import refuse_unused
from rankwise.calibration.tokens import Batch, written
from rankwise.errors import RankwiseError
from rankwise.evaluation.evaluate import refuse_unrelated
from rankwise.evaluation.protocols import JudgingText, own_source, read_judging_text
from rankwise.evaluation.samples import sample_texts
from rankwise.footprint import shortage
from rankwise.integration.checkpoint import load_compressed
from rankwise.integration.files import read_json
from rankwise.integration.result import REPORT, SPECTRA, read_ranks, read_recipe
from rankwise.layers.lowrank import LowRankLinear
from rankwise.layers.matrices import stack_experts, stacked_on_failure, unstack_experts
from rankwise.layers.precision import widened
from rankwise.layers.quantised import QuantisedEmbedding, QuantisedLinear
from rankwise.masks.student import Student
from rankwise.memory import peak_memory
from rankwise.options import RefineOptions
from rankwise.pipeline import Compressed, folder_of
from rankwise.recipe import IN_MEMORY, Recipe
from rankwise.refinement.refinement import Refinement, refinements_named
from rankwise.run_folder import RunFolder
from rankwise.schema import VERSION, Report
from rankwise.starting import Calibration, Run

CHANGED = LowRankLinear, QuantisedLinear, QuantisedEmbedding  # layers that no original has
JUDGED = 2**12  # tokens of another text that a refinement must not make worse


@torch.inference_mode(False)
def refine(
    folder: str | Path,
    reference: str | Path | PreTrainedModel | None = None,
    *,
    refine: str = "distil",
    calibration: Calibration | None = None,
    text: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Unpack[RefineOptions],
) -> Compressed:
    """Train a folder's weights against the model it was made from, at the same ranks and bytes.

    folder: what `compress` wrote. reference: the original model; None is the bundled one. refine: refinements with commas
        between, as of `compress`. calibration, tokenizer, output, overwrite, resume, options: as of `compress`; what is not said
        is as the folder's recipe says.
    text: a text of another source, as of `evaluate`; a refinement that raises the KL there is taken back.
    Raises `RankwiseError` for whatever is wrong with these, before any long work where it can be known.
    """
    folder, reference = Path(folder), bundled.MODEL if reference is None else reference
    refinements, ranks = refinements_named(refine), read_ranks(folder)
    if not refinements:
        raise RankwiseError("name a refinement, such as refine='distil'")
    (report, spectra), before = _read(folder), read_recipe(folder) or Recipe.of()
    if calibration is None and before.calibration == IN_MEMORY:
        calibration = "self"
    recipe = _recipe(before, calibration, text, refine, options)
    calibration = listed(recipe.calibration if calibration is None else calibration)
    judging = None if text is None else read_judging_text(text, recipe.text_column, recipe.dataset_options)
    run_folder = RunFolder()
    if output is not None:
        run_folder, overwrite = folder_of(Path(output), reference, resume, overwrite)
    short = shortage(reference, calibration, recipe, [], trains=True)
    if short is not None:
        raise short.refusal("refine trains the whole model at once")
    compressed = load_compressed(folder, recipe.dtype, recipe.device)

    def rehearse(run: Run) -> list[Batch]:
        refuse_unrelated(compressed, run.model, str(folder), run.base)
        for refinement in refinements:
            refinement.try_out(run.model, run.shapes, run.data.training[0])
        return [] if judging is None else _batches(run, judging)

    run = starting.start(reference, calibration, tokenizer, recipe, [], run_folder, rehearse=rehearse)
    with stacked_on_failure(run.model, run.experts):
        found = _train(run, compressed, ranks, refinements, rehearse(run))
    stack_experts(run.model, run.experts)
    done = before.model_copy(update={"refine": ", ".join(filter(None, [before.refine, refine]))})
    report |= found | {
        "version": VERSION,
        "history": report["history"] + found["history"],
        "seconds": report["seconds"] | {"refinement": report["seconds"].get("refinement", 0) + found["seconds"]["refinement"]},
        "conversations": run.data.conversations,
        "refined_on": recipe.calibration,
        "recipe": done.model_dump(),
    }
    result = Compressed(compressed, ranks, cast(Report, report), done, run.tokenizer, spectra)
    if output is not None:
        result.hand_over(Path(output), run_folder, overwrite)
    return result


def _recipe(before: Recipe, calibration: Calibration | None, text: str | None, refine: str, options: Mapping[str, Any]) -> Recipe:
    """The folder's recipe with what is asked for. Raises `RankwiseError` for what cannot be."""
    asked = {name: value for name, value in options.items() if value is not None} | {"memory": None, "refine": refine}
    if calibration is not None:
        asked["calibration"] = str(calibration) if isinstance(calibration, str | Path) else IN_MEMORY
    recipe = Recipe.of(**before.under(asked))
    refuse_unused([recipe.calibration, *filter(None, [own_source(text or "")])], recipe.text_column, recipe.dataset_options)
    return recipe


def _batches(run: Run, judging: JudgingText) -> list[Batch]:
    """Some of a text, in windows as long as those of the run's."""
    length = written(run.data.training[0]).shape[1]
    return stages.judging_batches(run, {"": judging}, max(1, JUDGED // length), run.seed)[""]


def _train(
    run: Run, compressed: PreTrainedModel, ranks: Ranks, refinements: Sequence[Refinement], other: Sequence[Batch]
) -> dict[str, Any]:
    """Refine the compressed model in place, as far as it differs from the run's; what there is to report."""
    stacked, since = unstack_experts(compressed), time.perf_counter()
    with widened(run.model, compressed):
        student = Student(run.model, {}, run.data.training, run.data.selection, run.seed)
        student.shipped = changed_modules(compressed, run.model)
        chosen = Allocation(ranks, dict.fromkeys(student.shipped))
        before = stages.measure(student, chosen, run.data.measuring)
        student.shipped, history = stages.refine(run, student, student.shipped, refinements, other)
        after = stages.measure(student, chosen, run.data.measuring)
        samples = sample_texts(student, chosen.masks, run.data.measuring, run.tokenizer)
    for name, layer in student.shipped.items():
        compressed.get_submodule(name).load_state_dict(layer.state_dict())
    stack_experts(compressed, stacked)
    return {
        **after.to_dict(),
        "before_refinement": before.to_dict(),
        "history": history,
        "samples": samples,
        "seconds": {"refinement": round(time.perf_counter() - since, 2)},
        "peak_memory_bytes": peak_memory(),
    }


def changed_modules(compressed: nn.Module, original: nn.Module) -> dict[str, nn.Module]:
    """The modules of the compressed model that hold other values than the original's at the same path, or have another class."""
    theirs = dict(original.named_modules())
    pairs = [(path, module) for path, module in compressed.named_modules() if path in theirs]
    return {path: module for path, module in pairs if isinstance(module, CHANGED) or _differs(module, theirs[path])}


def _differs(module: nn.Module, other: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    pairs = [(own[name], value) for name, value in other.named_parameters(recurse=False) if name in own]
    return any(not torch.equal(ours, value.to(ours)) for ours, value in pairs)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report and the spectra of a result folder. Raises `RankwiseError` where there are none."""
    for name in (REPORT, SPECTRA):
        if not (folder / name).exists():
            raise RankwiseError(f"{folder} has no {name}: give a folder that compress wrote")
    return read_json(folder / REPORT), read_json(folder / SPECTRA)
