"""The MLPs of a model, and what they are with fewer hidden neurons: plain linear layers of smaller shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.errors import is_out_of_memory
from rankwise.layers.linear import bias_of, dense_linear, swapped, weight_of
from rankwise.layers.matrices import Shape

Layout = Literal["rows", "halves", "pairs"]
At = Callable[[str], AbstractContextManager[Callable[[], Tensor]]]
ROUNDING = 1e-3  # of the largest answer: what may lie between two orders of the same sums


@dataclass(frozen=True)
class Mlp:
    """y = down(f(inner(x))) with `width` hidden neurons, none of which hangs on the rows of another.

    inner: the paths of one matrix or two (a gate), each with a row for a neuron; or of one that has two for each, the gate's and
    the other: in two halves, or in pairs.
    """

    inner: tuple[str, ...]
    down: str
    width: int
    layout: Layout = "rows"

    @property
    def matrices(self) -> tuple[str, ...]:
        """The paths of all of them."""
        return (*self.inner, self.down)

    @property
    def parts(self) -> int:
        """In how many the outputs of an inner matrix lie, each a row for every neuron."""
        return 2 if self.layout == "halves" else 1

    def rows(self, kept: Tensor) -> Tensor:
        """The rows of the inner matrices that belong to the neurons `kept` [k]."""
        if self.layout == "halves":
            return torch.cat([kept, self.width + kept])
        return torch.stack([2 * kept, 2 * kept + 1], 1).flatten() if self.layout == "pairs" else kept

    def shape(self, name: str, shape: Shape, size: int) -> Shape:
        """The shape of one of its matrices where so many neurons stay."""
        if name == self.down:
            return shape.narrower(shape.out_features, size)
        return shape.narrower(shape.out_features // self.width * size, shape.in_features)

    def inner_layer(self, model: nn.Module, name: str, kept: Tensor) -> nn.Module:
        """The inner layer of that name with the neurons `kept` [k] alone."""
        linear, rows = model.get_submodule(name), self.rows(kept)
        weight, bias = weight_of(linear), bias_of(linear)
        return dense_linear(weight[rows], None if bias is None else bias[rows], isinstance(linear, Conv1D))

    def last_layer(self, model: nn.Module, weight: Tensor) -> nn.Module:
        """The last layer with the `weight` [m, k] of the neurons that are kept."""
        down = model.get_submodule(self.down)
        return dense_linear(weight.to(weight_of(down)), bias_of(down), isinstance(down, Conv1D))


@torch.no_grad()
def find_mlps(model: nn.Module, matrices: Collection[str], at: At) -> list[Mlp]:
    """The MLPs among the matrices: those whose shapes fit, if what is answered is the same where every other neuron is taken out
    and where the last matrix does not heed it. The first and the last one of each kind are tried.

    at: of a matrix, a context in which it has its weight, with a function that gives an answer which it has a part in.
    """
    kinds: dict[Any, list[Mlp]] = {}
    for mlp in _fitting(model, matrices):
        kinds.setdefault((*(re.sub(r"\d+", "", name) for name in mlp.matrices), mlp.width), []).append(mlp)
    found = []
    for mlps in kinds.values():
        layouts: tuple[Layout, ...] = ("rows",) if mlps[0].layout == "rows" else ("halves", "pairs")
        for layout in layouts:
            of_layout = [replace(mlp, layout=layout) for mlp in mlps]
            if all(_separate(model, mlp, at) for mlp in dict.fromkeys((of_layout[0], of_layout[-1]))):
                found += of_layout
                break
    return found


def _fitting(model: nn.Module, matrices: Collection[str]) -> list[Mlp]:
    """Matrices that stand together, by their shapes: one or two that read what the last one writes, and it what they write."""
    places: dict[str, list[str]] = {}
    for name in matrices:
        places.setdefault(_place(name), []).append(name)
    found = []
    for together in places.values():
        shapes = {name: tuple(weight_of(model.get_submodule(name)).shape) for name in together}
        for number, (down, (out, width)) in enumerate(shapes.items()):
            before = list(shapes.items())[:number]
            inner = tuple(name for name, shape in before if shape == (width, out))
            joined = tuple(name for name, shape in before if shape == (2 * width, out))
            if width > 1 and len(inner) in (1, 2):
                found.append(Mlp(inner, down, width))
            elif width > 1 and len(joined) == 1:
                found.append(Mlp(joined, down, width, "halves"))
    return found


def _place(name: str) -> str:
    """The module that a matrix is part of; of a list of experts' matrices, the expert."""
    above, _, leaf = name.rpartition(".")
    return f"{above.rpartition('.')[0]}#{leaf}" if leaf.isdigit() else above


def _separate(model: nn.Module, mlp: Mlp, at: At) -> bool:
    """Whether neurons of the MLP can be taken out."""
    with at(mlp.down) as answer:
        weight = weight_of(model.get_submodule(mlp.down)).clone()
        weight[:, 1::2] = 0
        others = torch.arange(0, mlp.width, 2, device=weight.device)
        narrow = {name: mlp.inner_layer(model, name, others) for name in mlp.inner}
        narrow[mlp.down] = mlp.last_layer(model, weight[:, ::2])
        with swapped(model, {mlp.down: mlp.last_layer(model, weight)}):
            expected = answer()
        try:
            with swapped(model, narrow):
                found = answer()
        except Exception as error:  # of heads, whose number and size are given, and of norms over neurons
            if is_out_of_memory(error):
                raise
            return False
    return found.shape == expected.shape and bool((found - expected).abs().max() <= ROUNDING * expected.abs().max())
