"""Every metric against its paper's formula and against brute force on the activations themselves, all in float64.

Legend: X [T, n] activations, Gr [T, m] gradients of the loss at the outputs, W [m, n], W_r its rank-r model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise import RankwiseError
from rankwise.calibration.moments import Moments
from rankwise.decomposition import activation, kronecker, whitened
from rankwise.decomposition.metric import METRICS, decompose_in, metric_named
from rankwise.decomposition.solver import Decomposition, decompose
from rankwise.testing.metrics import METRIC_LAWS, Case, tiny_matrix

Array = np.ndarray[Any, np.dtype[np.float64]]
SEQUENCES = 4
SHAPES = {"m < n": (6, 9), "m > n": (9, 6), "m = n": (7, 7)}
TOKENS = {"many tokens": 60, "fewer tokens than features": 4}
cases = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
texts = pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)


@dataclass(frozen=True)
class Seen:
    """A matrix and the text it was seen on, as arrays and as moments."""

    W: Array
    X: Array
    Gr: Array

    @classmethod
    def of(cls, shape: tuple[int, int], tokens: int = 60) -> Seen:
        rng, (m, n) = np.random.default_rng(0), shape
        return cls(rng.normal(size=shape), rng.normal(size=(tokens, n)) @ rng.normal(size=(n, n)), rng.normal(size=(tokens, m)))

    @property
    def fisher(self) -> Array:
        """sum over sequences and outputs of (dL/dW)^2 [n]."""
        parts = zip(np.split(self.Gr, SEQUENCES), np.split(self.X, SEQUENCES), strict=True)
        return np.sum([((g.T @ x) ** 2).sum(0) for g, x in parts], axis=0)

    def decomposed(self, metric: str) -> Decomposition:
        X, Gr = torch.tensor(self.X), torch.tensor(self.Gr)
        moments = Moments(len(X), X.T @ X, X.abs().sum(0), Gr.T @ Gr, torch.tensor(self.fisher), X.sum(0))
        return decompose_in(metric_named(metric), torch.tensor(self.W), moments)


def kept(d: Decomposition, components: Any) -> Array:
    """The model of some components [m, n]."""
    return (d.second[:, components] @ d.first[components]).numpy()


def best_errors(M: Array) -> Array:
    """[k + 1]: the squared error of the best rank-r approximation of M, for r = 0..k (Eckart-Young)."""
    return np.append(np.cumsum(np.linalg.svd(M, compute_uv=False)[::-1] ** 2)[::-1], 0)


@cases
@texts
def test_whitened_error_is_that_of_the_outputs_and_the_least_there_is(shape: tuple[int, int], tokens: int) -> None:
    seen = Seen.of(shape, tokens)
    d, best = seen.decomposed("whitened"), best_errors(seen.X @ seen.W.T)
    for r in range(min(shape) + 1):
        error = np.square(seen.X @ (seen.W - kept(d, slice(r))).T).sum()
        assert error == pytest.approx(d.spectrum[r:].square().sum().item(), rel=1e-5, abs=1e-6 * best[0])
        assert error == pytest.approx(best[r] if r < len(best) else 0, rel=1e-6, abs=1e-9 * best[0])


@cases
@texts
def test_centred_is_the_principal_components_of_the_outputs_about_their_mean(shape: tuple[int, int], tokens: int) -> None:
    seen = Seen.of(shape, tokens)
    seen = Seen(seen.W, seen.X + 3.0, seen.Gr)
    Y = seen.X @ seen.W.T
    d, best = seen.decomposed("centred"), best_errors(Y - Y.mean(0))
    for r in range(min(shape) + 1):
        dropped = d.dropped((torch.arange(min(shape)) < r).double())
        assert dropped is not None
        error = np.square(Y - seen.X @ kept(d, slice(r)).T - dropped.numpy()).sum()
        assert error == pytest.approx(best[r] if r < len(best) else 0, rel=1e-5, abs=1e-6 * best[0])


@cases
@texts
def test_kronecker_error_is_that_of_both_sides_and_the_least_there_is(shape: tuple[int, int], tokens: int) -> None:
    seen = Seen.of(shape, tokens)
    H, G = seen.X.T @ seen.X, seen.Gr.T @ seen.Gr / tokens
    for moment, damping in ((H, kronecker.INPUT_DAMPING), (G, kronecker.OUTPUT_DAMPING)):
        sampled = kronecker.SAMPLING * len(moment) / tokens * np.diag(moment)
        moment += np.diag(damping * np.trace(moment) / len(moment) + sampled)
    d, best = seen.decomposed("kronecker"), best_errors(np.linalg.cholesky(G).T @ seen.W @ np.linalg.cholesky(H))
    for r in range(min(shape) + 1):
        D = seen.W - kept(d, slice(r))
        error = np.trace(G @ D @ H @ D.T)
        assert error == pytest.approx(d.spectrum[r:].square().sum().item(), rel=1e-9, abs=1e-12 * best[0])
        assert error == pytest.approx(best[r], rel=1e-9, abs=1e-12 * best[0])


@cases
def test_activation_is_asvd(shape: tuple[int, int]) -> None:
    seen = Seen.of(shape)
    S = (np.abs(seen.X).mean(0) + activation.FLOOR) ** 0.5
    check_diagonal(seen, "activation", S, 1e-9)


@cases
def test_fisher_is_fwsvd(shape: tuple[int, int]) -> None:
    seen = Seen.of(shape)
    check_diagonal(seen, "fisher", np.sqrt(seen.fisher), 1e-5)  # but for the floor


def check_diagonal(seen: Seen, metric: str, S: Array, tolerance: float) -> None:
    """W_r is the truncated SVD of W diag(S), times diag(S)^-1."""
    U, s, Vt = np.linalg.svd(seen.W * S, full_matrices=False)
    d = seen.decomposed(metric)
    np.testing.assert_allclose(d.spectrum, s, rtol=tolerance)
    for r in range(len(s) + 1):
        np.testing.assert_allclose(kept(d, slice(r)), (U[:, :r] * s[:r]) @ Vt[:r] / S, atol=tolerance * 10)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feature_ten_thousand_times_the_others_costs_no_accuracy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    seen = Seen.of(shape)
    X, W = torch.tensor(seen.X), torch.tensor(seen.W).to(dtype)
    X[:, 0] *= 1e4
    d, best = decompose(W, *whitened.roots(Moments(len(X), X.T @ X))), best_errors((X @ W.double().T).numpy())
    assert d.first.dtype == d.second.dtype == torch.float32
    for r in range(min(shape)):
        error = (X @ (W.double() - d.second[:, :r].double() @ d.first[:r].double()).T).square().sum().item()
        assert error == pytest.approx(best[r], rel=1e-4, abs=1e-12 * best[0])


@cases
def test_every_single_component_costs_its_square(shape: tuple[int, int]) -> None:
    seen = Seen.of(shape)
    d = seen.decomposed("whitened")
    for i in range(min(shape)):
        error = np.square(seen.X @ (seen.W - kept(d, [j for j in range(min(shape)) if j != i])).T).sum()
        assert error == pytest.approx(d.spectrum[i].item() ** 2, rel=1e-5)


@settings(deadline=None)
@given(
    case=st.builds(Case, st.integers(1, 9), st.integers(1, 9), st.integers(4, 20), st.integers(0, 8)),
    metric=st.sampled_from(sorted(METRICS)),
    seed=st.integers(0, 1000),
)
def test_laws_hold_for_every_shape_and_rank_deficient_text(case: Case, metric: str, seed: int) -> None:
    for law in METRIC_LAWS:
        law(METRICS[metric], *tiny_matrix(case, seed))


@pytest.mark.parametrize("metric", METRICS)
def test_a_site_that_is_always_zero_still_has_an_exact_full_rank_model(metric: str) -> None:
    W, m = tiny_matrix(Case(5, 8))
    moments = Moments(m.count, **{n: torch.zeros_like(t) for n, t in vars(m).items() if isinstance(t, torch.Tensor)})
    d = decompose_in(METRICS[metric], W, moments)
    torch.testing.assert_close(d.second @ d.first, W)


def test_a_zero_matrix_decomposes_into_zeros() -> None:
    W, moments = tiny_matrix(Case(5, 8))
    d = decompose(torch.zeros_like(W), *whitened.roots(moments))
    assert torch.equal(d.second @ d.first, torch.zeros_like(W))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    W, moments = tiny_matrix(Case(5, 8))
    W[2, 3] = value
    with pytest.raises(RankwiseError, match="not finite"):
        decompose(W, *whitened.roots(moments))


def test_factors_change_dtype_and_the_spectrum_does_not() -> None:
    W, moments = tiny_matrix(Case(5, 8))
    d = decompose(W.bfloat16(), *whitened.roots(moments)).to(dtype=torch.bfloat16)
    assert (d.second.dtype, d.first.dtype, d.spectrum.dtype) == (torch.bfloat16, torch.bfloat16, torch.float64)


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RankwiseError, match="kronecker"):
        metric_named("whitenned")
