"""The result folder: an ordinary Hugging Face folder, with the ranks, the recipe and the report beside the weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.allocation.allocator import spelling
from rankwise.allocation.plan import write_ranks
from rankwise.errors import RankwiseError
from rankwise.integration.artifact import FILE as ARTIFACT
from rankwise.integration.beside import copy_beside
from rankwise.integration.checkpoint import load_config, quantization_of, refuse_foreign, skeleton, written_whole
from rankwise.integration.files import read_json, refuse_odd_files
from rankwise.integration.quantizer import METHOD
from rankwise.layers.linear import is_linear
from rankwise.layers.lowrank import PairLinear
from rankwise.layers.matrices import Shape, find_matrices, unstack_experts
from rankwise.plain import shown, to_json
from rankwise.recipe import FILE as RECIPE
from rankwise.recipe import Recipe

MAX_SHARD_SIZE = "5GB"
RANKS, REPORT, SPECTRA, PAGE = "ranks.json", "report.json", "spectra.json", "report.html"
EVALUATION, SPEED = "evaluation.json", "speed.json"  # where they were added
OWN = (RANKS, RECIPE, REPORT, SPECTRA, PAGE, EVALUATION, SPEED, ARTIFACT, "README.md")  # of their own folder


def save_model(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase | None, original: str | Path) -> None:
    """Write a model, its tokenizer, and what lies beside the weights of its `original`, a folder or a name."""
    _untie(model)
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    copy_beside(original, folder, OWN)


def _untie(model: Any) -> None:
    """Have the config say that weights are not tied, where it says they are and each has values of its own."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            own = dict(part.named_parameters(remove_duplicate=False))
            pairs = part.get_expanded_tied_weights_keys().items()
            if pairs and all(own.get(one) is not own.get(other) for one, other in pairs):
                part.config.tie_word_embeddings = False


def write_result(
    output: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    ranks: Mapping[str, int | None],
    report: Mapping[str, Any],
    recipe: Recipe,
    overwrite: bool = False,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write everything to `output`, `files` (name -> text) too, whole or not at all.

    Raises `RankwiseError` where it is taken or cannot be written.
    """
    with written_whole(output, overwrite) as folder:
        save_model(folder, model, tokenizer, report["base_model"])
        write_ranks(folder / RANKS, ranks)
        recipe.write(folder / RECIPE)
        (folder / REPORT).write_text(to_json(report, indent=1) + "\n")
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        model_card(output.name, type(model).__name__, report, recipe).save(folder / "README.md")


def read_ranks(folder: Path) -> dict[str, int | None]:
    """The ranks of a result folder. Raises `RankwiseError` where they are missing, no ranks, or not those of its weights."""
    file = folder / RANKS
    refuse_odd_files(folder)
    if not os.path.exists(file):
        raise RankwiseError(f"{folder} has no {RANKS}: it was not written by rankwise")
    ranks = read_json(file)
    good = isinstance(ranks, dict) and all(r is None or (type(r) is int and r > 0) for r in ranks.values())
    if not good:
        raise RankwiseError(f"{file} is not an object of matrices and their ranks (a positive number, or null for dense)")
    stored = quantization_of(load_config(folder)).get("ranks", {})
    factorised = {name: rank for name, rank in ranks.items() if rank is not None}
    for name in sorted(stored.keys() | factorised.keys()):
        written, kept = factorised.get(name, "dense"), stored.get(name, "dense")
        if written != kept:
            raise RankwiseError(
                f"{file} was edited: for {name} it says {written}, but the weights have {kept}. "
                "Undo the edit, or apply it with compress --plan",
            )
    return ranks


def read_recipe(folder: Path) -> Recipe | None:
    """The recipe of a result folder, or None where it has none. Raises `RankwiseError` for one that is none."""
    return Recipe.read(folder) if os.path.exists(folder / RECIPE) else None


def read_shapes(folder: Path, ranks: Mapping[str, int | None]) -> dict[str, Shape]:
    """The shape of every matrix in `ranks` in the original. Raises `RankwiseError` for one that it does not have, and where the
    weights in the folder are not those that its config describes."""
    config = load_config(folder)
    refuse_foreign(folder, config)
    return shapes_in(config, ranks, folder / RANKS)


def ranks_in(model: PreTrainedModel) -> dict[str, int | None]:
    """The ranks of a compressed model in memory, None for the dense ones of the matrices that may be compressed unless told.
    Raises `RankwiseError` for a model that rankwise has not compressed."""
    stored = quantization_of(model.config)
    if stored.get("quant_method") != METHOD:
        raise RankwiseError(f"the {type(model).__name__} was not compressed by rankwise: its config has no ranks")
    empty = skeleton(model.config)
    unstack_experts(empty)
    return {**dict.fromkeys(find_matrices(empty)[0]), **stored["ranks"]}


def shapes_in(config: Any, ranks: Mapping[str, int | None], where: object) -> dict[str, Shape]:
    """The shape of every matrix in `ranks`, which are those in `where`, in the original. Raises `RankwiseError` for one that the
    config's model does not have."""
    model, quantization = skeleton(config), quantization_of(config)
    form, affine = quantization.get("form", PairLinear.form), quantization.get("affine", False)
    unstack_experts(model)
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    unknown = sorted(ranks.keys() - linear.keys())
    if unknown:
        raise RankwiseError(f"{where} has a rank for {unknown[0]}, a matrix that {type(model).__name__} does not have")
    return {name: Shape.of(linear[name], form, affine) for name in ranks}


def narrowed(shapes: Mapping[str, Shape], config: Any) -> dict[str, Shape]:
    """The shapes of an original's matrices as they are in a result with that config, where MLPs may have lost neurons."""
    sizes = quantization_of(config).get("sizes", {})
    sides = {name: dict(zip(("out_features", "in_features"), sizes[name], strict=False)) for name in shapes.keys() & sizes.keys()}
    return {name: replace(shape, **sides.get(name, {})) for name, shape in shapes.items()}


def _asked(recipe: Recipe) -> str:
    if recipe.target_bytes is not None:
        return f"At most {recipe.target_bytes:,} bytes"
    if recipe.target_speedup is not None:
        return f"A speed-up of {recipe.target_speedup}"
    if recipe.ranks is not None:
        return "The ranks of a plan"
    if recipe.width is not None:
        return f"{recipe.width} bits for every matrix"
    return f"Rate {recipe.rate}"


def _made(report: Mapping[str, Any], recipe: Recipe) -> str:
    """What became of the original's weight matrices."""
    low_rank = any(report["ranks"].values())
    if not report.get("bits"):
        fewer = f"{report['achieved_rate'][recipe.scope]:.1%} fewer parameters (scope: {recipe.scope})"
        narrow = f" and {len(report['neurons'])} MLPs have fewer hidden neurons" if report.get("neurons") else ""
        return f"with {fewer}: its weight\nmatrices are of low rank{narrow}, as chosen by rankwise for each."
    size, widths = report["bytes"]["model"], sorted(set(report["bits"].values()))
    smaller = f"in {1 - size['compressed'] / size['reference']:.1%} fewer bytes"
    bits = f"{', '.join(map(str, widths))} bits" + (", some of low rank," if low_rank else "")
    return f"{smaller}: its weight\nmatrices are written in {bits} by rankwise."


def model_card(name: str, cls: str, report: Mapping[str, Any], recipe: Recipe) -> ModelCard:
    """The card of a `cls`: how to load it, what it is made from and how, what it measured."""
    data = ModelCardData(
        base_model=report["base_model"] if "/" in report["base_model"] and not Path(report["base_model"]).exists() else None,
        base_model_relation="quantized",
        library_name="transformers",
        tags=["rankwise", *(["low-rank"] if any(report["ranks"].values()) else []), "compressed"],
    )
    model, linear = report["parameters"]["model"], report["parameters"]["linear"]
    perplexity = ""
    if report["perplexity"] is not None:
        before, after = (shown(report[name], "{:.3f}".format) for name in ("reference_perplexity", "perplexity"))
        perplexity = f"| perplexity | {before} | {after} |\n"
    agreement = "" if report["agreement"] is None else f"| same most likely token | | {report['agreement']:.2%} |\n"
    refined = f"refined by {recipe.refine}, " if recipe.refine else ""
    method = spelling(recipe.allocation, recipe.preset, recipe.options)
    content = f"""---
{data.to_yaml()}
---

# {name}

{report["base_model"]} {_made(report, recipe)}

```python
import rankwise  # teaches transformers this format
from transformers import {cls}

model = {cls}.from_pretrained("{name}")
```

Without `import rankwise`, loading stops with a size mismatch. `rankwise densify` writes a copy that needs no rankwise.

## Measured cost

On {report["windows"]} windows ({report["tokens"]:,} predicted tokens) of the calibration text that neither statistics nor masks
have seen.

| | original | compressed |
|---|---|---|
| parameters, whole model | {model["reference"]:,} | {model["compressed"]:,} |
| parameters, compressible matrices | {linear["reference"]:,} | {linear["compressed"]:,} |
| bytes of weights | {report["bytes"]["model"]["reference"]:,} | {report["bytes"]["model"]["compressed"]:,} |
{perplexity}| KL(original to compressed), nats per token | | {shown(report["kl"], "{:.5f}".format)} |
{agreement}
## Method

{_asked(recipe)}, scope {recipe.scope}, decomposition {recipe.decomposition}, allocation {method},
calibration {recipe.calibration}, {refined}seed {recipe.seed}. All options are in `{RECIPE}`, the ranks in
`{RANKS}`, everything measured in `{REPORT}`.
"""
    return ModelCard(content, ignore_metadata_errors=True)
