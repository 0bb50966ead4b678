"""The way of the data, from a model and text to a compressed model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise import distributed, narrowing, streaming
from rankwise.allocation.allocator import Allocator
from rankwise.allocation.plan import Ranks
from rankwise.asked import Asked, asked_for
from rankwise.choosing import block_by_block, choose, choose_block_by_block
from rankwise.errors import RankwiseError
from rankwise.evaluation.costs import costs_of_each
from rankwise.evaluation.samples import sample_texts
from rankwise.evaluation.spectra import thinned_spectra
from rankwise.footprint import Shortage
from rankwise.integration.checkpoint import refuse_output
from rankwise.integration.factorise import factorise
from rankwise.integration.quantizer import attach
from rankwise.integration.result import PAGE, SPECTRA, write_result
from rankwise.integration.weights import saving_from
from rankwise.layers.matrices import stack_experts
from rankwise.options import CompressOptions
from rankwise.plain import to_json
from rankwise.plans import Plan
from rankwise.progress import stage
from rankwise.recipe import Recipe
from rankwise.reporting.page import page_of
from rankwise.reporting.read import Result
from rankwise.run_folder import RunFolder
from rankwise.schema import Report
from rankwise.starting import Calibration


@dataclass
class Compressed:
    """`compress` returns this: the model, one rank (None: dense) per matrix, and the report as plain values.

    Block by block there is no model: it may be larger than the memory, and is in the output folder.
    """

    model: PreTrainedModel | None
    ranks: Ranks
    report: Report
    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase | None = None
    spectra: dict[str, Any] = field(default_factory=dict)

    def save(self, output: str | Path, overwrite: bool = False) -> None:
        """Write an ordinary Hugging Face folder, whole or not at all. Raises `RankwiseError` where `output` is taken."""
        if self.model is None:
            raise RankwiseError(
                "the model was written to the output folder and is not in memory: load it from there",
            )
        output = Path(output)
        files = to_look_at(output.name, self.report, self.spectra)
        write_result(output, self.model, self.tokenizer, self.ranks, self.report, self.recipe, overwrite, files)

    def hand_over(self, output: Path, folder: RunFolder, overwrite: bool) -> None:
        """Save the result of the run in `folder`, which is over with it; of several processes the first does."""
        if distributed.rank() == 0:
            folder.finish()
            with stage(f"writing {output}"):
                self.save(output, overwrite)
            folder.remove()


def folder_of(output: Path, model: object, resume: bool, overwrite: bool) -> tuple[RunFolder, bool]:
    """The run folder of a result that is to be written to `output`, and whether it may be overwritten. Raises `RankwiseError`
    where the output is taken, or is the `model` itself."""
    folder = RunFolder.beside(output, resume, overwrite)
    overwrite = overwrite or (resume and folder.finished)  # the result there is this run's own
    refuse_output(output, overwrite, model)
    return folder, overwrite


def to_look_at(name: str, report: Report, spectra: dict[str, Any]) -> dict[str, str]:
    """The page of a result, and the spectra that it draws: file name -> content."""
    return {SPECTRA: to_json(spectra) + "\n", PAGE: page_of([Result(name, report, spectra)])}


@torch.inference_mode(False)  # gradients too, whatever the caller has switched off
def compress(
    model: str | Path | PreTrainedModel | None = None,
    rate: float | None = None,
    *,
    calibration: Calibration | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allocation: str | Allocator | None = None,
    recipe: Recipe | str | Path | None = None,
    plan: Plan | str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Unpack[CompressOptions],
) -> Compressed:
    """Compress a language model by `rate` (0.2 unless told), with the rank of every matrix learned.

    model: a folder or a name for `from_pretrained`, or a model in memory, which is compressed in place; None is the bundled
        model. What `decompose` wrote is not decomposed again.
    calibration: a text source (see `read_documents`), "self" for text the model writes itself (the default), documents, each a
        text or a list of messages, windows [windows, length] of whole numbers, or your own batches, each a mapping of the
        model's inputs, as a tokenizer or a DataLoader gives them; a batch whose tensors do not all have one row for each
        sequence (the patches of pictures) is never cut.
    tokenizer: for a model in memory with calibration text.
    allocation: a name, with preset and options where wanted ("llrc:paper", "kl-knapsack points=3"), or an allocator; by default
        "llrc", of an artifact "mask-fisher", whose prices are in it.
    recipe: what is not said here, from a recipe, its file or a result folder.
    plan: instead of a rate, the ranks and bits, as they are: a plan, its file, or the `ranks.json` of a result, edited or not.
        Matrices keep their first components; values that a run has trained are no part of its plan. What is not said here comes
        from the plan's recipe.
    output: where to write the result; with `resume`, an interrupted run goes on from what it had computed.
    options: any other field of `Recipe`, with `target_bytes` and `target_speedup` instead of a rate. A run that does not fit in
        memory goes block by block, as one does where `memory` is promised.
    Raises `RankwiseError` for whatever is wrong with these, before any long work where it can be known.
    """
    asked = asked_for(model, rate, calibration, tokenizer, allocation, recipe, plan, options)
    folder = RunFolder()
    if output is not None:
        output = Path(output)
        folder, overwrite = folder_of(output, asked.model, resume, overwrite)
    folder = replace(folder, known=None if asked.artifact is None else asked.artifact.results)
    asked, short = asked.within_memory()
    if asked.recipe.memory is not None:
        with block_by_block(short):
            return _compress_streamed(asked, output, overwrite, folder, short)
    closer = asked.recipe.effort != "quick"  # matrices are measured by themselves in the end
    with choose(asked, folder, closer, loadable=output is not None) as found:
        run, student, masks = found.run, found.student, found.chosen.masks
        costs, tokens = costs_of_each(student, masks, run.data.measuring) if closer else ({}, 0)
        found.clock.lap("looking closer")
        if asked.refinements:
            found = found.refined(asked.refinements)
        samples = sample_texts(student, masks, run.data.measuring, run.tokenizer)
        spectra = thinned_spectra(student.decompositions, masks)
        found.clock.lap("samples")
    report = found.report()
    layers = student.decompositions, masks, run.experts, found.recipe.form, found.chosen.bits, student.shipped
    attach(run.model, factorise(run.model, *layers, sizes=run.sizes))
    report |= {"costs": {"tokens": tokens, "kl": costs}, "samples": samples}
    result = Compressed(run.model, found.chosen.ranks, report, found.recipe, run.tokenizer, spectra)
    if output is not None:
        result.hand_over(output, folder, overwrite)
    return result


@torch.inference_mode(False)
def plan(
    model: str | Path | PreTrainedModel | None = None,
    rate: float | None = None,
    *,
    calibration: Calibration | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allocation: str | Allocator | None = None,
    recipe: Recipe | str | Path | None = None,
    plan: Plan | str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Unpack[CompressOptions],
) -> Plan:
    """Choose ranks and bits as `compress` does, predict what they cost, and stop there; a model in memory stays as it is.

    output: the file to write the plan to; a run block by block keeps its results beside it. plan: to predict what an edited
    one costs. All others as of `compress`, `RankwiseError` too.
    """
    asked = replace(
        asked_for(model, rate, calibration, tokenizer, allocation, recipe, plan, options), refinements=[], planning=True
    )
    folder = RunFolder()
    if output is not None:
        output = Path(output)
        if output.is_dir() or (output.exists() and not overwrite):
            raise RankwiseError(f"the plan's file {output} is there already: name another, or overwrite it (--overwrite)")
        folder = RunFolder.beside(output, resume, overwrite)
    folder = replace(folder, known=None if asked.artifact is None else asked.artifact.results)
    asked, short = asked.within_memory()
    if asked.recipe.memory is not None:
        with block_by_block(short):
            made = choose_block_by_block(asked, folder, short).plan()
    else:
        with choose(asked, folder) as found:
            made = found.plan()
        narrowing.put_back(found.run.model, found.student.originals)
        stack_experts(found.run.model, found.run.experts)
    if output is not None and distributed.rank() == 0:
        made.save(output)
        folder.remove()
    return made


def _compress_streamed(
    asked: Asked, output: Path | None, overwrite: bool, folder: RunFolder, short: Shortage | None
) -> Compressed:
    """`compress` with one block in memory at a time; the result is in `output` only. short: why, where it was not asked for."""
    found = choose_block_by_block(asked, folder, short)
    run, chosen, recipe, report = found.run, found.chosen, found.recipe, found.report()
    if output is not None and distributed.rank() == 0:
        folder.finish()
        compressed, values = streaming.factorise(found.stream, found.student, chosen, recipe.form)
        with saving_from(found.stream.blocks.block_of, values):
            files = to_look_at(output.name, report, thinned_spectra(found.student.decompositions, chosen.masks))
            write_result(output, compressed, run.tokenizer, chosen.ranks, report, recipe, overwrite, files)
        folder.remove()
    return Compressed(None, chosen.ranks, report, recipe, run.tokenizer)
