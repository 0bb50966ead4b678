"""`rankwise evaluate`: a compressed folder against the model it was made from, on any text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from rankwise.calibration.signal import frozen, values_of
from rankwise.calibration.text import read_documents
from rankwise.calibration.tokens import batches_of, refuse_foreign, window_length, windows_of
from rankwise.errors import RankwiseError
from rankwise.evaluation.compare import compare
from rankwise.evaluation.size import Size
from rankwise.integration.checkpoint import load_compressed, load_config, load_model, load_tokenizer, refuse_compressed, skeleton
from rankwise.integration.result import RECIPE, read_ranks, read_shapes
from rankwise.layers.matrices import unstack_experts


def evaluate(
    path: str | Path,
    reference: str | Path,
    text: str,
    *,
    length: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    text_column: str = "text",
    dataset_options: Mapping[str, str] | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Compare the compressed folder `path` with `reference` on `text`, in one run on the same tokens.

    All of the text in non-overlapping windows of `length` tokens (default: the reference's context, at most 2048), or
    `samples` of them, drawn at random. Returns plain values for JSON. Raises `RankwiseError`.
    """
    documents = read_documents(text, text_column, dataset_options)
    config = load_config(reference)
    refuse_compressed(reference, config)
    ranks = read_ranks(Path(path))
    shapes = read_shapes(Path(path), ranks)  # that there are such matrices, before any long work
    tokenizer = load_tokenizer(reference)
    if tokenizer is None:
        raise RankwiseError(f"{reference} has no tokenizer")
    compressed, dense = load_compressed(path, dtype, device), load_model(reference, config, dtype, device)
    if not _made_from(compressed, dense):
        raise RankwiseError(f"{reference} is not the model that {path} was made from")
    length = window_length(dense, length)
    windows = windows_of(tokenizer, documents, length, samples, seed)
    refuse_foreign(dense, windows)
    batches = batches_of(dense, windows)
    with frozen(dense), frozen(compressed):
        comparison = compare(
            lambda batch: values_of(dense, batch),
            lambda batch: values_of(compressed, batch),
            batches,
            dense.can_generate(),
        )
    unstack_experts(dense)
    size = Size.of(dense, shapes, ranks)
    recipe = yaml.safe_load((Path(path) / RECIPE).read_text()) if (Path(path) / RECIPE).exists() else {}
    return {
        "reference": str(reference),
        "rate": recipe.get("rate") or size.achieved("linear"),
        "scope": recipe.get("scope", "linear"),
        **size.to_dict(),
        "bytes_on_disk": {"reference": weights_on_disk(Path(reference)), "compressed": weights_on_disk(Path(path))},
        "text": text,
        "length": length,
        "stride": length,
        **comparison.to_dict(),
        "ranks": ranks,
    }


def _made_from(compressed: Any, dense: Any) -> bool:
    """Whether all but the compressed matrices is alike: class, names, shapes, and the embeddings' values but for rounding."""
    shapes = {name: parameter.shape for name, parameter in skeleton(compressed.config).named_parameters()}
    if type(compressed) is not type(dense) or shapes != {name: p.shape for name, p in dense.named_parameters()}:
        return False
    ours, theirs = (model.get_input_embeddings().weight.float() for model in (compressed, dense))
    return torch.allclose(ours, theirs, rtol=2**-7, atol=1e-6)


def weights_on_disk(folder: Path) -> int | None:
    """Bytes of the folder's safetensors files; None for a model that is not a local folder."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) if folder.is_dir() else None
