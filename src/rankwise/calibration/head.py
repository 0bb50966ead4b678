"""The end of a model, from its last hidden states to its logits, run on a few tokens at a time.

Logits are what a large vocabulary makes large: of 8,192 tokens and 262,144 words 8.6 GB. So what is kept of a model's answer are
the hidden states that its base hands on, and whatever the model does with them (a head, several, a soft cap, a scale) is asked
for some rows of them whenever it is needed: the model's own forward, its base answering with those rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.calibration.outputs import kind_of

WIDTH = 4  # rows that the probe cuts out of the middle
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # of the largest logit: another number of rows is another order of sums
_proved: weakref.WeakKeyDictionary[nn.Module, tuple[list[nn.Module], tuple[type, int] | None]] = weakref.WeakKeyDictionary()

Call = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Head:
    """What a model does after its base.

    inputs: what the model is called with, which it then reads no more; answer: the class of the base's output object; width: of
        the logits.
    """

    model: nn.Module
    inputs: tuple[str, ...]
    answer: type
    width: int

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of hidden states [rows, hidden], in the model's dtype."""
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        with _answering(self.model, lambda _: self.answer(last_hidden_state=hidden[None])):
            logits: Tensor = self.model(**dict.fromkeys(self.inputs, ids)).logits[0]
        return logits


def last_states(model: nn.Module, call: Call) -> Tensor:
    """The hidden states [sequences, length, hidden] that its base hands on in `call`; its end is run on one token only."""
    answer, _ = _observed(model, call, lambda answer: type(answer)(last_hidden_state=answer.last_hidden_state[:, :1]))
    states: Tensor = answer.last_hidden_state
    return states


def head_of(model: nn.Module, inputs: tuple[str, ...], call: Call) -> Head | None:
    """The model's head; None for a model that has no such end, and while anything in it is replaced or watched.

    It is tried once on every model, by `call`, and taken only where the logits of rows cut out are the model's own.
    """
    rest = _rest(model)
    if not rest:
        return None
    if model not in _proved:
        _proved[model] = rest, _probe(model, inputs, call)
    as_proved, end = _proved[model]
    same = len(rest) == len(as_proved) and all(a is b for a, b in zip(rest, as_proved, strict=True))
    watched = any(module._forward_hooks or module._forward_pre_hooks for module in rest)
    return None if end is None or watched or not same else Head(model, inputs, *end)


def _base(model: Any) -> nn.Module | None:
    base = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
    return base if isinstance(base, nn.Module) else None


def _rest(model: nn.Module) -> list[nn.Module]:
    """Every module outside of the base; none where there is no base."""
    base = _base(model)
    return [] if base is None else [m for child in model.children() if child is not base for m in child.modules()]


def _probe(model: nn.Module, inputs: tuple[str, ...], call: Call) -> tuple[type, int] | None:
    """The class of the base's answers and the width of the logits, or None where the end of the model cannot be run by itself."""
    try:
        with torch.no_grad():
            answer, output = _observed(model, call, lambda answer: answer)
            hidden, logits = answer.last_hidden_state[:1], output.logits[:1]
            at = slice(hidden.shape[1] // 2, hidden.shape[1] // 2 + WIDTH)
            end, wanted = (type(answer), logits.shape[-1]), logits[0, at]
            again = Head(model, inputs, *end)(hidden[0, at])
            bound = TOLERANCE.get(wanted.dtype, 2e-2) * wanted.abs().max()
            fits = hidden.shape[:2] == logits.shape[:2] and again.shape == wanted.shape
            fits = fits and logits.ndim == 3 and kind_of(model, logits) == "categorical"
            return end if fits and (again - wanted).abs().max() <= bound else None
    except Exception:  # a model whose end needs more than hidden states says so in as many ways as there are
        return None


def _observed(model: nn.Module, call: Call, hand_on: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What the base answers in `call`, and the model's own output where `hand_on(answer)` is what it goes on with."""
    seen: list[Any] = []

    def answer(forward: Callable[[], Any]) -> Any:
        seen.append(forward())
        return hand_on(seen[-1])

    with _answering(model, answer):
        output = call(model)
    return seen[-1], output


@contextmanager
def _answering(model: nn.Module, answer: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """While inside, the model's base answers `answer(its own forward)`."""
    base = _base(model)
    assert base is not None
    own, before = base.forward, vars(base).get("forward")
    vars(base)["forward"] = lambda *arguments, **keywords: answer(lambda: own(*arguments, **keywords))
    try:
        yield
    finally:
        if before is None:
            del vars(base)["forward"]
        else:
            vars(base)["forward"] = before
