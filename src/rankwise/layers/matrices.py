"""Which weight matrices of a model may be compressed, and why the others are left dense."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rankwise.errors import RankwiseError
from rankwise.layers import experts
from rankwise.layers.linear import bias_of, holds_matrix, is_linear, weight_of
from rankwise.layers.lowrank import DEFAULT_FORM, layer_class
from rankwise.layers.quantised import CODING, Coding, QuantisedLinear, in_bits


@functools.cache
def _held(shape: Shape, rank: int | None, bits: int | None, dtype: torch.dtype) -> int:
    return sum(tensor.nbytes for tensor in shape.empty(rank, bits, dtype=dtype).state_dict().values())


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

    def narrower(self, out_features: int, in_features: int) -> Shape:
        """The shape of the matrix with fewer rows or columns."""
        return replace(self, out_features=out_features, in_features=in_features)

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

    def empty(self, rank: int | None, bits: int | None = None, coding: Coding = CODING, **options: Any) -> Any:
        """A layer at `rank`, None for dense, without values, on the meta device; with `bits` of few bits. Options
        are those of `nn.Linear`."""
        sides = self.in_features, self.out_features
        if rank is not None:
            layer = self.layer_class(*sides, rank, device="meta", **options)
            if bits is not None:
                in_bits(layer, lambda linear: QuantisedLinear.like(linear, bits, coding))
            return layer
        options = {"bias": False} | options
        return (
            nn.Linear(*sides, device="meta", **options)
            if bits is None
            else QuantisedLinear(*sides, bits, coding=coding, device="meta", **options)
        )

    def stored_bytes(self, rank: int | None, bits: int | None, dtype: torch.dtype) -> int:
        """Bytes of the tensors of a layer at `rank`, with `bits` of few bits, floats in `dtype`, without a bias that the
        matrix has anyway."""
        return _held(self, rank, bits, dtype) + (rank is not None) * self.added * dtype.itemsize

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
    done: list[str] = []
    with stacked_on_failure(model, done):
        for name in [n for n, module in model.named_modules() if experts.is_stacked(module)]:
            experts.unstack(model.get_submodule(name))
            done.append(name)
    return done


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
    """The matrices that may be compressed (path -> shape), and those left dense (path -> reason), matrices of no linear
    layer too.

    The output head and routers are left dense unless `include` names them. Raises `RankwiseError` for a pattern that
    matches nothing and where nothing is left to compress.
    """
    linear = {name: module for name, module in model.named_modules() if holds_matrix(module)}
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
        if not is_linear(module):
            dense[name] = f"a {type(module).__name__}, whose forward is its own"
        elif uses[id(module.weight)] > 1:
            dense[name] = "its weight is tied to another module's"
        elif any(matches(name, module, p) for p in exclude) or (include and not included):
            dense[name] = "excluded"
        elif module is head and not included:
            dense[name] = "the output head (name it in include to compress it)"
        elif _routes(model, name) and not included:
            dense[name] = "a router (name it in include to compress it)"
        elif shape.largest_rank(multiple) < multiple:
            dense[name] = f"too small: {shape.out_features} x {shape.in_features}"
        else:
            matrices[name] = shape
    dense |= _of_no_linear_layer(model)
    if not matrices:
        reasons = sorted(dense.items(), key=lambda item: item[1] == "excluded")  # what the user named comes first
        raise RankwiseError(
            f"the model has no matrix to compress: all of its {len(linear)} linear layers are left dense"
            + "".join(f"; {n}: {why}" for n, why in reasons[:3])
        )
    return matrices, dense


# how the names of parameters end that no activation is multiplied with
TABLES = re.compile(r"(embed|position|pos_emb|norm|bias)[^.]*(\.(weight|scale))?$")


def _of_no_linear_layer(model: nn.Module) -> dict[str, str]:
    """Path -> why it is left dense, of every parameter that holds matrices outside of linear layers.

    What has an axis of one holds none.
    """
    found = {}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        other = holds_matrix(module) or isinstance(module, nn.Embedding | nn.modules.conv._ConvNd)
        if parameter.ndim > 1 and 1 not in parameter.shape and not other and not TABLES.search(name):
            what = "a matrix of a" if parameter.ndim == 2 else "stacked matrices in a"
            found[name] = f"{what} {type(module).__name__}, which rankwise does not know"
    return found


def _routes(model: nn.Module, name: str) -> bool:
    """Whether a linear layer chooses experts: it is, or is in, a router, or a gate beside experts."""
    while name:
        above, _, leaf = name.rpartition(".")
        if leaf == "router" or (leaf == "gate" and hasattr(model.get_submodule(above), "experts")):
            return True
        name = above
    return False
