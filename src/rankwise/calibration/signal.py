"""What a model says about a batch, and how far another model is from saying the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise import distributed
from rankwise.calibration.tokens import Batch
from rankwise.errors import RankwiseError

DRAWS = "draws"  # in a batch, beside the model's inputs: a number in [0, 1) for every token, which `sampled_loss` draws with


@dataclass(frozen=True)
class Signal:
    """A model's outputs over the tokens of a batch that are not padding.

    values: [tokens, vocabulary] logits in the model's dtype, or [tokens, hidden] features of a model without a head,
        which are read as the mean of a Gaussian with the features' own variance.
    """

    values: Tensor
    categorical: bool


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs belong: the device of its first parameter."""
    return next(model.parameters()).device


def token_mask(batch: Batch) -> Tensor | None:
    """[batch, length] bool, False for padding on the side that writes; None where nothing is padded."""
    mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool()


def inputs_of(batch: Batch, device: torch.device) -> Batch:
    """What a model on `device` is called with: neither labels nor draws."""
    return {name: tensor.to(device) for name, tensor in batch.items() if name not in ("labels", DRAWS)}


def call(model: nn.Module, batch: Batch, **options: Any) -> Any:
    """The model's own output object for `batch`."""
    return model(**inputs_of(batch, device_of(model)), **options)


def values_of(model: nn.Module, batch: Batch) -> tuple[Tensor, bool]:
    """The model's logits [sequences, length, vocabulary] and True, or its last hidden states and False.

    Raises `RankwiseError` for a model that gives neither.
    """
    output = call(model, batch)
    logits = getattr(output, "logits", None)
    values = logits if logits is not None else getattr(output, "last_hidden_state", None)
    if values is None:
        raise RankwiseError(f"the model's output {type(output).__name__} has neither logits nor last_hidden_state")
    return values, logits is not None


def signal_of(model: nn.Module, batch: Batch) -> Signal:
    """The model's signal over `batch`."""
    return as_signal(*values_of(model, batch), batch)


def as_signal(values: Tensor, categorical: bool, batch: Batch) -> Signal:
    """What `values_of` gave for `batch`, without padding."""
    mask = token_mask(batch)
    if mask is not None and values.ndim == 3:
        return Signal(values[mask.to(values.device)], categorical)
    return Signal(values.reshape(-1, values.shape[-1]), categorical)


def text_labels(batch: Batch, causal: bool) -> Tensor:
    """The text's own labels [tokens] int64 for the values of `signal_of`: of a causal model the token that follows, -100 where
    none does; of another the token itself."""
    ids, mask = batch["decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"], token_mask(batch)
    labels = ids if mask is None else ids.masked_fill(~mask, -100)
    if causal:
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    return labels.flatten() if mask is None else labels[mask]


def divergence(reference: Signal, other: Signal) -> Tensor:
    """KL(reference || other) in nats, summed over tokens: scalar float32."""
    if reference.categorical:
        p, q = reference.values.float().log_softmax(-1), other.values.float().log_softmax(-1)
        return F.kl_div(q, p, reduction="sum", log_target=True)
    mean = reference.values.float()
    return 0.5 * (other.values.float() - mean).square().sum() / mean.var(dim=0).mean()


def with_draws(batches: Iterable[Batch], seed: int) -> Sequence[Batch]:
    """This process's batches with what `sampled_loss` draws with: the same for any number of processes."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(batch: Batch) -> Batch:
        written = next((batch[n] for n in ("decoder_input_ids", "input_ids") if n in batch), next(iter(batch.values())))
        return batch | {DRAWS: torch.rand(written.shape[:2], generator=generator)}

    return distributed.dealt([drawn(batch) for batch in batches])


def sampled_loss(signal: Signal, batch: Batch) -> Tensor:
    """Minus the log likelihood, summed over tokens, of labels sampled from the signal itself: scalar float32.

    The outer product of its gradients is an unbiased estimate of the true Fisher information (Kunstner et al. 2019).
    `batch` is one of `with_draws`.
    """
    values, draws, mask = signal.values.float(), batch[DRAWS], token_mask(batch)
    if signal.categorical:
        uniform = draws.flatten() if mask is None else draws[mask]
        if len(uniform) != len(values):
            uniform = draws[:, 0]  # a label for each sequence
        cumulative = values.detach().softmax(-1).cumsum(-1)
        at = uniform[:, None].to(values.device) * cumulative[:, -1:]
        labels = torch.searchsorted(cumulative, at, right=True).clamp(max=values.shape[-1] - 1)
        return F.cross_entropy(values, labels.squeeze(-1), reduction="sum")
    mean = values.detach()
    variance = mean.var(dim=0).mean()
    generator = torch.Generator().manual_seed(int(draws.flatten()[0] * 2**24))  # on the CPU: the same noise for every device
    noise = torch.randn(mean.shape, generator=generator).to(mean.device) * variance.sqrt()
    return 0.5 * (values - mean - noise).square().sum() / variance


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, no parameter asking for a gradient and no key-value cache kept; all put back on leaving."""
    training = {m: m.training for m in model.modules()}
    asking = [p for p in model.parameters() if p.requires_grad]
    config: Any = getattr(model, "config", None)
    caching = getattr(config, "use_cache", None)
    model.eval()
    for parameter in asking:
        parameter.requires_grad_(False)
    if caching:
        config.use_cache = False
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter in asking:
            parameter.requires_grad_(True)
        if caching:
            config.use_cache = caching
