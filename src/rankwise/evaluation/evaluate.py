"""`rankwise evaluate`: a compressed model against the one it was made from, on any text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.calibration.chat import count_conversations
from rankwise.calibration.signal import frozen
from rankwise.calibration.text import refuse_unused
from rankwise.calibration.tokens import refuse_foreign, window_length, windows_of
from rankwise.errors import RankwiseError
from rankwise.evaluation.gap import gaps
from rankwise.evaluation.generation import prompts_of, tokenised
from rankwise.evaluation.pair import Pair
from rankwise.evaluation.protocols import own_source, read_judging_text
from rankwise.evaluation.size import Size
from rankwise.evaluation.tasks import load_tasks
from rankwise.integration.checkpoint import (
    load_compressed,
    load_config,
    load_model,
    load_tokenizer,
    quantization_of,
    refuse_compressed,
    skeleton,
)
from rankwise.integration.files import weight_files
from rankwise.integration.result import narrowed, ranks_in, read_ranks, read_recipe, read_shapes, shapes_in
from rankwise.layers.matrices import stack_experts, unstack_experts
from rankwise.layers.precision import widened
from rankwise.layers.quantised import QuantisedEmbedding
from rankwise.run_folder import RunFolder


def evaluate(
    model: str | Path | PreTrainedModel,
    reference: str | Path | PreTrainedModel,
    text: str | Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    shots: int | None = None,
    prompts: Sequence[str] = (),
    length: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    text_column: str = "text",
    dataset_options: Mapping[str, str] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    cache: str | Path | None = None,
) -> dict[str, Any]:
    """Compare the compressed `model` with `reference` in one run, both on the same tokens and items.

    model, reference: a folder that rankwise wrote and the original's folder or name, or either in memory, which stays as it is,
        where it is and in its dtype.
    tokenizer: for a reference in memory.
    text: one text or several (see `read_judging_text`): all of each in non-overlapping windows of `length` tokens (default: the
        reference's context, at most 2048), or `samples` of them, drawn at random. The first one is the headline, its figures
        stand at the top; every text's are under "texts", with the gap to the first (see `gaps`).
    tasks: of lm-evaluation-harness, by name or as YAML files; `limit` and `shots` as in `load_tasks`.
    prompts: to be continued by both models; by default beginnings of the first text's windows.
    cache: the folder in which results are kept by content (default: `user_cache()`), so that an interrupted evaluation goes on;
        where it cannot be written, nothing is kept.
    Returns plain values for JSON. Raises `RankwiseError`.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise RankwiseError("name a text to judge on")
    refuse_unused(filter(None, map(own_source, texts)), text_column, dataset_options)
    documents = {source: read_judging_text(source, text_column, dataset_options) for source in texts}
    conversations = {source: count_conversations(found.documents) for source, found in documents.items()}
    name, path = name_of(reference), name_of(model)
    config = reference.config if isinstance(reference, PreTrainedModel) else load_config(reference)
    refuse_compressed(name, config)
    if isinstance(model, PreTrainedModel):
        ranks, recipe = ranks_in(model), None
        shapes = narrowed(shapes_in(model.config, ranks, path), model.config)
    else:
        ranks, recipe = read_ranks(Path(model)), read_recipe(Path(model))
        shapes = narrowed(read_shapes(Path(model), ranks), load_config(model))  # which are there, before any long work
    if tokenizer is None and not isinstance(reference, PreTrainedModel):
        tokenizer = load_tokenizer(reference)
    if tokenizer is None:
        raise RankwiseError(f"{name} has no tokenizer: give one")
    asked = load_tasks(tasks, limit, shots) if tasks else None
    folder = RunFolder.cache(Path(cache) if cache else None)
    compressed = model if isinstance(model, PreTrainedModel) else load_compressed(model, dtype, device)
    dense = reference if isinstance(reference, PreTrainedModel) else load_model(reference, config, dtype, device)
    refuse_unrelated(compressed, dense, path, name)
    if asked and not dense.can_generate():
        raise RankwiseError(
            f"tasks need a model that predicts text, not a {type(dense).__name__}: run without tasks",
        )
    length = window_length(dense, length)
    windows = {
        name: windows_of(tokenizer, found.documents, length, samples, seed)[: found.windows] for name, found in documents.items()
    }
    for part in windows.values():
        refuse_foreign(dense, part)
    given = tokenised(dense, tokenizer, prompts)
    pair = Pair(dense, compressed, tokenizer, folder)
    with frozen(dense), frozen(compressed), widened(dense, compressed):
        measured = {name: pair.compare(part) for name, part in windows.items()}
        first = windows[texts[0]]
        extra: dict[str, Any] = {"hidden_states": pair.hidden_measures(first)}
        if dense.can_generate() and not dense.config.is_encoder_decoder:
            extra["generations"] = pair.generations(given or prompts_of(first))
        if asked:
            extra["tasks"] = pair.tasks(asked)
    experts = unstack_experts(dense)
    size = Size.of(dense, shapes, ranks, quantization_of(compressed.config).get("bits"))
    stack_experts(dense, experts)
    return {
        "reference": name,
        "rate": (recipe and recipe.rate) or size.achieved("linear"),
        "scope": recipe.scope if recipe else "linear",
        **size.to_dict(),
        "bytes_on_disk": {"reference": weights_on_disk(reference), "compressed": weights_on_disk(model)},
        "text": texts[0],
        "calibration": recipe.calibration if recipe else None,
        "length": length,
        "stride": length,
        "conversations": conversations[texts[0]],
        **measured[texts[0]],
        "texts": {name: {**row, "conversations": conversations[name]} for name, row in gaps(measured).items()},
        **extra,
        "ranks": ranks,
    }


def refuse_unrelated(compressed: Any, dense: Any, path: str, name: str) -> None:
    """Raises `RankwiseError` unless all but the compressed matrices is alike: class, names, shapes, and the values of the
    embeddings, but for rounding."""
    ours, theirs = ({n: p.shape for n, p in skeleton(model.config).named_parameters()} for model in (compressed, dense))
    alike = type(compressed) is type(dense) and ours == theirs
    if alike:
        tables = compressed.get_input_embeddings(), dense.get_input_embeddings()
        one, other = (table.weight.float().cpu() for table in tables)
        step = tables[0].scales.float().cpu().abs() if isinstance(tables[0], QuantisedEmbedding) else torch.zeros(())
        alike = bool(((one - other).abs() <= 2**-7 * other.abs() + step / 2 + 1e-6).all())
    if not alike:
        raise RankwiseError(
            f"{name} is not the model that {path} was made from: give that one as the reference",
        )


def name_of(model: str | Path | PreTrainedModel) -> str:
    """What a model is called, in memory as its config says."""
    if not isinstance(model, PreTrainedModel):
        return str(model)
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def weights_on_disk(model: str | Path | PreTrainedModel) -> int | None:
    """Bytes of the files that hold the folder's weights; None for a model that is not a local folder."""
    if isinstance(model, PreTrainedModel) or not Path(model).is_dir():
        return None
    return sum(file.stat().st_size for file in weight_files(Path(model)))
