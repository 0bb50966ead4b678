"""The layers that run in a compressed model in place of a matrix of low rank, one class for each form of it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rankwise.layers.precision import exact

LARGEST = 2.0  # of the coefficients that combine pivots


class LowRankLinear(nn.Module):
    """y = W x + b with a weight [out_features, in_features] of rank `rank`, held as two plain linear layers, `first` and
    `second`: whatever handles linear layers (PEFT, torchao, FSDP, torch.compile, exporters) handles them."""

    form: ClassVar[str]

    first: nn.Linear
    second: nn.Linear
    bias: Any  # [out_features], or None

    def __init__(self, in_features: int, out_features: int, rank: int, **options: Any) -> None:
        """options: bias, device and dtype, as of `nn.Linear`."""
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank

    @staticmethod
    @abstractmethod
    def numbers(out_features: int, in_features: int, rank: Any) -> Any:
        """How many numbers both factors hold at `rank`, an integer or a tensor."""

    @staticmethod
    @abstractmethod
    def rank_of(out_features: int, in_features: int, numbers: float) -> float:
        """The rank, seldom whole, whose factors hold that many numbers."""

    @classmethod
    @abstractmethod
    def from_factors(cls, second: Tensor, first: Tensor, bias: Tensor | None = None) -> Self:
        """A layer of the product of `second` [out_features, rank] and `first` [rank, in_features], in their dtype and device."""

    @property
    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """[out_features, rank] and [rank, in_features], whose product is the weight."""

    @property
    def weight(self) -> Tensor:
        """The dense product [out_features, in_features], computed at each read: some models look at their layers' weights."""
        second, first = self.factors
        return second @ first

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PairLinear(LowRankLinear):
    """y = second(first(x)): the weight written as B [out_features, rank] A [rank, in_features]. A bias belongs to `second`."""

    form = "pair"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False, **options: Any) -> None:
        super().__init__(in_features, out_features, rank)
        self.first = nn.Linear(in_features, rank, bias=False, **options)
        self.second = nn.Linear(rank, out_features, bias=bias, **options)

    @staticmethod
    def numbers(out_features: int, in_features: int, rank: Any) -> Any:
        return rank * (out_features + in_features)

    @staticmethod
    def rank_of(out_features: int, in_features: int, numbers: float) -> float:
        return numbers / (out_features + in_features)

    @classmethod
    def from_factors(cls, second: Tensor, first: Tensor, bias: Tensor | None = None) -> Self:
        (out_features, rank), in_features = second.shape, first.shape[1]
        layer = cls(in_features, out_features, rank, bias=bias is not None, device="meta", dtype=second.dtype)
        layer.first.weight, layer.second.weight = _fixed(first), _fixed(second)
        if bias is not None:
            layer.second.bias = _fixed(bias.detach().clone())
        return layer

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        return _dense(self.second.weight), _dense(self.first.weight)

    @property
    def bias(self) -> Tensor | None:
        """[out_features], or None."""
        return self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.second(self.first(x))


class PivotedLinear(LowRankLinear):
    """Rank-many rows, or columns, of the product as they are, its pivots, and the others as combinations of them.

    Any matrix of rank r has r rows of which all others are combinations, and likewise columns: r (m + n - r) numbers hold exactly
    what a pair of factors holds in r (m + n), with fewer multiplications, and less than dense at every rank below full. (PIFA,
    Zhao et al. 2025, arXiv 2501.19090; SkipCat, arXiv 2512.13494.) Which of the two it is decides what must be gathered, the
    outputs or the inputs: the fewer (`layer_class`).
    """

    form = "pivoted"
    order: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False, **options: Any) -> None:
        super().__init__(in_features, out_features, rank)
        first, second, gathered = self._sizes()
        self.first, self.second = (nn.Linear(*sizes, bias=False, **options) for sizes in (first, second))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **options)) if bias else None)
        self.register_buffer("order", torch.arange(gathered, dtype=torch.int32, device=options.get("device")))

    @property
    def is_ordered(self) -> bool:
        """Whether `order` names every place once, as far as its values are there."""
        return self.order.is_meta or torch.equal(self.order.sort().values, torch.arange(len(self.order)).to(self.order))

    @abstractmethod
    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int], int]:
        """Inputs and outputs of `first` and of `second`, and the length of `order`."""

    @staticmethod
    @abstractmethod
    def _written(second: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of `first` and `second`, and `order`, for the product of these factors."""

    @staticmethod
    def numbers(out_features: int, in_features: int, rank: Any) -> Any:
        return rank * (out_features + in_features - rank)

    @staticmethod
    def rank_of(out_features: int, in_features: int, numbers: float) -> float:
        sides = out_features + in_features
        return (sides - max(0.0, sides**2 - 4 * numbers) ** 0.5) / 2

    @classmethod
    def from_factors(cls, second: Tensor, first: Tensor, bias: Tensor | None = None) -> Self:
        """Pivots and coefficients are computed in float64 and rounded once."""
        (out_features, rank), in_features = second.shape, first.shape[1]
        layer = cls(in_features, out_features, rank, bias=bias is not None, device="meta", dtype=second.dtype)
        *weights, order = cls._written(exact(second), exact(first))
        layer.first.weight, layer.second.weight = (_fixed(weight.to(second)) for weight in weights)
        layer.order = order.to(second.device, torch.int32)
        if bias is not None:
            layer.bias = _fixed(bias.detach().clone())
        return layer


class RowPivotedLinear(PivotedLinear):
    """y = [first(x), second(first(x))] in the order of the rows, plus the bias.

    first: the pivots [rank, in_features]; second: the coefficients [out_features - rank, rank]; order [out_features] int32: where
    each row stands in [pivots, others].
    """

    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int], int]:
        return (self.in_features, self.rank), (self.rank, self.out_features - self.rank), self.out_features

    @staticmethod
    def _written(second: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pivots, others, coefficients = pivots_of(second)
        return second[pivots] @ first, coefficients, torch.cat([pivots, others]).argsort()

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        pivots, coefficients = _dense(self.first.weight), _dense(self.second.weight)
        return torch.cat([_identity(self.rank, pivots), coefficients])[self.order], pivots

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        kept = self.first(x)
        y = torch.cat([kept, self.second(kept)], -1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias


class ColumnPivotedLinear(PivotedLinear):
    """y = second(x_pivots + first(x_others)), plus the bias.

    first: the coefficients [rank, in_features - rank]; second: the pivots [out_features, rank]; order [in_features] int32: the
    inputs that meet pivots, then the others.
    """

    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int], int]:
        return (self.in_features - self.rank, self.rank), (self.rank, self.out_features), self.in_features

    @staticmethod
    def _written(second: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pivots, others, coefficients = pivots_of(first.T)
        return coefficients.T, second @ first[:, pivots], torch.cat([pivots, others])

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        pivots, coefficients = _dense(self.second.weight), _dense(self.first.weight)
        return pivots, torch.cat([_identity(self.rank, pivots), coefficients], 1)[:, self.order.argsort()]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        pivots, others = x.index_select(-1, self.order).tensor_split([self.rank], -1)
        y = self.second(pivots + self.first(others))
        return y if self.bias is None else y + self.bias


def pivots_of(B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows p [r] of B [m, r] float64, the others o [m - r], both rising, and the coefficients C [m - r, r] of B[o] = C B[p], none
    of which is above `LARGEST`.

    The rows that LU with row pivoting takes of an orthonormal basis are a start (B may be singular, the basis is not); a row
    whose coefficient is larger than that takes the place of the pivot it belongs to, which multiplies the volume |det basis[p]|
    by it (maxvol, Goreinov et al. 2010).
    """
    rank, basis = B.shape[1], torch.linalg.qr(B).Q
    packed, swaps = torch.linalg.lu_factor(basis)
    rows = list(range(len(B)))
    for i, j in enumerate((swaps - 1).tolist()):
        rows[i], rows[j] = rows[j], rows[i]
    C = torch.linalg.solve_triangular(packed[:rank], packed[rank:], upper=False, left=False, unitriangular=True)
    while C.numel() and C.abs().max() > LARGEST:
        i, j = divmod(int(C.abs().argmax()), rank)
        rows[j], rows[rank + i] = rows[rank + i], rows[j]
        change = C[i] / C[i, j]
        change[j] -= 1 / C[i, j]
        column = C[:, j].clone()
        column[i] = 1
        C[i] = 0
        C[i, j] = 1
        C -= torch.outer(column, change)
    order = torch.tensor(rows, device=B.device)
    pivots, others = order[:rank].sort().values, order[rank:].sort().values
    return pivots, others, torch.linalg.solve(basis[pivots], basis[others], left=False)


FORMS: dict[str, tuple[type[LowRankLinear], type[LowRankLinear]]] = {  # of a matrix with more outputs than inputs, of any other
    PivotedLinear.form: (ColumnPivotedLinear, RowPivotedLinear),
    PairLinear.form: (PairLinear, PairLinear),
}
DEFAULT_FORM = PivotedLinear.form


def layer_class(form: str, out_features: int, in_features: int) -> type[LowRankLinear]:
    """The class of the layers of a form, for a matrix of this shape."""
    return FORMS[form][out_features <= in_features]


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)


def _dense(weight: Tensor) -> Tensor:
    return weight.to_dense() if weight.is_mkldnn else weight  # packed ones multiply inputs only
