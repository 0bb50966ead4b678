"""The laws of a metric, on tiny matrices of every kind. In a test of your own metric:

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    @pytest.mark.parametrize("law", METRIC_LAWS)
    def test_my_metric(law, case):
        law(my_metric, *tiny_matrix(case))

Legend: W [m, n] the weight, R R^T and L L^T the metric on outputs and inputs, B [m, k] and A [k, n] the factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.calibration.moments import Moments
from rankwise.decomposition.metric import Metric, decompose_in, is_affine
from rankwise.decomposition.solver import Decomposition, Root

SEQUENCES = 4


@dataclass(frozen=True)
class Case:
    """A matrix [outputs, inputs] and the text it is seen on; `dead` inputs are always zero and outputs without gradient."""

    outputs: int
    inputs: int
    tokens: int = 40
    dead: int = 0


CASES = {
    "wide": Case(8, 14),
    "tall": Case(14, 8),
    "square": Case(10, 10),
    "one output": Case(1, 6),
    "fewer tokens than features": Case(8, 14, tokens=5),
    "dead features": Case(12, 10, dead=4),
}


def tiny_matrix(case: Case, seed: int = 0) -> tuple[Tensor, Moments]:
    """Return a random W [outputs, inputs] float64 and its moments of correlated activations and gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, g = (draw(case.tokens, d) @ draw(d, d) for d in (case.inputs, case.outputs))
    for values in (x, g):
        values[:, : min(case.dead, values.shape[1] - 1)] = 0
    sequences = zip(g.chunk(SEQUENCES), x.chunk(SEQUENCES), strict=True)
    fisher = torch.stack([(gs.T @ xs).square().sum(0) for gs, xs in sequences]).sum(0)
    return draw(case.outputs, case.inputs), Moments(case.tokens, x.T @ x, x.abs().sum(0), g.T @ g, fisher, x.sum(0))


def full_rank_is_exact(metric: Metric, W: Tensor, moments: Moments) -> None:
    """B A equals W with k = min(m, n) components, whether the metric is singular or not."""
    d = _decomposed(metric, W, moments)
    k = min(W.shape)
    assert [*map(tuple, (d.second.shape, d.first.shape, d.spectrum.shape))] == [(len(W), k), (k, W.shape[1]), (k,)]
    torch.testing.assert_close(d.second @ d.first, W, rtol=0, atol=1e-7 * W.abs().max().item())


def spectrum_descends(metric: Metric, W: Tensor, moments: Moments) -> None:
    """The spectrum is finite, non-negative, descending, and not all zero."""
    spectrum = _decomposed(metric, W, moments).spectrum
    assert bool(torch.isfinite(spectrum).all()), spectrum
    assert bool((spectrum >= 0).all()), spectrum
    assert bool((spectrum.diff() <= 0).all()), spectrum
    assert spectrum[0] > 0


def error_is_the_tail(metric: Metric, W: Tensor, moments: Moments) -> None:
    """||R^T (W - W_r) L||^2 is the sum of the squared spectrum from r on, for every r."""
    d = _decomposed(metric, W, moments)
    squares = d.spectrum.square()
    for r in range(len(squares) + 1):
        error = _in_norm(metric, moments, W - d.second[:, :r] @ d.first[:r]).square().sum()
        torch.testing.assert_close(error, squares[r:].sum(), rtol=1e-6, atol=1e-9 * squares.sum().item())


def components_are_orthogonal(metric: Metric, W: Tensor, moments: Moments) -> None:
    """In the metric's norm every component costs its squared singular value, whichever others are kept: any selection is a
    model, and the first r components are the rank-r one."""
    d = _decomposed(metric, W, moments)
    parts = torch.stack([_in_norm(metric, moments, d.second[:, [i]] @ d.first[[i]]).flatten() for i in range(len(d.spectrum))])
    squares = d.spectrum.square()
    torch.testing.assert_close(parts @ parts.T, squares.diag(), rtol=1e-6, atol=1e-9 * squares.sum().item())


def affine_keeps_the_mean(metric: Metric, W: Tensor, moments: Moments) -> None:
    """Affine factors answer the mean input with the mean output, whatever is dropped."""
    d = _decomposed(metric, W, moments)
    for r in range(len(d.spectrum) + 1):
        dropped = d.dropped((torch.arange(len(d.spectrum)) < r).double())
        assert (dropped is not None) == is_affine(metric)
        if dropped is not None:
            torch.testing.assert_close(
                d.second[:, :r] @ d.first[:r] @ moments.mean + dropped, W @ moments.mean, rtol=1e-6, atol=1e-6
            )


def same_twice(metric: Metric, W: Tensor, moments: Moments) -> None:
    """The same matrix and moments give the same factors, bit for bit."""
    first, second = (vars(_decomposed(metric, W, moments)) for _ in range(2))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def scale_is_free(metric: Metric, W: Tensor, moments: Moments) -> None:
    """A loss in another unit, twice as large, changes no rank-r model, and c W has c times the rank-r models of W."""
    d = _decomposed(metric, W, moments)
    sums = {name: value for name, value in vars(moments).items() if isinstance(value, Tensor)}
    gradients = {"fisher": 4.0, "output": 4.0}
    doubled = Moments(moments.count, **{name: gradients.get(name, 1.0) * value for name, value in sums.items()})
    gaps = (d.spectrum[:-1] - d.spectrum[1:]) / d.spectrum[0]
    for r in [r for r, gap in enumerate(gaps.tolist(), start=1) if gap > 1e-3]:  # else the rank-r model is not unique
        model = d.second[:, :r] @ d.first[:r]
        for c, other in ((1.0, _decomposed(metric, W, doubled)), (3.0, _decomposed(metric, 3.0 * W, moments))):
            torch.testing.assert_close(other.second[:, :r] @ other.first[:r], c * model, rtol=1e-6, atol=1e-6)


METRIC_LAWS: tuple[Callable[[Metric, Tensor, Moments], None], ...] = (
    full_rank_is_exact,
    spectrum_descends,
    error_is_the_tail,
    components_are_orthogonal,
    affine_keeps_the_mean,
    same_twice,
    scale_is_free,
)


def _decomposed(metric: Metric, W: Tensor, moments: Moments) -> Decomposition:
    assert {need for need in metric.NEEDS if getattr(moments, need, None) is None} == set(), "NEEDS names moments"
    allowed = Moments(moments.count, **{need: getattr(moments, need) for need in metric.NEEDS})
    return decompose_in(metric, W, allowed)


def _in_norm(metric: Metric, moments: Moments, X: Tensor) -> Tensor:
    """R^T X L [m, n]."""
    roots: tuple[Root | None, Root | None] = metric.roots(moments)
    left, right = roots
    X = X if left is None else left.apply(X)
    return X if right is None else right.apply(X.T).T
