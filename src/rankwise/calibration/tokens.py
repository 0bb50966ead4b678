"""From documents to windows of tokens, and from windows to the batches a model is called with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rankwise.calibration.chat import Conversation
from rankwise.calibration.pieces import pieces_of
from rankwise.errors import RankwiseError

Batch = dict[str, Tensor]

MOST_TEXT = 2**18  # tokens of a calibration: 128 windows of 2048, the field's habit
LEAST_TEXT, LEAST_QUICK = 7 * 2**12, 3 * 2**12  # by default, and in a hurry
SMALL_MODEL = 2**21  # parameters: what a CPU runs all of the text through in minutes
PLACE = 8, 2**11  # characters of a piece: for each token of a window, and at least
LEAST_SAMPLES = 16  # however long they are
LEAST_WINDOWS = 128  # rather shorter ones than fewer
SHORTEST = 128
T = TypeVar("T")
TOKENS_PER_BATCH = 2**13  # at most
MAX_LENGTH = 2048
CONTEXT = "max_position_embeddings", "n_positions", "max_seq_len"  # as configs name it
INSIDE = "text_config", "encoder", "decoder", "text_encoder"  # configs within a config


def text_of(effort: str, parameters: int, device: str) -> int:
    """Tokens of a calibration text: 262,144 for a thorough run. By default as many on a GPU and for a small model; on a CPU
    fewer, the larger the model, but 28,672 at least. A quick run reads an eighth of the default, but 12,288 at least."""
    most = MOST_TEXT
    if device == "cpu" and effort != "thorough":
        most = max(LEAST_TEXT, min(MOST_TEXT, MOST_TEXT * SMALL_MODEL // parameters))
    return max(LEAST_QUICK, most // 8) if effort == "quick" else most


def windows_asked(model: Any, effort: str, device: str, length: int | None, samples: int | None) -> tuple[int, int]:
    """The length and the number of a calibration's windows: those asked for, else by the effort, but 16 at least."""
    text = text_of(effort, model.num_parameters(), device)
    length = window_length(model, length, text)
    return length, samples or max(text // length, LEAST_SAMPLES)


def context_of(model: Any) -> int | None:
    """The longest text, in tokens, that the model reads; None where nothing tells."""
    configs = (model.config, *(getattr(model.config, name, None) for name in INSIDE))
    named = [getattr(config, name, None) for config in configs for name in CONTEXT]
    counted = [  # positions counted from the padding token's, as RoBERTa has them
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2] and module.padding_idx is not None
    ]
    return min((p for p in (*named, *counted) if isinstance(p, int) and p > 0), default=None)


def window_length(model: nn.Module, wanted: int | None = None, text: int = MOST_TEXT) -> int:
    """Tokens of a window: those wanted, by default the model's context, but at most 2048, and so few that a `text` of so many
    tokens has 128 of them, if that leaves 128.

    Raises `RankwiseError` for fewer than two, which predict nothing, and for more than the context.
    """
    context = context_of(model)
    if wanted is not None and not 2 <= wanted <= (context or wanted):
        raise RankwiseError(f"length={wanted}: a window has from 2 to {context} tokens, the model's context")
    return wanted or min(MAX_LENGTH, context or MAX_LENGTH, max(SHORTEST, text // LEAST_WINDOWS))


def windows_of(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str | Conversation],
    length: int,
    samples: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Non-overlapping windows [windows, length] int64 of the documents, tokenised with their special tokens and joined;
    conversations are put in the tokenizer's chat template.

    With `samples`, at most that many, drawn at random: pieces of documents (see `pieces_of`; a short document is one) of about
    two windows, so that they come from many places, in random order until there are tokens enough; then windows out of theirs.
    Without, all of them in order. Raises `RankwiseError` where the text is shorter than a window.
    """
    if samples is not None and samples < 1:
        raise RankwiseError(f"samples={samples}: at least one window of text is needed")
    generator = torch.Generator().manual_seed(seed)
    longest = max(PLACE[0] * length, PLACE[1]) if samples else None
    pieces = [piece for document in documents for piece in pieces_of(document, longest)]
    order = torch.randperm(len(pieces), generator=generator).tolist() if samples else range(len(pieces))
    read, tokens = list[Tensor](), 0
    for index in order:
        read.append(torch.tensor(pieces[index].tokens(tokenizer), dtype=torch.int64))
        tokens += len(read[-1])
        if samples and tokens >= samples * length:
            break
    if tokens < length:
        raise RankwiseError(
            f"the text has {tokens:,} tokens, fewer than one window of {length:,}: give more text or a smaller length"
        )
    windows = torch.cat(read)[: tokens // length * length].view(-1, length)
    if samples and len(windows) > samples:
        windows = windows[torch.randperm(len(windows), generator=generator)[:samples]]
    return windows


def vocabulary_of(model: Any) -> int:
    """The number of tokens that the model can read: none where it reads no text."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return 0
    weight = getattr(table, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.ndim == 2 else 0


def refuse_foreign(model: Any, windows: Tensor) -> None:
    """Raises `RankwiseError` for tokens that the model does not have, and for a model that reads none."""
    vocabulary = vocabulary_of(model)
    if not vocabulary:
        raise RankwiseError(f"{type(model).__name__} does not read text alone: give compress() batches of what it reads")
    if windows.max() >= vocabulary or windows.min() < 0:
        token = windows.max() if windows.max() >= vocabulary else windows.min()
        raise RankwiseError(f"the text has the token {token}, but the model only {vocabulary}: is the tokenizer the model's own?")


def with_decoder_inputs(model: Any, batch: Batch) -> Batch:
    """The batch with what an encoder-decoder reads on its second side, made of the labels where it is not there.

    Raises `RankwiseError` where there are no labels either.
    """
    if not model.config.is_encoder_decoder or "decoder_input_ids" in batch:
        return batch
    if "labels" not in batch or not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        raise RankwiseError(f"batches for {type(model).__name__} need decoder_input_ids; this one has {', '.join(batch)}")
    labels = batch["labels"]
    inputs = model.prepare_decoder_input_ids_from_labels(labels=labels)
    return {**batch, "decoder_input_ids": inputs, "decoder_attention_mask": (labels != -100).long()}


def written(batch: Batch) -> Tensor:
    """The tokens on the side that writes; of a batch without tokens its first input."""
    return next((batch[name] for name in ("decoder_input_ids", "input_ids") if name in batch), next(iter(batch.values())))


def sequences_in(batch: Batch) -> int:
    """How many sequences the batch can be cut into: one where its tensors do not all have one row for each, as the patches of
    several pictures in one tensor."""
    lengths = {tensor.shape[:1] for tensor in batch.values()}
    return len(written(batch)) if len(lengths) == 1 and () not in lengths else 1


def cut(batch: Batch, sequences: slice) -> Batch:
    """These sequences of the batch; one that cannot be cut stays whole."""
    return batch if sequences_in(batch) == 1 else {name: tensor[sequences] for name, tensor in batch.items()}


def tokens_in(batches: Iterable[Batch]) -> int:
    """Tokens of all batches, padding included."""
    return sum(written(batch).shape[:2].numel() for batch in batches)


def parts_of(batches: Iterable[Batch], sequences: int) -> list[Batch]:
    """The batches in parts of `sequences` sequences; one that is no larger is itself, so that what is known of it counts."""
    return [
        batch if length <= sequences else cut(batch, slice(i, i + sequences))
        for batch in batches
        for length in [sequences_in(batch)]
        for i in range(0, length, sequences)
    ]


def endless(parts: Sequence[T], generator: torch.Generator) -> Iterator[T]:
    """The parts in a new random order each time round."""
    while True:
        for index in torch.randperm(len(parts), generator=generator).tolist():
            yield parts[index]
