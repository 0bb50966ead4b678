"""ARS, ARA and Dobi-SVD: the masks are their formulas, and training them finds better ranks than uniform ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, build
from torch import Tensor

from rankwise.allocation.allocator import Allocator
from rankwise.allocation.ara import ARA
from rankwise.allocation.ars import ARS
from rankwise.allocation.dobi import Dobi
from rankwise.allocation.plan import parameters
from rankwise.allocation.proportional import proportional
from rankwise.allocation.uniform import Uniform
from rankwise.layers.matrices import Shape
from rankwise.masks.gumbel import chance, gumbel_sigmoid
from rankwise.masks.hypernetwork import HyperNetwork, excess, misalignment, size
from rankwise.masks.position import position_mask, range_penalty
from rankwise.masks.staircase import staircase, staircase_mask
from rankwise.masks.student import Student
from rankwise.masks.training import MaskTraining, next_token_loss, objective_named, train_masks
from rankwise.testing.allocators import tiny_problem

MATRIX = "model.layers.0.mlp.up_proj"


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


# The staircase of ARA


def test_staircase_by_hand() -> None:
    B = staircase(2, 4)
    assert B.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    theta = torch.tensor([math.log(3), 0.0], requires_grad=True)  # alpha = 3/4, 1/4
    chances = theta.softmax(0) @ B
    torch.testing.assert_close(chances, torch.tensor([1, 1, 0.25, 0.25]))
    assert staircase_mask(chances, largest=3).tolist() == [1, 1, 0, 0]  # they sum up to 2.5, and 2 is the even neighbour
    assert staircase_mask(chances, largest=1).tolist() == [1, 1, 1, 1]  # above the largest rank: dense
    weights = torch.tensor([1.0, 2, 3, 4])
    (straight,) = torch.autograd.grad((staircase_mask(chances, 3) * weights).sum(), theta, retain_graph=True)
    (of_chances,) = torch.autograd.grad((chances * weights).sum(), theta)
    assert torch.equal(straight, of_chances)
    torch.testing.assert_close(straight, torch.tensor([-1.0, 1]) * 3 / 16 * 7)  # d alpha = -+ 3/16, on the last two columns


@pytest.mark.parametrize(("steps", "length"), [(1, 5), (7, 7), (32, 48), (3, 100)])
def test_staircase_never_rises(steps: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    B = staircase(steps, length)
    assert B[-1].all()
    assert (B.sum(1).diff() >= 1).all()
    for _ in range(20):
        theta = 3 * torch.randn(steps, generator=generator)
        chances = theta.softmax(0) @ B
        assert (chances.diff() <= 1e-6).all()
        mask = staircase_mask(chances, length)
        assert mask.sum() == chances.sum().round()
        assert (mask.diff() <= 0).all()


# The position of Dobi-SVD


@pytest.mark.parametrize("k", [1.0, 2.5, 3.1, 6.0])
def test_position_mask_by_hand(k: float) -> None:
    position = torch.tensor(k, requires_grad=True)
    mask = position_mask(position, 6, beta=10.0)
    expected = 0.5 * np.tanh(10 * (k - np.arange(1, 7))) + 0.5
    np.testing.assert_allclose(mask.detach(), expected, rtol=1e-4, atol=1e-7)
    mask.sum().backward()
    slope = (5 / np.cosh(10 * (k - np.arange(1, 7))) ** 2).sum()
    assert position.grad == pytest.approx(slope, rel=1e-3)


def test_position_outside_is_held_and_penalised() -> None:
    assert position_mask(torch.tensor(-3.0), 4, 10.0).tolist() == position_mask(torch.tensor(1.0), 4, 10.0).tolist()
    positions = torch.tensor([-2.0, 3.0, 9.0], requires_grad=True)
    penalty = range_penalty(positions, torch.tensor([8.0, 8.0, 8.0]))
    penalty.backward()
    assert penalty == 4 + 1
    assert positions.grad is not None
    assert positions.grad.tolist() == [-4, 0, 2]


# The hyper-network of ARS


def test_ars_terms_by_hand() -> None:
    masks = {"a": ints(1, 0, 1).requires_grad_(True), "b": ints(1, 1).requires_grad_(True)}
    spectra = {"a": ints(3, 2, 1), "b": ints(5, 4)}
    kept = size(masks, {"a": Shape(3, 4, form="pair"), "b": Shape(2, 6, form="pair")})
    assert kept == 2 * 7 + 2 * 8
    assert excess(kept, 30.0) == excess(kept, 40.0) == 0
    assert excess(kept, 20.0).item() == pytest.approx(math.log(30 / 20))
    unaligned = misalignment(masks, spectra)
    assert unaligned == ((0 - 1) ** 2 * 4 + (1 - 0) ** 2 * 1) / 2  # a should keep its first two; b does
    gradients = torch.autograd.grad(unaligned + excess(kept, 20.0), [*masks.values()])
    torch.testing.assert_close(gradients[0], ints(0, -4, 1) + 7 / 30)
    torch.testing.assert_close(gradients[1], ints(0, 0) + 8 / 30)


def test_chance_is_the_frequency() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([-2.0, -0.5, 0.0, 1.0])
    drawn = torch.stack([gumbel_sigmoid(logits, 0.4, generator) for _ in range(4000)])
    torch.testing.assert_close(drawn.mean(0), chance(logits), atol=0.02, rtol=0)


def test_hypernetwork_is_its_seed() -> None:
    state = torch.get_rng_state()
    lengths = {"a.b": 5, "c": 3}
    network, again, other = HyperNetwork(lengths, 0), HyperNetwork(lengths, 0), HyperNetwork(lengths, 1)
    assert torch.equal(torch.get_rng_state(), state)
    logits = network()
    assert {name: len(o) for name, o in logits.items()} == lengths
    assert all(torch.equal(o, again()[name]) and not torch.equal(o, other()[name]) for name, o in logits.items())
    logits["a.b"].sum().backward()
    assert not network.z.requires_grad
    assert network.gru.weight_ih_l0.grad is not None
    assert network.gru.weight_ih_l0.grad.abs().sum() > 0


# The loop


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_next_token_loss_is_transformers_own(side: str) -> None:
    model = build("llama")
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    if side != "none":
        padding = slice(4) if side == "left" else slice(-4, None)
        mask[1, padding], labels[1, padding] = 0, -100
    if side == "left":
        labels[1, 4] = -100  # transformers has a pad predict the first token
    batch = {"input_ids": ids, "attention_mask": mask}
    expected = model(**batch, labels=labels).loss
    torch.testing.assert_close(next_token_loss(model, batch), expected)


def test_objective_is_the_text_where_there_is_one() -> None:
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    names = {
        n: objective_named("next-token", Student(build(n), {}, [batch], [batch])).name
        for n in ("llama", "t5", "bert-mlm", "bert")
    }
    assert names == {"llama": "next-token loss", "t5": "next-token loss", "bert-mlm": "kl", "bert": "kl"}
    assert objective_named("kl", Student(build("llama"), {}, [batch], [batch])).name == "kl"


def test_the_loop_minimises() -> None:
    """Half of one matrix hidden, its mask learned back from the original: the KL falls; the loss beside it does too."""
    student = tiny_problem("whitened", 0.3).student
    lengths = {name: len(d.spectrum) for name, d in student.decompositions.items()}
    logits = torch.zeros(lengths[MATRIX], requires_grad=True)
    seen = []

    def masks() -> dict[str, Tensor]:
        return {name: torch.sigmoid(logits) if name == MATRIX else torch.ones(k) for name, k in lengths.items()}

    def extra(step: int, drawn: Any) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(step)
        return 1e-6 * drawn[MATRIX].sum(), {"sum": drawn[MATRIX].sum()}

    before = dict(student.effort)
    history = train_masks(
        student,
        objective_named("kl", student),
        [logits],
        masks,
        extra,
        MaskTraining(steps=200, learning_rate=0.1, sequences=4),
        torch.Generator().manual_seed(0),
        done=lambda: len(seen) == 101,
    )
    assert [record["step"] for record in history] == [0, 50, 100]
    assert history[-1]["kl"] < 0.2 * history[0]["kl"]
    assert history[-1]["sum"] > history[0]["sum"]
    assert seen == [*range(101)]
    tokens = 101 * student.training[0]["input_ids"][:4].numel()
    assert student.effort["backward_tokens"] - before["backward_tokens"] == tokens
    assert student.effort["forward_tokens"] - before["forward_tokens"] == 2 * tokens


# The allocators


def test_counts_are_scaled_alike() -> None:
    problem = tiny_problem("whitened", 0.5)
    counts = {name: 0.9 * shape.largest_rank() for name, shape in problem.shapes.items()}
    counts[MATRIX] /= 3
    answer = proportional(problem, counts, [{"step": 0}])
    factors = [(answer.ranks[name] or 0) / count for name, count in counts.items()]
    assert max(factors) - min(factors) < 2 / min(counts.values())
    assert answer.history == [{"step": 0}]
    assert 0 <= problem.budget.parameters - parameters(answer.ranks, problem.shapes) < problem.shapes[MATRIX].per_rank


@pytest.mark.parametrize("allocator", [ARS(steps=150, loss="kl"), ARA(steps=100, loss="kl"), Dobi(steps=100, loss="kl")])
def test_trained_is_better_than_uniform(allocator: Allocator) -> None:
    problem = tiny_problem("whitened", 0.3)
    student = problem.student
    answer = allocator.allocate(problem)
    assert parameters(answer.ranks, problem.shapes) <= problem.budget.parameters
    kl, uniform = (student.divergence(a.masks, student.training) for a in (answer, Uniform().allocate(problem)))
    assert kl < 0.9 * uniform
    once, again = (replace(allocator, steps=10).allocate(tiny_problem("whitened", 0.3)) for _ in range(2))  # type: ignore[type-var]
    assert again.ranks == once.ranks
    assert again.history == once.history
