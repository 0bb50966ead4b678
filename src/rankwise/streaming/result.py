"""The compressed model to write, of which no more than a layer is in memory."""

from __future__ import annotations

import functools

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from rankwise.allocation.problem import Allocation
from rankwise.integration.quantizer import RankwiseConfig, attach
from rankwise.integration.weights import Read
from rankwise.layers.linear import bias_of, weight_of
from rankwise.layers.lowrank import LowRankLinear
from rankwise.masks.layers import factorised, is_whole, weighted
from rankwise.streaming.stream import Stream
from rankwise.streaming.student import StreamedStudent


def factorise(stream: Stream, student: StreamedStudent, chosen: Allocation) -> Read:
    """Give the empty model, in the dtypes it is stored in, the low-rank layers of the result; returns where the values of its
    tensors come from."""
    model, source = stream.run.model, stream.blocks.source
    given = {name: mask for name, mask in chosen.masks.items() if mask is not None}
    masks = {name: mask for name, mask in given.items() if not is_whole(mask)}
    for name, mask in masks.items():
        dense = model.get_submodule(name)
        (m, n), dtype, rank = weight_of(dense).shape, weight_of(dense).dtype, int(mask.count_nonzero())
        model.set_submodule(name, LowRankLinear(n, m, rank, bias_of(dense) is not None, device="meta", dtype=dtype))
    attach(model, RankwiseConfig(ranks={name: rank for name, rank in chosen.ranks.items() if rank is not None}))

    @functools.lru_cache(maxsize=1)
    def layer(name: str) -> dict[str, Tensor]:
        dtype = source.parameters[f"{name}.weight"].dtype
        return factorised(student.decompositions[name], masks[name], None).to(dtype).state_dict()

    def read(name: str) -> Tensor:
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        if path in masks and leaf in ("first", "second"):
            return layer(path)[f"{leaf}.weight"]
        if path.removesuffix(".second") in masks:
            return source.read(path.removesuffix(".second") + ".bias")
        matrix = name.removesuffix(".weight")
        if matrix != name and matrix in given:
            turned, own = isinstance(model.get_submodule(matrix), Conv1D), source.read(name)
            new = weighted(own.T if turned else own, student.decompositions[matrix], given[matrix])
            return new.T.contiguous() if turned else new
        return source.read(name)

    return read
