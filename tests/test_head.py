"""A model's logits a few rows at a time: the same numbers as in one piece, whatever the model does after its head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from torch import Tensor, nn

from rankwise.calibration import signal as signals
from rankwise.calibration.signal import cross_entropy, divergence, frozen, sampled_loss, signal_of, values_of, with_draws
from rankwise.layers.linear import swapped

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BATCH = {"input_ids": torch.randint(97, (3, 11), generator=torch.Generator().manual_seed(0))}
PADDED = BATCH | {"attention_mask": torch.arange(11).expand(3, 11) < torch.tensor([[11], [7], [4]])}
MODELS: dict[str, Callable[[], Any]] = {
    "plain": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL)),
    "soft cap": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0)),
    "scaled": lambda: t.CohereForCausalLM(t.CohereConfig(**SMALL, logit_scale=0.25)),
    "transposed": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "head with layers": lambda: t.BertForMaskedLM(t.BertConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})),
}


def built(name: str) -> Any:
    torch.manual_seed(1)
    return MODELS[name]().eval()


@pytest.mark.parametrize("batch", [BATCH, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_their_gradients_are_those_of_all_logits_at_once(
    name: str, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "LOGITS_AT_ONCE", 5 * 97)
    model, other = built(name), built(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    mask = batch.get("attention_mask", torch.ones(3, 11, dtype=torch.bool)).bool()
    ours, theirs = signal_of(model, batch), signal_of(other, batch)
    assert ours.head is not None
    assert ours.values.shape == (mask.sum(), 32)
    p, q = (values_of(m, batch)[0][mask].log_softmax(-1) for m in (model, other))
    torch.testing.assert_close(ours.logits(ours.values).log_softmax(-1), p)
    labels = torch.randint(-1, 97, (len(p),), generator=torch.Generator().manual_seed(2))
    drawn = with_draws([batch], 0)[0]
    uniform = drawn["draws"][mask][:, None]
    sampled = (q.detach().exp().cumsum(-1) <= uniform).sum(-1).clamp(max=96)
    weight = next(other.parameters())
    for found, expected in (
        (divergence(ours, theirs), F.kl_div(q, p.detach(), log_target=True, reduction="sum")),
        (cross_entropy(theirs, labels), F.nll_loss(q, labels, ignore_index=-1, reduction="sum")),
        (sampled_loss(theirs, drawn), F.nll_loss(q, sampled, reduction="sum")),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        states = torch.autograd.grad(found, theirs.values, retain_graph=True)[0]
        body = [parameter for n, parameter in other.named_parameters() if "layer" in n or ".h." in n][:1]
        (through_states,) = torch.autograd.grad(theirs.values, body, states, retain_graph=True)
        (whole,) = torch.autograd.grad(expected, body, retain_graph=True)
        torch.testing.assert_close(through_states, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())
    assert weight.grad is None


def test_no_more_rows_than_fit_go_through_the_head_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "LOGITS_AT_ONCE", 5 * 97)
    model = built("plain")
    signal_of(model, BATCH)
    rows: list[int] = []
    own = model.lm_head.forward

    def forward(x: Tensor) -> Tensor:
        rows.append(x.shape[:-1].numel())
        return own(x)

    monkeypatch.setattr(model.lm_head, "forward", forward)
    with torch.no_grad():
        assert divergence(signal_of(model, BATCH), signal_of(model, BATCH)) == 0
    assert max(rows) == 5
    assert sum(rows) >= 2 * 33


def test_few_rows_say_outright_what_their_head_would(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("plain")
    with frozen(model), torch.no_grad():
        signal = signal_of(model, BATCH)
        outright = signal.outright()
        assert outright.head is None
        assert torch.equal(outright.values, signal.logits(signal.values))
        other = signals.Signal(signal.values.flip(0), signal.kind, signal.head)
        assert torch.equal(divergence(outright, other), divergence(signal, other))
        monkeypatch.setattr(signals, "FEW", len(signal) - 1)
        assert signal.outright() is signal


class _TwoInOne(t.LlamaForCausalLM):
    """A model whose logits are no function of one token's hidden states."""

    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.logits = output.logits + output.logits.mean(1, keepdim=True)
        return output


@pytest.mark.parametrize(
    "model",
    [
        _TwoInOne(t.LlamaConfig(**SMALL)),
        t.BertForSequenceClassification(t.BertConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})),
    ],
    ids=lambda model: type(model).__name__,
)
def test_what_cannot_be_cut_is_taken_whole(model: Any) -> None:
    signal = signal_of(model.eval(), BATCH)
    assert signal.head is None
    torch.testing.assert_close(signal.values, model(**BATCH).logits.flatten(0, -2))


def test_a_head_that_is_replaced_or_watched_is_run_as_it_is() -> None:
    model = built("plain")
    before = signal_of(model, BATCH)
    other = nn.Linear(32, 97, bias=False)
    with frozen(model), torch.no_grad(), swapped(model, {"lm_head": other}):
        replaced = signal_of(model, BATCH)
    assert replaced.head is None
    torch.testing.assert_close(replaced.values, other(before.values))
    seen: list[Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    signal_of(model, BATCH)
    handle.remove()
    assert seen[0].shape == (3, 11, 32)
    assert signal_of(model, BATCH).head is not None
