"""The laws of a form, on tiny matrices of every kind. In a test of your own form:

    @pytest.mark.parametrize("case", FORM_CASES, ids=str)
    @pytest.mark.parametrize("law", FORM_LAWS)
    def test_my_form(law, case):
        law(MyLinear, case)

Legend: B [m, r] and A [r, n] the factors of a matrix of rank r.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.decomposition.solver import decompose
from rankwise.layers.lowrank import LowRankLinear
from rankwise.masks.layers import MaskedLinear, factorised

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = 8.0  # of the largest entry of |B| |A|, that the product may be off


@dataclass(frozen=True)
class FormCase:
    """A matrix [outputs, inputs] of rank `rank`; with `alike` rows its rows nearly are, up to 1e-3."""

    outputs: int
    inputs: int
    rank: int
    alike: bool = False


FORM_CASES = (
    FormCase(8, 14, 3),
    FormCase(14, 8, 7),
    FormCase(10, 10, 1),
    FormCase(10, 10, 9),
    FormCase(96, 64, 40),
    FormCase(48, 32, 5, alike=True),
)


def tiny_factors(case: FormCase, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return B [m, r], A [r, n] and a bias [m]."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    second, first, bias = draw(case.outputs, case.rank), draw(case.rank, case.inputs), draw(case.outputs)
    if case.alike:
        second = second[:1] + 1e-3 * second
    return second.to(dtype), first.to(dtype), bias.to(dtype)


def tiny_matrix(case: FormCase) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix of full rank [m, n], a bias [m] and inputs [2, 3, n], in float64."""
    second, first, bias = tiny_factors(case)
    generator = torch.Generator().manual_seed(1)
    more = torch.randn(case.outputs, case.inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 3, case.inputs, generator=generator, dtype=torch.float64)
    return second @ first + more, bias, x


def product_is_that_of_the_factors(form: type[LowRankLinear], case: FormCase) -> None:
    """`weight` is B A, and `forward` multiplies by it and adds the bias; both up to rounding in every dtype."""
    for dtype in DTYPES:
        second, first, bias = tiny_factors(case, dtype)
        layer = form.from_factors(second, first, bias)
        exact = second.double() @ first.double()
        bound = ROUNDINGS * torch.finfo(dtype).eps * (second.double().abs() @ first.double().abs()).max().item()
        torch.testing.assert_close(layer.weight.double(), exact, rtol=0, atol=bound)
        x = torch.randn(2, 3, case.inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
        wanted = F.linear(x.double(), exact, bias.double())
        torch.testing.assert_close(layer(x).double(), wanted, rtol=0, atol=bound * case.inputs)


def numbers_are_those_it_holds(form: type[LowRankLinear], case: FormCase) -> None:
    """`numbers` counts the parameters of the factors, rises with the rank, and `rank_of` undoes it."""
    second, first, _ = tiny_factors(case)
    layer, (m, n) = form.from_factors(second, first), (case.outputs, case.inputs)
    assert form.numbers(m, n, case.rank) == sum(p.numel() for p in layer.parameters())
    counts = [form.numbers(m, n, rank) for rank in range(min(m, n))]
    assert counts == sorted(set(counts))
    for rank, count in enumerate(counts):
        assert abs(form.rank_of(m, n, count) - rank) < 1e-6


def empty_layer_takes_its_state(form: type[LowRankLinear], case: FormCase) -> None:
    """A layer of the same sizes without values, loaded with the state of another, is that layer."""
    for given in (None, tiny_factors(case)[2]):
        layer = form.from_factors(*tiny_factors(case)[:2], given)
        sizes = case.inputs, case.outputs, case.rank
        empty = form(*sizes, bias=given is not None, device="meta", dtype=torch.float64)
        state = layer.state_dict()
        assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
            name: (t.shape, t.dtype) for name, t in empty.state_dict().items()
        }
        empty.load_state_dict(state, strict=True, assign=True)
        x = torch.randn(4, case.inputs, dtype=torch.float64)
        assert torch.equal(empty(x), layer(x))


def casts_like_any_layer(form: type[LowRankLinear], case: FormCase) -> None:
    """A layer cast to another dtype is what its cast tensors make, and its output has that dtype."""
    layer = form.from_factors(*tiny_factors(case))
    for dtype in DTYPES:
        assert layer.to(dtype)(torch.ones(1, case.inputs, dtype=dtype)).dtype == dtype


def computes_what_the_masked_factors_do(form: type[LowRankLinear], case: FormCase) -> None:
    """Whichever components a mask keeps, and however it weighs them, the layer that is installed for it computes what the
    masked full-length factors do, affine ones too."""
    weight, bias, x = tiny_matrix(case)
    generator = torch.Generator().manual_seed(2)
    kept = torch.randperm(min(weight.shape), generator=generator)[: case.rank]
    mask = torch.zeros(min(weight.shape))
    mask[kept] = 10 ** (-3 * torch.rand(case.rank, generator=generator))
    for mean in (None, x.mean((0, 1))):
        of = decompose(weight, None, None, mean)
        layer = factorised(of, mask, bias, form)
        assert layer.rank == case.rank
        masked = MaskedLinear(of.second, of.first, bias, mask, of.centre)
        torch.testing.assert_close(layer(x), masked(x), rtol=0, atol=1e-6)  # masks are float32


def whole_is_the_dense_layer(form: type[LowRankLinear], case: FormCase) -> None:
    """With all components of a matrix kept, the layer computes what the dense one does."""
    weight, bias, x = tiny_matrix(case)
    of = decompose(weight, None, None)
    layer = factorised(of, torch.ones_like(of.spectrum), bias, form)
    torch.testing.assert_close(layer(x), F.linear(x, weight, bias), rtol=0, atol=1e-9)


FORM_LAWS: tuple[Callable[[type[LowRankLinear], FormCase], None], ...] = (
    product_is_that_of_the_factors,
    numbers_are_those_it_holds,
    empty_layer_takes_its_state,
    casts_like_any_layer,
    computes_what_the_masked_factors_do,
    whole_is_the_dense_layer,
)
