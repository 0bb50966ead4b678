"""`rankwise decompose`: all that any rate needs, computed once (see `integration/artifact.py`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise import bundled, distributed, stages, starting
from rankwise.calibration.data import listed
from rankwise.calibration.text import refuse_unused
from rankwise.decomposition.metric import metric_named
from rankwise.errors import RankwiseError
from rankwise.footprint import shortage
from rankwise.integration.artifact import PRICES, RESULTS, WINDOWS, Artifact
from rankwise.integration.checkpoint import refuse_elsewhere, refuse_output, written_whole
from rankwise.integration.result import save_model
from rankwise.layers.matrices import stack_experts, stacked_on_failure
from rankwise.layers.precision import widened
from rankwise.options import DecomposeOptions
from rankwise.recipe import IN_MEMORY, Recipe
from rankwise.run_folder import RunFolder, write_tensors
from rankwise.starting import Calibration


@torch.inference_mode(False)
def decompose(
    model: str | Path | PreTrainedModel | None,
    output: str | Path,
    *,
    calibration: Calibration | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Unpack[DecomposeOptions],
) -> Artifact:
    """Write to `output` an artifact from which `compress` and `from_pretrained` make any rate in seconds.

    model, calibration, tokenizer, overwrite, resume, options: as of `compress`; a model in memory stays as it is. The calibration
    is text or windows of tokens. Raises `RankwiseError`.
    """
    if model is None:
        model, calibration = bundled.MODEL, "stdlib:train" if calibration is None else calibration
    refuse_elsewhere(model)
    calibration = "self" if calibration is None else listed(calibration)
    source = str(calibration) if isinstance(calibration, str | Path) else IN_MEMORY
    recipe = Recipe.of(**{"calibration": source, "decomposition": "kronecker", **options})
    refuse_unused([recipe.calibration], recipe.text_column, recipe.dataset_options)
    metric = str(recipe.decomposition)
    needs = metric_named(metric).NEEDS
    if distributed.size() > 1:
        raise RankwiseError("decompose runs in one process: run it without torchrun")
    refuse_output(Path(output), overwrite, model)
    folder = RunFolder.beside(Path(output), resume, overwrite)

    short = shortage(model, calibration, recipe, [metric], trains=True)
    if short is not None:
        raise short.refusal("compress goes block by block")
    run = starting.start(model, calibration, tokenizer, recipe, [], folder)
    with stacked_on_failure(run.model, run.experts):
        run = starting.in_metric(run, metric)
        windows = run.data.windows
        if windows is None:
            raise RankwiseError("decompose keeps its calibration text: give it text or windows of tokens, not batches")
        with widened(run.model):
            statistics = stages.collect_statistics(run, needs)
            student = stages.student_of(run, stages.decompose_all(run, statistics, metric), metric)
            prices = student.fisher()
        parameters = run.model.num_parameters()
    stack_experts(run.model, run.experts)
    with written_whole(Path(output), overwrite) as whole:
        save_model(whole, run.model, run.tokenizer, run.base)
        artifact = Artifact(whole, recipe, run.identity, run.shapes, parameters, run.data.conversations)
        artifact.write()
        folder.hand_over(whole / RESULTS)
        write_tensors(artifact.results / WINDOWS, {"windows": windows})
        write_tensors(artifact.results / PRICES, prices)
    return replace(artifact, folder=Path(output))
