"""The masked student: its prices and gradients against brute force, its layers against each other, what training changes."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributions as d
from transformers.pytorch_utils import Conv1D

from rankwise.allocation.llrc import worth
from rankwise.calibration.outputs import Kind
from rankwise.calibration.signal import DRAWS, Signal, divergence, sampled_loss, signal_of, with_draws
from rankwise.calibration.tokens import Batch
from rankwise.decomposition.solver import decompose
from rankwise.layers.linear import bias_of, swapped, weight_of
from rankwise.layers.lowrank import PairLinear
from rankwise.masks import student as student_module
from rankwise.masks.descent import Descent
from rankwise.masks.gumbel import cycle, gumbel_sigmoid, total_variation
from rankwise.masks.layers import MaskedLinear, Masks, WeightedLinear, factorised, folded, hard_mask, is_whole
from rankwise.masks.student import Student
from rankwise.masks.values import train_values
from rankwise.testing.allocators import VOCABULARY, tiny_student

ATTENTION = "model.layers.0.self_attn."
DENSE = ATTENTION + "v_proj"  # the matrix that is left dense in `some_masks`


def some_masks(student: Student, keep: float = 0.5) -> Masks:
    """Hard masks that keep about `keep` of the components, no prefixes; one matrix is dense."""
    generator = torch.Generator().manual_seed(3)
    masks: Masks = {
        n: (torch.rand(len(d.spectrum), generator=generator) < keep).float() for n, d in student.decompositions.items()
    }
    return masks | {DENSE: None}


def log_probabilities(student: Student, masks: dict[str, Tensor], batch: Batch) -> Tensor:
    """Of the masked model, in the dtype of the model: [sequences, length, vocabulary]."""
    layers = {
        name: MaskedLinear(student.decompositions[name].second, student.decompositions[name].first, None, mask)
        for name, mask in masks.items()
    }
    with student.frozen(), swapped(student.model, layers):
        return student.model(**batch).logits.log_softmax(-1)


def exact_kl(student: Student, masks: dict[str, Tensor]) -> Tensor:
    """KL(original || student) in nats per token on the training text, without casts."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for batch in student.training:
        with torch.no_grad():
            p = student.model(**batch).logits.log_softmax(-1)
        total = total + (p.exp() * (p - log_probabilities(student, masks, batch))).sum()
        tokens += batch["input_ids"].numel()
    return total / tokens


def ones(student: Student) -> dict[str, Tensor]:
    return {name: torch.ones(len(d.spectrum), dtype=torch.float64) for name, d in student.decompositions.items()}


def test_mask_fisher_is_that_of_sequences_one_by_one() -> None:
    student = tiny_student("whitened", dtype=torch.float64)
    prices = student.fisher()
    generator = torch.Generator().manual_seed(student.seed)
    expected = {name: torch.zeros(len(mask), dtype=torch.float64) for name, mask in ones(student).items()}
    tokens = 0
    for batch in student.training:
        masks = {name: mask.requires_grad_() for name, mask in ones(student).items()}
        log_p = log_probabilities(student, masks, batch)
        uniform = torch.rand(log_p[..., 0].numel(), 1, generator=generator).view(*log_p.shape[:2], 1)
        labels = (log_p.detach().float().exp().cumsum(-1) <= uniform).sum(-1).clamp(max=VOCABULARY - 1)
        for sequence, label in zip(log_p, labels, strict=True):
            loss = F.nll_loss(sequence, label, reduction="sum")
            for name, gradient in zip(masks, torch.autograd.grad(loss, [*masks.values()], retain_graph=True), strict=True):
                expected[name] += gradient.square()
        tokens += labels.numel()
    for name, price in prices.items():
        torch.testing.assert_close(price, expected[name] / (2 * tokens), rtol=1e-4, atol=1e-9)


def test_gradients_are_those_of_the_kl_at_hard_masks_for_dropped_components_too() -> None:
    student = tiny_student("whitened", dtype=torch.float64)
    masks = some_masks(student)
    gradients = student.gradients(masks)
    full = {name: torch.ones_like(ones(student)[name]) if m is None else m.double() for name, m in masks.items()}
    step = 1e-2  # the model computes its norms and its softmax in float32
    for name, mask in full.items():
        kept, dropped = mask.nonzero().flatten().tolist(), (mask == 0).nonzero().flatten().tolist()
        assert kept
        assert dropped or name == DENSE
        for i in (*kept[:1], *dropped[:1]):
            at = F.one_hot(torch.tensor(i), len(mask))
            kl = {s: exact_kl(student, full | {name: mask + s * step * at}).item() for s in (-2, -1, 1, 2)}
            difference = (8 * (kl[1] - kl[-1]) - (kl[2] - kl[-2])) / (12 * step)
            assert gradients[name][i].item() == pytest.approx(difference, rel=1e-3, abs=1e-5), (name, i, mask[i])


def test_divergence_is_the_kl_of_the_shipped_layers() -> None:
    student = tiny_student("whitened", dtype=torch.float64)
    masks = some_masks(student)
    full = {name: mask.double() for name, mask in masks.items() if mask is not None}
    assert student.divergence(masks, student.training) == pytest.approx(exact_kl(student, full).item(), rel=1e-5)
    assert student.divergence(dict.fromkeys(masks)) == 0
    assert student.divergence({name: torch.ones_like(mask) for name, mask in full.items()}) == pytest.approx(0, abs=1e-6)


def test_hard_mask_keeps_the_first_components() -> None:
    assert hard_mask(2, 4).tolist() == [1, 1, 0, 0]


def test_worth_is_the_true_change_of_a_quadratic_with_diagonal_curvature() -> None:
    generator = torch.Generator().manual_seed(0)
    slope, curvature = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    curvature = curvature.abs()

    def kl(mask: Tensor) -> Tensor:
        return (slope * mask + curvature * mask.square()).sum()

    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.float64)
    got = worth(mask, slope + 2 * curvature * mask, curvature)
    for i in range(8):
        dropped, kept = mask.clone(), mask.clone()
        dropped[i], kept[i] = 0, 1
        assert got[i].item() == pytest.approx(max((kl(dropped) - kl(kept)).item(), 0.0), abs=1e-12)
    assert (got > 0).any()
    torch.testing.assert_close(
        worth(None, slope + 2 * curvature, curvature), worth(torch.ones(8), slope + 2 * curvature, curvature)
    )


def test_training_values_lowers_the_kl_and_touches_nothing_else() -> None:
    student = tiny_student("kronecker")
    masks = some_masks(student)
    kept = {name: torch.ones(len(student.decompositions[name].spectrum)) if m is None else m.clone() for name, m in masks.items()}
    before = [t.clone() for t in everything(student)]
    trained = train_values(student, masks, Descent(steps=30))
    assert student.divergence(trained, student.training) < 0.97 * student.divergence(masks, student.training)
    assert masks[DENSE] is None
    assert is_whole(trained[DENSE])
    for name, mask in kept.items():
        got, given = trained[name], masks[name]
        assert got is not None
        assert given is None or torch.equal(given, mask)  # the answer is a new one
        assert torch.equal(got != 0, mask != 0)
        assert not torch.equal(got, mask)
    assert all(torch.equal(old, new) for old, new in zip(before, everything(student), strict=True))


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_weighted_dense_layer_is_the_one_it_folds_into(kind: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    linear, x, mask = kind(6, 9), torch.randn(4, linear_inputs(kind)), 0.5 + torch.rand(6)
    d = decompose(weight_of(linear), None, None).to(dtype=torch.float32)
    weighted = WeightedLinear(linear, d.second, d.first, mask)
    shipped = folded(linear, d, mask)
    assert type(shipped) is type(linear)
    torch.testing.assert_close(weighted(x), shipped(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weighted.weight, weight_of(shipped), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weighted(x), factorised(d, mask, bias_of(linear), PairLinear)(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(folded(linear, d, torch.ones(6))(x), linear(x))  # exact where nothing is weighted


def linear_inputs(kind: Any) -> int:
    return 9 if kind is Conv1D else 6


def everything(student: Student) -> list[Tensor]:
    factors = [t for d in student.decompositions.values() for t in vars(d).values() if t is not None]
    return [*student.model.state_dict().values(), *factors]


def test_training_no_values_changes_nothing() -> None:
    student = tiny_student("svd")
    masks = some_masks(student)
    for options, given in ((Descent(steps=0), masks), (Descent(steps=3), dict.fromkeys(masks))):
        trained = train_values(student, given, options)
        for name, mask in given.items():
            got = trained[name]
            assert got is mask is None or (got is not None and mask is not None and torch.equal(got, mask))


def test_what_the_teacher_kept_is_what_it_would_say_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, effort = [], []
    for size in (student_module.TEACHER_BYTES, 0):
        monkeypatch.setattr(student_module, "TEACHER_BYTES", size)
        student = tiny_student("whitened")
        masks = some_masks(student)
        answers.append([student.divergence(masks), student.divergence(masks), student.gradients(masks), student.gradients(masks)])
        effort.append(student.effort["forward_tokens"])
    assert effort[0] < effort[1]  # the second one did ask again
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=0)
    assert answers[0][0] == answers[0][1]


def test_the_teacher_knows_its_own_batches_from_strangers() -> None:
    student = tiny_student("svd")
    expected = {}
    for token in range(6):  # every batch may be where the one before was in memory
        batch = {"input_ids": torch.full((1, 4), token)}
        expected[token] = student.teacher(batch).values
        with torch.no_grad():
            assert torch.equal(expected[token], signal_of(student.model, batch).outright().values)
        del batch


@pytest.mark.parametrize("logit", [-3.0, -0.3, 0.5, 2.0])
def test_a_gumbel_sample_keeps_with_its_probability(logit: float) -> None:
    count = 20_000
    sample = gumbel_sigmoid(torch.full((count,), logit), 0.1, torch.Generator().manual_seed(0))
    assert set(sample.unique().tolist()) <= {0.0, 1.0}
    p = 1 - math.exp(-math.exp(logit))
    assert sample.mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / count))


def test_the_gradient_of_a_gumbel_sample_is_that_of_the_soft_one() -> None:
    temperature, logits = 0.7, torch.linspace(-2, 2, 9)
    seeded: Callable[[], torch.Generator] = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    noise = -torch.log(-torch.log(torch.rand(9, generator=seeded())))
    hard, soft = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weights = torch.arange(9.0)
    (gumbel_sigmoid(hard, temperature, seeded()) * weights).sum().backward()
    (torch.sigmoid((soft + noise) / temperature) * weights).sum().backward()
    torch.testing.assert_close(hard.grad, soft.grad)
    assert hard.grad is not None
    assert (hard.grad[1:] > 0).all()


def test_total_variation() -> None:
    falls, there_and_back = torch.tensor([99.0, 99, 0, -99]), torch.tensor([99.0, -99, 99, -99])
    assert total_variation(falls).item() == pytest.approx(1)
    assert total_variation(there_and_back).item() == pytest.approx(3)
    assert total_variation(torch.full((5,), 0.3)).item() == 0


def test_the_cycle_starts_low_and_is_high_in_the_middle() -> None:
    low, high, period = 0.5, 1.5, 100
    values = [cycle(step, low, high, period) for step in range(2 * period + 1)]
    assert values[0] == values[period] == values[2 * period] == pytest.approx(low)
    assert values[period // 2] == pytest.approx(high)
    assert all(low <= value <= high for value in values)
    assert all(a < b for a, b in pairwise(values[: period // 2 + 1]))


def drawn(tokens: int) -> Batch:
    """A sequence of so many tokens, with its draws."""
    (batch,) = with_draws([{"input_ids": torch.zeros(1, tokens, dtype=torch.long)}], seed=0)
    return batch


def sampled_labels(logits: Tensor, batch: Batch) -> Tensor:
    """The labels that `sampled_loss` drew, read off its gradient: softmax minus one-hot."""
    logits = logits.clone().requires_grad_()
    sampled_loss(Signal(logits, "categorical"), batch).backward()
    assert logits.grad is not None
    return (logits.detach().softmax(-1) - logits.grad).argmax(-1)


def test_sampled_labels_have_the_right_frequencies() -> None:
    count, p = 20_000, torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    labels = sampled_labels(p.log().expand(count, -1), drawn(count))
    got = torch.bincount(labels, minlength=5) / count
    assert got[1] == 0
    assert ((got - p).abs() <= 4 * (p * (1 - p) / count).sqrt()).all(), got


@pytest.mark.parametrize(("uniform", "label"), [(0.0, 1), (0.5, 2), (1 - 2**-24, 2)])
def test_a_label_without_probability_is_never_drawn(uniform: float, label: int) -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    assert sampled_labels(logits, {DRAWS: torch.tensor([[uniform]])}).tolist() == [label]


def test_a_classifier_draws_a_label_for_each_sequence() -> None:
    mask = (torch.arange(12) < torch.tensor([12, 5, 7, 12])[:, None]).long()
    given = {"labels": torch.zeros(4).long(), "input_ids": torch.zeros(4, 12).long(), "attention_mask": mask}
    (batch,) = with_draws([given], seed=0)
    assert sampled_labels(torch.zeros(4, 3), batch).shape == (4,)


def test_any_number_of_processes_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [{"input_ids": torch.full((2, 5), number)} for number in range(7)]
    alone = with_draws(batches, seed=3)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        own = with_draws(batches, seed=3)
        assert [int(batch["input_ids"][0, 0]) for batch in own] == list(range(7))[rank::3]
        assert all(torch.equal(mine[DRAWS], its[DRAWS]) for mine, its in zip(own, alone[rank::3], strict=True))


def test_sampled_features_have_the_variance_of_the_features() -> None:
    values = (3 * torch.randn(4000, 6, generator=torch.Generator().manual_seed(0)) + 1).requires_grad_()
    sampled_loss(Signal(values, "features"), drawn(4000)).backward()
    variance = values.detach().var(0).mean()
    assert values.grad is not None
    noise = -values.grad * variance
    assert noise.var().item() == pytest.approx(variance.item(), rel=0.05)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_divergence_is_zero_for_itself_and_positive_for_any_other(kind: Kind) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 10.0):
        p, q = (Signal(scale * torch.randn(7, 11, generator=generator), kind) for _ in range(2))
        assert divergence(p, p).item() == 0
        assert divergence(p, q).item() > 0
        if kind != "features":  # whose variance is that of the reference
            make = {"categorical": d.Categorical, "bernoulli": d.Bernoulli, "gaussian": lambda logits: d.Normal(logits, 1.0)}[
                kind
            ]
            kl = d.kl_divergence(*(make(logits=signal.values.double()) for signal in (p, q)))
            assert divergence(p, q).item() == pytest.approx(kl.sum().item(), rel=1e-4)


def test_masks_hold_only_inside() -> None:
    student = tiny_student("svd")
    before: list[Any] = [*student.model.modules()]
    with contextlib.suppress(KeyError), student.with_masks(some_masks(student)):
        assert len([*student.model.modules()]) > len(before)
        raise KeyError
    assert [*map(id, student.model.modules())] == [*map(id, before)]


def test_what_one_matrix_costs_is_no_rounding_of_half_precision() -> None:
    half, single = tiny_student("kronecker", 2, torch.bfloat16), tiny_student("kronecker", 2, torch.bfloat16)
    single.model = copy.deepcopy(single.model).float()
    single.decompositions = {name: d.to(dtype=torch.float32) for name, d in single.decompositions.items()}
    name = "model.layers.0.mlp.up_proj"
    full = len(half.decompositions[name].spectrum)
    nearly = [hard_mask(rank, full) for rank in (full - 1, full - 2)]
    wanted = [single.divergence_alone(name, mask, single.selection) for mask in nearly]
    assert [half.divergence_alone(name, mask, half.selection) for mask in nearly] == pytest.approx(wanted, rel=0.05)
    rough = half.divergence({name: nearly[0]}, half.selection)
    assert rough != pytest.approx(wanted[0], rel=0.1)  # else nothing would be shown
    assert half.model.dtype == torch.bfloat16
