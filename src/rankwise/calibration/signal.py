"""What a model says about a batch, and how far another model is from saying the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise import distributed
from rankwise.calibration.head import Head, head_of, last_states
from rankwise.calibration.outputs import Kind, values_in
from rankwise.calibration.tokens import Batch, cut, written

DRAWS = "draws"  # in a batch, beside the model's inputs: a number in [0, 1) for every token, which `sampled_loss` draws with
PROBE = 8  # tokens that tell whether a model's logits can be had a few at a time
FEW = 2**10  # rows whose logits may be kept
LOGITS_AT_ONCE = 2**23  # float32 numbers: 32 MiB, of which a loss holds about five


@dataclass(frozen=True)
class Signal:
    """A model's outputs over the tokens of a batch that are not padding.

    values: [tokens, hidden] hidden states that `head` makes logits of; without a head [tokens, vocabulary] logits in the model's
        dtype, or [rows, width] of whatever `kind` says (see `outputs`).
    """

    values: Tensor
    kind: Kind
    head: Head | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def categorical(self) -> bool:
        """Whether a row is one choice out of several."""
        return self.kind == "categorical"

    @property
    def variance(self) -> Tensor:
        """Of the Gaussians whose means the values are."""
        values = self.values.detach().float()
        if self.kind == "gaussian":
            return values.new_ones(())
        return values.var(dim=0).mean() if len(values) > 1 else values.var()

    def logits(self, values: Tensor) -> Tensor:
        """Logits [rows, choices] float32 of rows of `values`; of Bernoullis [rows, width, 2], of no and of yes."""
        logits = (values if self.head is None else self.head(values)).float()
        return torch.stack((torch.zeros_like(logits), logits), -1) if self.kind == "bernoulli" else logits

    def chunks(self) -> Iterator[slice]:
        """The rows in parts whose logits fit in memory."""
        rows = max(1, LOGITS_AT_ONCE // (self.values.shape[-1] if self.head is None else self.head.width))
        return (slice(i, i + rows) for i in range(0, len(self), rows))

    def outright(self) -> Signal:
        """The same signal of its logits [rows, vocabulary] float32 where it has few rows: who asks for them often need not run
        the head each time."""
        if self.head is None or len(self) > FEW or len(self) * self.head.width > LOGITS_AT_ONCE:
            return self
        return Signal(self.logits(self.values), self.kind)

    def __getitem__(self, rows: Any) -> Signal:
        return Signal(self.values[rows], self.kind, self.head)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs belong: the device of its first parameter."""
    return next(model.parameters()).device


def token_mask(batch: Batch) -> Tensor | None:
    """[batch, length] bool, False for padding on the side that writes; None where nothing is padded."""
    mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool()


def inputs_of(model: Any, batch: Batch, device: torch.device) -> Batch:
    """What a model on `device` is called with: neither labels nor draws, and pictures and sounds in the model's own dtype, which
    may be wider than the one it is stored in, and than theirs."""
    given = {name: tensor.to(device) for name, tensor in batch.items() if name not in ("labels", DRAWS)}
    return {name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()}


@contextmanager
def unpadded(model: Any, batch: Batch) -> Iterator[None]:
    """While inside, a classifier without a padding token reads `batch` as it is, if nothing in it is padded: transformers lets it
    read one sequence at a time only, as it looks for each one's last token."""
    config: Any = getattr(model.config, "text_config", None) or model.config
    if model.can_generate() or token_mask(batch) is not None or getattr(config, "pad_token_id", 0) is not None:
        yield
        return
    config.pad_token_id = -1  # no token is it
    try:
        yield
    finally:
        config.pad_token_id = None


def call(model: nn.Module, batch: Batch, device: torch.device | None = None, **options: Any) -> Any:
    """The model's own output object for `batch`; the inputs go to `device`, by default that of the model."""
    with unpadded(model, batch):
        return model(**inputs_of(model, batch, device or device_of(model)), **options)


def few_tokens(batch: Batch) -> Batch:
    """The first sequence, and of it the first tokens where all inputs have one number for each and nothing is padded."""
    one = cut(batch, slice(1))
    shape = next(iter(one.values())).shape
    padded = any(name.endswith("mask") and not tensor.all() for name, tensor in one.items())
    if padded or len(shape) != 2 or any(tensor.shape != shape for tensor in one.values()):
        return one
    return {name: tensor[:, :PROBE] for name, tensor in one.items()}


def values_of(model: nn.Module, batch: Batch, device: torch.device | None = None) -> tuple[Tensor, Kind]:
    """What the model answers (see `values_in`): its logits [sequences, length, vocabulary] or its last hidden states, if it has
    them."""
    return values_in(model, call(model, batch, device), batch)


def signal_of(model: nn.Module, batch: Batch, device: torch.device | None = None) -> Signal:
    """The model's signal over `batch`: hidden states and a head where it has one that can be run by itself, else its values."""
    names = tuple(name for name in ("input_ids", "decoder_input_ids") if name in batch)
    head = head_of(model, names, lambda model: call(model, few_tokens(batch), device))
    if head is None:
        values, kind = values_of(model, batch, device)
        return Signal(of_tokens(values, batch), kind)
    states = last_states(model, lambda model: call(model, batch, device))
    return Signal(of_tokens(states, batch), "categorical", head)


def of_tokens(values: Tensor, batch: Batch) -> Tensor:
    """[sequences, length, c] -> [tokens, c], without padding."""
    mask = token_mask(batch)
    if mask is not None and values.ndim == 3 and values.shape[:2] == mask.shape:
        return values[mask.to(values.device)]
    return values.reshape(-1, values.shape[-1])


def text_labels(batch: Batch, causal: bool) -> Tensor:
    """The text's own labels [tokens] int64 for the values of `signal_of`: of a causal model the token that follows, -100 where
    none does; of another the token itself."""
    ids, mask = batch["decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"], token_mask(batch)
    labels = ids if mask is None else ids.masked_fill(~mask, -100)
    if causal:
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    return labels.flatten() if mask is None else labels[mask]


Loss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]  # (logits, their rows) -> its sum over them, and its slope at the logits


class _OverTokens(torch.autograd.Function):
    """The sum over a signal's tokens of a loss of their logits, its gradient at the signal's values taken along, part by part."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, signal: Signal, loss: Loss) -> Tensor:
        total = 0.0
        ctx.gradient = torch.empty_like(values) if ctx.needs_input_grad[0] else None
        for rows in signal.chunks():
            part = values[rows].detach()
            if ctx.gradient is None:
                total += loss(signal.logits(part), rows)[0].item()
                continue
            with torch.enable_grad():
                logits = signal.logits(part.requires_grad_())
            found, slope = loss(logits.detach(), rows)
            total += found.item()
            (ctx.gradient[rows],) = torch.autograd.grad(logits, part, slope)
        return values.new_tensor(total, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream.to(ctx.gradient) * ctx.gradient, None, None


def _over_tokens(signal: Signal, loss: Loss) -> Tensor:
    total: Tensor = _OverTokens.apply(signal.values, signal, loss)
    return total


def divergence(reference: Signal, other: Signal) -> Tensor:
    """KL(reference || other) in nats, summed over tokens: scalar float32, differentiable in the other's values."""
    if reference.kind in ("gaussian", "features"):
        return 0.5 * (other.values.float() - reference.values.float()).square().sum() / reference.variance

    def kl(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        q, p = logits.log_softmax(-1), reference.logits(reference.values[rows]).log_softmax(-1)
        return kl_of(p, q).sum(), q.exp_().sub_(p.exp_())

    return _over_tokens(other, kl)


def kl_of(p: Tensor, q: Tensor) -> Tensor:
    """KL [...] of distributions given as log probabilities [..., c]."""
    return torch.linalg.vecdot(p.exp(), p - q)


def cross_entropy(signal: Signal, labels: Tensor) -> Tensor:
    """Minus the log likelihood of `labels` [tokens] int64, summed over those that are not negative: scalar float32."""
    return _labelled(signal, lambda _, rows: labels[rows])


def _labelled(signal: Signal, label: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """`cross_entropy` with the labels that `label(log probabilities, rows)` gives."""

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        q = logits.log_softmax(-1)
        labels = label(q, rows).to(q.device)[..., None]
        counted, at = (labels >= 0).float(), labels.clamp_min(0)
        found = -(q.gather(-1, at) * counted).sum()
        return found, q.exp_().scatter_add_(-1, at, torch.full_like(at, -1, dtype=q.dtype)).mul_(counted)

    return _over_tokens(signal, loss)


def with_draws(batches: Iterable[Batch], seed: int) -> Sequence[Batch]:
    """This process's batches with what `sampled_loss` draws with: the same for any number of processes."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(batch: Batch) -> Batch:
        return batch | {DRAWS: torch.rand(written(batch).shape[:2], generator=generator)}

    return distributed.dealt([drawn(batch) for batch in batches])


def sampled_loss(signal: Signal, batch: Batch) -> Tensor:
    """Minus the log likelihood, summed over tokens, of labels sampled from the signal itself: scalar float32.

    The outer product of its gradients is an unbiased estimate of the true Fisher information (Kunstner et al. 2019).
    `batch` is one of `with_draws`.
    """
    if signal.kind in ("gaussian", "features"):
        values = signal.values.float()
        mean = values.detach()
        noise = torch.randn(mean.shape, generator=_generator(batch[DRAWS])).to(mean.device) * signal.variance.sqrt()
        return 0.5 * (values - mean - noise).square().sum() / signal.variance
    shape = signal.values.shape if signal.kind == "bernoulli" else signal.values.shape[:1]
    uniform = _numbers(batch, shape.numel()).view(shape)

    return _labelled(signal, lambda q, rows: drawn(q, uniform[rows]))


def drawn(q: Tensor, uniform: Tensor) -> Tensor:
    """Choices [...] int64 of distributions given as log probabilities [..., c]; uniform: a number [...] in [0, 1) for each."""
    cumulative = q.exp().cumsum(-1)
    at = uniform[..., None].to(q.device) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, at, right=True).clamp_(max=q.shape[-1] - 1).squeeze(-1)


def _numbers(batch: Batch, count: int) -> Tensor:
    """So many of the batch's draws: those of all tokens, or the first ones of each sequence; new ones where these are too few."""
    draws, mask = batch[DRAWS], token_mask(batch)
    of_tokens = draws.flatten() if mask is None else draws[mask]
    if len(of_tokens) == count:
        return of_tokens
    each = count // len(draws)
    return draws[:, :each].flatten() if each <= draws.shape[1] else torch.rand(count, generator=_generator(draws))


def _generator(draws: Tensor) -> torch.Generator:
    """On the CPU: the same noise for every device."""
    return torch.Generator().manual_seed(int(draws.flatten()[0] * 2**24))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, no parameter asking for a gradient, no key-value cache kept, its answers objects with names; all
    put back on leaving."""
    training = {m: m.training for m in model.modules()}
    asking = [p for p in model.parameters() if p.requires_grad]
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}.values()
    wanted = {"use_cache": False, "return_dict": True}
    settings = [(c, name, getattr(c, name)) for c in configs for name in wanted if getattr(c, name, None) is not None]
    model.eval()
    for parameter in asking:
        parameter.requires_grad_(False)
    for config, name, _ in settings:
        setattr(config, name, wanted[name])
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter in asking:
            parameter.requires_grad_(True)
        for config, name, value in settings:
            setattr(config, name, value)
