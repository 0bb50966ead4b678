"""Which weight matrices of a model may be compressed, and why the others are left dense."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from rankwise.errors import RankwiseError
from rankwise.layers import experts
from rankwise.layers.linear import bias_of, is_linear, weight_of
from rankwise.layers.lowrank import DEFAULT_FORM, LowRankLinear, layer_class


@dataclass(frozen=True)
class Shape:
    """Shape of a weight matrix W [out_features, in_features] and the arithmetic of its parameters in a form of low rank.

    added: parameters that a low-rank layer has beside its factors: the bias of affine ones, where the matrix had none.
    form: one of `FORMS`.
    """

    out_features: int
    in_features: int
    added: int = 0
    form: str = DEFAULT_FORM

    @classmethod
    def of(cls, module: nn.Module, form: str = DEFAULT_FORM, affine: bool = False) -> Shape:
        """The shape of a linear module's matrix."""
        out_features, in_features = weight_of(module).shape
        return cls(out_features, in_features, out_features if affine and bias_of(module) is None else 0, form)

    @property
    def dense(self) -> int:
        """Parameters of the dense matrix."""
        return self.out_features * self.in_features

    @property
    def per_rank(self) -> int:
        """Parameters of the first unit of rank, a column of B and a row of A; no later one has more."""
        return self.out_features + self.in_features

    @property
    def full_rank(self) -> int:
        """Number of singular components."""
        return min(self.out_features, self.in_features)

    @property
    def break_even(self) -> float:
        """The rank from which on dense is smaller."""
        return self.rank_of(self.dense)

    def empty(self, rank: int, **options: Any) -> LowRankLinear:
        """A layer at `rank` without values, on the meta device; options as of `nn.Linear`."""
        return self.layer_class(self.in_features, self.out_features, rank, device="meta", **options)

    @property
    def layer_class(self) -> Any:
        """The class of its layers."""
        return layer_class(self.form, self.out_features, self.in_features)

    @property
    def index_bytes(self) -> int:
        """Bytes of a low-rank layer that are no parameters: where its rows stand."""
        return sum(buffer.nbytes for buffer in self.empty(1).buffers())

    def largest_rank(self, multiple: int = 1) -> int:
        """The largest multiple of `multiple` below the break-even rank."""
        return self.rank_within(self.dense - 1) // multiple * multiple

    def rank_within(self, parameters: int) -> int:
        """The largest rank of at most that many parameters."""
        rank = round(self.rank_of(parameters))
        return rank if self.parameters(rank) <= parameters else max(rank - 1, 0)

    def rank_of(self, parameters: float) -> float:
        """The rank, seldom whole, of that many parameters."""
        return self.layer_class.rank_of(self.out_features, self.in_features, max(parameters - self.added, 0))

    def parameters(self, rank: int | None) -> int:
        """Parameters at `rank`; None is dense."""
        return self.dense if rank is None else int(self.numbers(rank)) + self.added

    def numbers(self, rank: Any) -> Any:
        """Parameters of the factors at `rank`, an integer or a tensor."""
        return self.layer_class.numbers(self.out_features, self.in_features, rank)


def matches(name: str, module: nn.Module, pattern: str) -> bool:
    """Whether `pattern` names the module: `re:` and a regular expression matched from the path's start, a glob over the
    path, or the name of a class."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern) or type(module).__name__ == pattern


def unstack_experts(model: nn.Module) -> list[str]:
    """Unstack every mixture of experts in `model`, in place; the paths of the modules that were stacked."""
    names = [name for name, module in model.named_modules() if experts.is_stacked(module)]
    for name in names:
        experts.unstack(model.get_submodule(name))
    return names


def stack_experts(model: nn.Module, paths: Iterable[str]) -> None:
    """Undo `unstack_experts`, in place."""
    for path in paths:
        experts.restack(model.get_submodule(path))


@contextmanager
def stacked_on_failure(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Whatever fails or is interrupted inside leaves the experts at these paths stacked, as they were found."""
    try:
        yield
    except BaseException:
        stack_experts(model, paths)
        raise


def find_matrices(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    multiple: int = 1,
    form: str = DEFAULT_FORM,
) -> tuple[dict[str, Shape], dict[str, str]]:
    """The matrices that may be compressed (path -> shape), and those left dense (path -> reason), stacks of matrices too.

    The output head is left dense unless `include` names it. Raises `RankwiseError` for a pattern that matches nothing
    and where nothing is left to compress.
    """
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    for pattern in (*include, *exclude):
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise RankwiseError(f"the pattern {pattern!r} is no regular expression: {error}") from None
        if not any(matches(name, module, pattern) for name, module in linear.items()):
            raise RankwiseError(f"the pattern {pattern!r} matches none of the model's {len(linear)} linear layers")
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()

    matrices: dict[str, Shape] = {}
    dense: dict[str, str] = {}
    for name, module in linear.items():
        shape = Shape.of(module, form)
        included = any(matches(name, module, p) for p in include)
        if uses[id(module.weight)] > 1:
            dense[name] = "its weight is tied to another module's"
        elif any(matches(name, module, p) for p in exclude) or (include and not included):
            dense[name] = "excluded"
        elif module is head and not included:
            dense[name] = "the output head (name it in include to compress it)"
        elif shape.largest_rank(multiple) < multiple:
            dense[name] = f"too small: {shape.out_features} x {shape.in_features}"
        else:
            matrices[name] = shape
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if parameter.ndim > 2 and not isinstance(module, nn.modules.conv._ConvNd):
            dense[name] = f"stacked matrices in a {type(module).__name__}, which rankwise does not know"
    if not matrices:
        reasons = sorted(dense.items(), key=lambda item: item[1] == "excluded")  # what the user named comes first
        raise RankwiseError(
            f"the model has no matrix to compress: of its {len(linear)} linear layers all are left dense"
            + "".join(f"; {n}: {why}" for n, why in reasons[:3])
        )
    return matrices, dense
