"""The compressed model to write, of which no more than a layer is in memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from rankwise.allocation.problem import Allocation
from rankwise.integration.quantizer import RankwiseConfig, attach
from rankwise.integration.weights import Read
from rankwise.layers.linear import bias_of, weight_of
from rankwise.layers.matrices import Shape
from rankwise.masks.layers import factorised, is_whole, weighted
from rankwise.streaming.stream import Stream
from rankwise.streaming.student import StreamedStudent


def factorise(stream: Stream, student: StreamedStudent, chosen: Allocation, form: str) -> Read:
    """Give the empty model, in the dtypes it is stored in, the low-rank layers of the result; returns where the values of its
    tensors come from."""
    model, source = stream.run.model, stream.blocks.source
    given = {name: mask for name, mask in chosen.masks.items() if mask is not None}
    masks = {name: mask for name, mask in given.items() if not is_whole(mask)}
    for name, mask in masks.items():
        dense = model.get_submodule(name)
        options = {"bias": bias_of(dense) is not None, "dtype": weight_of(dense).dtype}
        model.set_submodule(name, Shape.of(dense, form).empty(int(mask.count_nonzero()), **options))
    attach(model, RankwiseConfig(ranks={name: rank for name, rank in chosen.ranks.items() if rank is not None}, form=form))

    @functools.lru_cache(maxsize=1)
    def layer(name: str) -> dict[str, Tensor]:
        dtype = source.parameters[f"{name}.weight"].dtype
        return factorised(student.decompositions[name], masks[name], None, form).to(dtype).state_dict()

    def read(name: str) -> Tensor:
        path = next((path for path in _above(name) if path in masks), None)
        if path is not None:
            tensor = layer(path).get(name.removeprefix(f"{path}."))
            return source.read(f"{path}.bias") if tensor is None else tensor
        matrix = name.removesuffix(".weight")
        if matrix != name and matrix in given:
            turned, own = isinstance(model.get_submodule(matrix), Conv1D), source.read(name)
            new = weighted(own.T if turned else own, student.decompositions[matrix], given[matrix])
            return new.T.contiguous() if turned else new
        return source.read(name)

    return read


def _above(name: str) -> Iterator[str]:
    """The paths of the modules that a tensor is in, the innermost first."""
    while name := name.rpartition(".")[0]:
        yield name
