"""The compressed model to write, of which no more than a block is in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from rankwise.allocation.problem import Allocation
from rankwise.integration.quantizer import RankwiseConfig, RankwiseQuantizer, attach
from rankwise.layers.linear import swapped
from rankwise.layers.matrices import stack_experts, unstack_experts
from rankwise.streaming.stream import Stream
from rankwise.streaming.student import StreamedStudent

Values = Callable[[int | None], dict[str, Tensor]]


def factorise(stream: Stream, student: StreamedStudent, chosen: Allocation, form: str) -> tuple[PreTrainedModel, Values]:
    """The compressed model, empty, in the dtypes it is stored in; and what makes the values of one of its blocks, or (None) of
    what is outside of them. Experts that are all left dense are stacked."""
    model, blocks = stream.run.model, stream.blocks
    ranks = {name: rank for name, rank in chosen.ranks.items() if rank is not None}
    sizes = stream.run.sizes
    experts = [path for path in stream.run.experts if any(name.startswith(f"{path}.") for name in (*ranks, *sizes))]
    config = RankwiseConfig(ranks=ranks, form=form, sizes=sizes, experts=experts)
    empty = copy.deepcopy(blocks.source.skeleton)
    RankwiseQuantizer(config)._process_model_before_weight_loading(empty)
    attach(empty, config)

    def values(index: int | None) -> dict[str, Tensor]:
        if index is None:
            return dict(blocks.source.values(name for names in blocks.outside().values() for name in names))
        block = f"{blocks.path}.{index}"
        dense = [path for path in stream.run.experts if path.startswith(f"{block}.") and path not in experts]
        with blocks.loaded(blocks.names(index)), swapped(model, student.low_rank(index, chosen.masks, form)):
            stack_experts(model, dense)
            tensors = model.get_submodule(block).state_dict(prefix=f"{block}.")
            unstack_experts(model.get_submodule(block))
        return tensors

    return empty, values
