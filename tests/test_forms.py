"""The forms that a matrix of low rank is written in: their laws, a form built to break each, and what only pivots promise."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rankwise import compress
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
from rankwise.reporting.inspect import inspect
from rankwise.testing.forms import (
    FORM_CASES,
    FORM_LAWS,
    FormCase,
    casts_like_any_layer,
    computes_what_the_masked_factors_do,
    empty_layer_takes_its_state,
    numbers_are_those_it_holds,
    product_is_that_of_the_factors,
    whole_is_the_dense_layer,
)

WINDOWS = torch.randint(3, 90, (12, 32), generator=torch.Generator().manual_seed(1))


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


class Thrifty(PairLinear):
    """It leaves out components that look small."""

    @classmethod
    def from_factors(cls, second: Tensor, first: Tensor, bias: Tensor | None = None) -> Any:
        sizes = first.norm(dim=1, keepdim=True)
        return super().from_factors(second, first * (sizes > 0.3 * sizes.max()), bias)


class Modest(RowPivotedLinear):
    """It has no room for the last component."""

    @classmethod
    def from_factors(cls, second: Tensor, first: Tensor, bias: Tensor | None = None) -> Any:
        room = min(len(second), first.shape[1]) - 1
        return super().from_factors(second[:, :room], first[:room], bias)


@pytest.mark.parametrize(
    ("form", "law"),
    [
        (Shuffled, product_is_that_of_the_factors),
        (Flattering, numbers_are_those_it_holds),
        (Forgetful, empty_layer_takes_its_state),
        (Stubborn, casts_like_any_layer),
        (Thrifty, computes_what_the_masked_factors_do),
        (Modest, whole_is_the_dense_layer),
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


@pytest.fixture(params=FORMS)
def small(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A compressed model in memory, and its folder."""
    result = compress(build("qwen2"), 0.3, allocation="uniform", decomposition="svd", calibration=WINDOWS, form=request.param)
    result.save(tmp_path / "small")
    return result.model, tmp_path / "small"


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(WINDOWS[:2]).logits
    return logits


def test_saved_equals_loaded_bit_for_bit_and_states_its_form(small: tuple[Any, Path]) -> None:
    model, folder = small
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["form"] in FORMS
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(loaded), logits_of(model))
    classes = {type(module) for module in loaded.modules() if isinstance(module, LowRankLinear)}
    assert classes == {type(module) for module in model.modules() if isinstance(module, LowRankLinear)}
    assert classes <= set(FORMS[config["form"]])
    rows = inspect(folder)
    held = sum(p.numel() for m in loaded.modules() if isinstance(m, LowRankLinear) for p in (m.first.weight, m.second.weight))
    assert sum(row["parameters"] for row in rows if row["rank"] is not None) == held


def test_a_folder_of_the_first_format_is_one_of_pairs(small: tuple[Any, Path]) -> None:
    model, folder = small
    config = json.loads((folder / "config.json").read_text())
    form = config["quantization_config"].pop("form")
    config["quantization_config"].pop("own_names")
    config["quantization_config"]["format_version"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    if form == PairLinear.form:
        assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(model))
    else:
        with pytest.raises((ValueError, RuntimeError)):
            AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("damage", ["lost", "twice the same"])
def test_damaged_order_is_refused(damage: str, tmp_path: Path) -> None:
    compress(build("llama"), 0.3, allocation="uniform", decomposition="svd", calibration=WINDOWS, output=tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".order"))
    if damage == "lost":
        del tensors[name]
    else:
        tensors[name][0] = tensors[name][1]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(name)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")
