"""Narrower MLPs of a model whose blocks are loaded in turn: what `rankwise.narrowing` asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from rankwise import distributed
from rankwise.calibration.moments import Collected
from rankwise.decomposition.solver import Decomposition
from rankwise.layers.linear import empty_like, weight_of
from rankwise.masks.student import Layers, Student
from rankwise.progress import progress
from rankwise.stages import kept_in
from rankwise.starting import Run
from rankwise.streaming.blocks import Narrower
from rankwise.streaming.decomposition import decompose_one, stored_in
from rankwise.streaming.stream import Stream
from rankwise.streaming.student import StreamedStudent


@dataclass(frozen=True)
class OnDisk:
    """A `Place` of blocks that are on disk."""

    stream: Stream

    @contextmanager
    def at(self, name: str) -> Iterator[Callable[[], Tensor]]:
        """As of `Place`; the answer is what the block adds to the embeddings."""
        stream, blocks = self.stream, self.stream.blocks
        index = blocks.block_of(name)
        assert index is not None
        probe = {key: tensor[:1] for key, tensor in stream.run.data.training[0].items()}
        with stream.opened():
            hidden = stream.entered("probe", [probe])
            with blocks.loaded(blocks.names(index)):
                yield lambda: blocks.run(index, hidden[0], blocks.call_of(index, probe)).cpu() - hidden[0]
            hidden.clear()

    def put(self, name: str, layer: nn.Module, key: str) -> nn.Module:
        """As of `Place`; its values go to the run folder, in the dtype that the original's are stored in."""
        stream = self.stream
        original, dtype = stream.run.model.get_submodule(name), stream.blocks.source.dtype_of(f"{name}.weight")
        stage = f"narrower/{name}"
        stream.run.folder.together(stage, key, lambda: {leaf: value.to(dtype) for leaf, value in layer.state_dict().items()})
        narrower = empty_like(original, *weight_of(layer).shape)
        stream.blocks.narrower[name] = Narrower(narrower, original, stream.run.folder.file(stage, key))
        stream.run.model.set_submodule(name, narrower)
        return original

    def student(self, run: Run, student: Student, statistics: Collected, metric: str, originals: Layers) -> Student:
        """As of `Place`."""
        stream = replace(self.stream, run=run)
        for name in progress(distributed.dealt(list(originals)), "decomposing"):
            with stream.blocks.loaded([f"{name}.weight"]):
                decompose_one(run, metric, name, statistics.of(name))
        distributed.wait()
        assert isinstance(student, StreamedStudent)
        again: Mapping[str, Decomposition] = stored_in(run, metric, originals)  # type: ignore[assignment]  # the same tensors
        decompositions = {**student.decompositions, **again}
        kept = kept_in(run, metric)
        return replace(student, stream=stream, decompositions=decompositions, kept=kept, originals=originals, _read={})
