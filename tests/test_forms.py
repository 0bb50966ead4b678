"""The forms that a matrix of low rank is written in: their laws, a form built to break each, and what only pivots promise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.layers.lowrank import (
    FORMS,
    LARGEST,
    ColumnPivotedLinear,
    LowRankLinear,
    PairLinear,
    PivotedLinear,
    RowPivotedLinear,
    pivots_of,
)
from rankwise.layers.matrices import Shape
from rankwise.testing.forms import (
    FORM_CASES,
    FORM_LAWS,
    FormCase,
    casts_like_any_layer,
    empty_layer_takes_its_state,
    numbers_are_those_it_holds,
    product_is_that_of_the_factors,
)


@pytest.mark.parametrize("case", FORM_CASES, ids=str)
@pytest.mark.parametrize("law", FORM_LAWS)
@pytest.mark.parametrize("form", sorted(set(itertools.chain(*FORMS.values())), key=str))
def test_obeys(form: type[LowRankLinear], law: Callable[..., None], case: FormCase) -> None:
    law(form, case)


class Shuffled(RowPivotedLinear):
    """It forgets where its rows stand."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(-1)


class Flattering(ColumnPivotedLinear):
    """It counts less than it holds."""

    @staticmethod
    def numbers(out_features: int, in_features: int, rank: Any) -> Any:
        return rank * (out_features + in_features - rank - 1)


class Forgetful(PairLinear):
    """Half of it is not in its state."""

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return {name: t for name, t in super().state_dict(*args, **options).items() if "first" in name}


class Stubborn(RowPivotedLinear):
    """It answers in float64 whatever it is asked."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


@pytest.mark.parametrize(
    ("form", "law"),
    [
        (Shuffled, product_is_that_of_the_factors),
        (Flattering, numbers_are_those_it_holds),
        (Forgetful, empty_layer_takes_its_state),
        (Stubborn, casts_like_any_layer),
    ],
)
def test_a_law_can_be_broken(form: type[LowRankLinear], law: Callable[..., None]) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        law(form, FORM_CASES[0])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 10_000), st.floats(0, 8))
def test_pivots_have_small_coefficients(rank: int, more: int, seed: int, falling: float) -> None:
    """For any B of full rank, its rows however unequal: B[others] = C B[pivots] with no coefficient above the bound."""
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(rank + more, rank, generator=generator, dtype=torch.float64)
    B = B * 10 ** (-falling * torch.rand(rank + more, 1, generator=generator, dtype=torch.float64))
    pivots, others, coefficients = pivots_of(B)
    assert sorted([*pivots.tolist(), *others.tolist()]) == list(range(rank + more))
    assert coefficients.shape == (more, rank)
    assert coefficients.abs().max() <= LARGEST + 1e-6 if more else True
    torch.testing.assert_close(coefficients @ B[pivots], B[others], rtol=0, atol=1e-10 * B.abs().max().item())


def test_lu_alone_would_not_do() -> None:
    """Rows that LU with row pivoting takes in their order, whose coefficients double with every column."""
    rank = 12
    B = torch.cat([torch.eye(rank) - torch.tril(torch.ones(rank, rank), -1), -torch.ones(1, rank)]).double()
    B[-1, -1] = -1
    _, _, coefficients = pivots_of(B)
    assert coefficients.abs().max() <= LARGEST


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([*FORMS]), st.integers(0, 100_000))
def test_a_rank_within_parameters_is_the_largest(m: int, n: int, form: str, parameters: int) -> None:
    shape = Shape(m, n, form=form)
    parameters %= shape.dense
    rank = shape.rank_within(parameters)
    assert shape.parameters(rank) <= parameters < shape.parameters(rank + 1)


def test_a_pivoted_matrix_is_smaller_than_dense_at_every_rank_below_full() -> None:
    shape = Shape(48, 32)
    assert shape.form == PivotedLinear.form
    assert shape.largest_rank() == 31
    assert Shape(48, 32, form=PairLinear.form).largest_rank() == 19
    assert all(shape.parameters(rank) < shape.dense for rank in range(32))
    assert shape.parameters(32) == shape.dense
