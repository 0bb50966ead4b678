"""A model whose weights stay on disk: its skeleton, and its tensors, made a few at a time from those in its files
by transformers' own conversions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from rankwise.errors import InMemoryOnlyError, RankwiseError, reason
from rankwise.integration.checkpoint import class_of, left_over_of
from rankwise.integration.weights import Weights
from rankwise.layers.experts import unstack
from rankwise.layers.matrices import unstack_experts
from rankwise.layers.precision import is_finite

Read = Callable[[str], Tensor]


@dataclass(eq=False)
class Part:
    """Tensors of a model that are made together, named after the first.

    converter: transformers' own that makes them; without one it is a single tensor, stored as it is.
    sources: the tensors in the files that they are made of, each with the pattern of the converter that it matches.
    """

    name: str
    converter: WeightConverter | None
    sources: list[tuple[Any, str]] = field(default_factory=list)

    def made(self, model: PreTrainedModel, read: Read) -> dict[str, Tensor]:
        """Name -> tensor, made of what `read` gives for names in the files, in the dtype that the empty `model` has."""
        dtype = model.get_parameter_or_buffer(self.name).dtype
        if self.converter is None:
            return {self.name: read(self.sources[0][1]).to(dtype)}
        converter: Any = copy.deepcopy(self.converter)
        for pattern, stored in self.sources:
            converter.add_tensor(self.name, stored, pattern, read(stored).to(dtype))
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


@dataclass(eq=False)
class Experts:
    """A mixture of experts that is made of `parts`, and taken apart as in memory."""

    path: str
    parts: list[Part]

    def made(self, model: PreTrainedModel, read: Read) -> dict[str, Tensor]:
        """As of `Part`, under the names that the matrices of single experts have."""
        experts = copy.deepcopy(model.get_submodule(self.path))
        for part in self.parts:
            stacks = {name.removeprefix(f"{self.path}."): tensor for name, tensor in part.made(model, read).items()}
            experts.load_state_dict(stacks, strict=False, assign=True)
        unstack(experts)
        return {f"{self.path}.{name}": parameter.data for name, parameter in experts.named_parameters()}


@dataclass(frozen=True)
class Source:
    """Where the weights of an empty model are, whose experts are unstacked.

    skeleton: the model as transformers loads it, empty too. experts: the paths of what was unstacked.
    parameters: name of each parameter -> the empty parameter. parts: the name -> what it is made of.
    tied: name of a parameter that is another's -> the other's name.
    """

    weights: Weights
    skeleton: PreTrainedModel
    experts: list[str]
    parameters: dict[str, nn.Parameter]
    parts: dict[str, Part | Experts]
    tied: dict[str, str]

    @classmethod
    def of(cls, model: PreTrainedModel, skeleton: PreTrainedModel, found: Mapping[str, Part], weights: Weights) -> Source:
        """Unstacks the experts of `model`, a copy of the skeleton. found: name of each tensor -> what it is made of."""
        experts = unstack_experts(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        parts: dict[str, Part | Experts] = {name: part for name, part in found.items() if name in parameters}
        for path in experts:
            stacks = [f"{path}.{name}" for name, _ in skeleton.get_submodule(path).named_parameters()]
            made = Experts(path, list(dict.fromkeys(found[name] for name in stacks)))
            parts |= {f"{path}.{name}": made for name, _ in model.get_submodule(path).named_parameters()}
        name_of = {id(parameter): name for name, parameter in parameters.items() if name in parts}
        tied = {name: name_of[id(parameter)] for name, parameter in parameters.items() if name not in parts}
        parts |= {name: parts[other] for name, other in tied.items()}
        return cls(weights, skeleton, experts, parameters, parts, tied)

    def together(self, names: Iterable[str]) -> list[list[str]]:
        """The names, in groups of those that are made together."""
        groups: dict[Part | Experts, list[str]] = {}
        for name in names:
            groups.setdefault(self.parts[name], []).append(name)
        return list(groups.values())

    def beside(self, name: str) -> list[str]:
        """All names that are made together with this one, itself too."""
        return [other for other, part in self.parts.items() if part is self.parts[name]]

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in by the model, whatever it computes in."""
        part = self.parts[name]
        first = part.parts[0] if isinstance(part, Experts) else part
        return self.skeleton.get_parameter_or_buffer(first.name).dtype

    def values(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Each name and the values of its parameter, in its dtype. Raises `RankwiseError` where they are not finite."""
        for group in self.together(names):
            made = self.parts[group[0]].made(self.skeleton, self.weights.read)
            for name in group:
                tensor = made[self.tied.get(name, name)].to(self.parameters[name].dtype)
                if not is_finite(tensor):
                    raise RankwiseError(f"the model's weight {name} has values that are NaN or infinite")
                yield name, tensor
                del tensor
            del made  # before the next is there


def empty_model(model: str | Path, config: Any, dtype: str) -> tuple[PreTrainedModel, Source]:
    """The model without its weights (on the meta device), but with its buffers; and where its weights are.

    Raises `RankwiseError` where the files are not those of the whole model.
    """
    weights = Weights.of(model)
    skeleton = _skeleton(config, dtype, weights)
    found, left_over = _parts(skeleton, weights)
    missing = _tied_by_the_files(skeleton, found, weights)
    _refuse_partial(model, skeleton, missing, left_over)
    for name, buffer in skeleton.named_buffers():
        if name in found:
            buffer.copy_(found[name].made(skeleton, weights.read)[name])
    runs = copy.deepcopy(skeleton)
    return runs, Source.of(runs, skeleton, found, weights)


def _skeleton(config: Any, dtype: str, weights: Weights) -> PreTrainedModel:
    """The empty model in the dtypes that `from_pretrained` gives it."""
    cls: Any = class_of(config) or AutoModelForCausalLM
    stored = getattr(config, "dtype", None) or weights.dtype()
    target = stored if dtype == "auto" else getattr(torch, dtype)
    build = cls.from_config if cls is AutoModelForCausalLM else cls._from_config
    with init_empty_weights():
        skeleton: PreTrainedModel = build(config, dtype=target).eval()
    if wide := list(skeleton._get_dtype_plan(target)):  # what the class keeps in float32
        pattern = build_glob_alternation(wide)[0]
        for name, tensor in skeleton.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.float() if pattern.search(name) else tensor.data
    return skeleton


def _parts(model: PreTrainedModel, weights: Weights) -> tuple[dict[str, Part], set[str]]:
    """Name of each tensor of the empty model -> what it is made of; and the names, as transformers changes them, of
    tensors that are left over. As `from_pretrained` goes through the files."""
    transforms: list[Any] = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected = model.state_dict()
    parts: dict[str, Part] = {}
    left_over = set()
    for stored in sorted(weights.shapes, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and stored in expected:
            name, pattern = stored, None
        if name in expected:
            converter = of_pattern[pattern] if pattern else None
            parts.setdefault(name, Part(name, converter)).sources.append((pattern, stored))
        else:
            left_over.add(name)
    saving: Any = model
    saving._weight_conversions = [transform for transform in transforms if transform.was_used()]  # what saving undoes
    found = {name: part for part in parts.values() for name in _makes(part, model, expected, weights)}
    return found, left_over


def _makes(part: Part, model: PreTrainedModel, expected: Mapping[str, Tensor], weights: Weights) -> list[str]:
    """The names of the tensors that a part makes; none is read. Raises `RankwiseError` where they are not the model's."""
    stored = part.sources[0][1]
    try:
        made = part.made(model, lambda name: torch.empty(weights.shapes[name], device="meta"))
    except Exception as error:  # a conversion fails in as many ways as there are
        raise RankwiseError(f"{part.name} cannot be made of {stored}: {reason(error)}") from None
    for name, tensor in made.items():
        wanted = expected[name].shape if name in expected else "absent"
        if tensor.shape != wanted:
            raise RankwiseError(f"{stored} has the shape {tuple(tensor.shape)}, the model's {name} is {wanted}")
    return list(made)


def _tied_by_the_files(model: PreTrainedModel, parts: Mapping[str, Part], weights: Weights) -> set[str]:
    """Tie what the config says, but not what has other values in the files; the tensors that are missing then. As
    `from_pretrained` does it."""
    missing = model.state_dict().keys() - parts.keys()
    for name, other in list(model.all_tied_weights_keys.items()):
        if missing.isdisjoint((name, other)):
            own, others = (parts[n].made(model, weights.read)[n] for n in (name, other))
            if torch.equal(own, others):
                missing.add(name)
            else:
                del model.all_tied_weights_keys[name]
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    return missing


def _refuse_partial(path: str | Path, model: PreTrainedModel, missing: set[str], left_over: set[str]) -> None:
    """Raises `RankwiseError` where tensors are missing, or left over and the model's own, which its class does not
    ignore."""
    found: Any = SimpleNamespace(missing_keys=missing, unexpected_keys=left_over)
    model._adjust_missing_and_unexpected_keys(found)
    kinds = {"missing": found.missing_keys, "unexpected": left_over_of(path, model, found.unexpected_keys)}
    for kind, names in kinds.items():
        if names:
            keys = ", ".join(sorted(names)[:3])
            raise RankwiseError(f"{path} is not a whole {type(model).__name__}: {kind} keys: {keys}")
    anew = sorted(missing & dict(model.named_parameters()).keys())
    if anew:
        raise InMemoryOnlyError(f"{type(model).__name__} makes {anew[0]} anew, which its files do not hold")
