"""How transformers loads and saves a compressed model. Importing this module is the registration.

A compressed folder also holds, under the dense name of each replaced weight, a guard: a tensor without elements whose shape
is wrong. Where rankwise was imported it is ignored; elsewhere transformers stops at it with an error, where it would
otherwise warn and run with random weights.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankwise.errors import RankwiseError
from rankwise.integration.names import spares
from rankwise.layers.experts import is_stacked, stacked_shapes, unstack
from rankwise.layers.linear import bias_of, empty_like, is_linear, weight_of
from rankwise.layers.lowrank import DEFAULT_FORM, FORMS, PairLinear, PivotedLinear
from rankwise.layers.matrices import Shape
from rankwise.layers.quantised import BYTE, CODING, GROUP, WIDTHS, Coding, QuantisedEmbedding, on_trellis

METHOD = "rankwise"
FORMAT_VERSION = 6
FLAGS = ("affine", "own_names")
FIRST_KEYS = {"ranks", "experts", "affine", "format_version", "quant_method"}
SECOND_KEYS = FIRST_KEYS | {"form", "own_names"}
THIRD_KEYS = SECOND_KEYS | {"bits"}
FOURTH_KEYS = THIRD_KEYS | {"sizes"}
FIFTH_KEYS = FOURTH_KEYS | {"group"}
KEYS = dict(
    enumerate((FIRST_KEYS, SECOND_KEYS, THIRD_KEYS, FOURTH_KEYS, FIFTH_KEYS, FIFTH_KEYS | {"coding"}), 1)
)  # of each format


@dataclass
class RankwiseConfig(QuantizationConfigMixin):
    """This is the `quantization_config` of a compressed model.

    ranks: path of each factorised linear layer -> its rank. form: of all of them, one of `FORMS`.
    bits: path of each linear layer that is held in few bits, or whose factors are -> how many, one of `WIDTHS`.
    coding: how numbers of fewer than 8 bits are read.
    sizes: path of each linear layer that is smaller than the model's own -> its out_features, its in_features, and in how many
        parts its outputs lie, of each of which the first ones are there.
    experts: paths of the mixtures of experts whose stacked parameters were taken apart.
    affine: whether every low-rank layer has a bias, which keeps the mean of what was dropped.
    own_names: whether the weights are stored under the model's own names, where transformers has others for a dense model.
    rate: what to remove of a folder that `rankwise decompose` wrote, as it is loaded: the fraction of its matrices' parameters.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    form: str = DEFAULT_FORM
    bits: dict[str, int] = field(default_factory=dict)
    coding: Coding = CODING
    sizes: dict[str, list[int]] = field(default_factory=dict)
    experts: list[str] = field(default_factory=list)
    affine: bool = False
    own_names: bool = False
    rate: float | None = None
    format_version: int = FORMAT_VERSION
    quant_method: str = METHOD  # type: ignore[assignment]  # their enumeration is open to any name

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Raises ValueError for a folder written by a later rankwise, or by nobody."""
        version = config_dict.get("format_version")
        if type(version) is not int or version not in KEYS:
            raise ValueError(
                f"this folder has rankwise format {version!r}, this rankwise reads {', '.join(map(str, KEYS))}: upgrade with pip"
            )
        unknown = set(config_dict) - KEYS[version]
        if unknown:
            raise ValueError(f"unknown keys in quantization_config: {', '.join(sorted(unknown))}")
        ranks, experts = config_dict.get("ranks"), config_dict.get("experts", [])
        if not isinstance(ranks, dict) or not all(type(rank) is int and rank > 0 for rank in ranks.values()):
            raise ValueError("in quantization_config, ranks is not an object of matrices and their ranks, positive numbers")
        bits = config_dict.get("bits", {})
        if not isinstance(bits, dict) or not all(type(width) is int and width in WIDTHS for width in bits.values()):
            widths = ", ".join(map(str, WIDTHS))
            raise ValueError(
                f"in quantization_config, bits is not an object of matrices and their bits, of {widths}: upgrade with pip"
            )
        coding = _coding_of(config_dict)
        sizes = config_dict.get("sizes", {})
        if not isinstance(sizes, dict) or not all(_is_size(size) for size in sizes.values()):
            raise ValueError("in quantization_config, sizes is not an object of matrices, each with three positive numbers")
        if config_dict.get("form", PairLinear.form) not in FORMS:
            raise ValueError(
                f"in quantization_config, form is {config_dict['form']!r}, none of {', '.join(FORMS)}: upgrade with pip"
            )
        if not isinstance(experts, list) or not all(isinstance(path, str) for path in experts):
            raise ValueError("in quantization_config, experts is not a list of paths")
        for flag in FLAGS:
            if not isinstance(config_dict.get(flag, False), bool):
                raise ValueError(f"in quantization_config, {flag} is neither true nor false")
        told = {"form": PairLinear.form} | {name: value for name, value in config_dict.items() if name != "group"}
        config = cls(**told | {"coding": coding, "format_version": FORMAT_VERSION})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: what the weights are, not how they came about; in the first format that knows it all."""
        held = {name: value for name, value in super().to_dict().items() if name != "rate"}
        trellis = any(on_trellis(width, self.coding) for width in self.bits.values())
        grouped = self.coding != "floats" and any(width < BYTE for width in self.bits.values())
        facts = (("coding", trellis, 5), ("group", grouped, 4), ("sizes", self.sizes, 3), ("bits", self.bits, 2))
        held["group"] = GROUP
        for name, told, format_before in facts:
            if told:
                break
            del held[name]
            held["format_version"] = format_before
        return held

    @property
    def written(self) -> list[str]:
        """Paths of the linear layers that are no longer dense floats."""
        return list(dict.fromkeys((*self.ranks, *self.bits)))

    @property
    def changed(self) -> list[str]:
        """Those, and the paths of smaller ones."""
        return list(dict.fromkeys((*self.written, *self.sizes)))


class RankwiseQuantizer(HfQuantizer):
    """Puts low-rank layers into the empty model before its weights are read, and guards beside them when it is saved."""

    quantization_config: RankwiseConfig

    @property
    def requires_calibration(self) -> bool:  # type: ignore[override]  # theirs is an attribute
        """A dense model is not compressed by loading it with our config, unless its decomposition lies beside it."""
        return self.quantization_config.rate is None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        self.files = kwargs.get("checkpoint_files") or []
        config.experts = [path for expert in config.experts if (path := _path_in(model, expert)) is not None]
        for path in config.experts:
            module = model.get_submodule(path)
            if not is_stacked(module):
                raise ValueError(f"the folder names {path!r} as a mixture of experts, which is a {type(module).__name__}")
            unstack(module)
            _initialised(model.get_submodule(path.rpartition(".")[0]), *module.modules())  # some blocks fill their experts
        if config.bits and config.coding == "floats" and any(name.endswith(".unit") for name in _tensors_in(self.files)):
            raise ValueError("the folder's scales have units, of which its config.json, of an earlier format, knows nothing")
        of_the_folder = config.changed
        for of_each in (config.ranks, config.bits, config.sizes):
            _rename(model, of_each)
        if of_the_folder and not config.changed:
            raise ValueError(f"a {type(model).__name__} has none of the matrices that the folder is made of")
        for path, (*sides, _) in config.sizes.items():
            linear = model.get_submodule(path)
            if not is_linear(linear) or any(small > side for small, side in zip(sides, weight_of(linear).shape, strict=True)):
                raise ValueError(f"the folder has the sides {sides} for {path!r}, which is {linear}")
            _put(model, path, empty_like(linear, *sides))
        for path in config.written:
            linear, rank = model.get_submodule(path), config.ranks.get(path)
            if type(linear) is nn.Embedding and rank is None:
                _put(model, path, QuantisedEmbedding(linear.num_embeddings, linear.embedding_dim, "meta", linear.weight.dtype))
                continue
            if not is_linear(linear):
                raise ValueError(f"the folder has a rank for {path!r}, which is a {type(linear).__name__}, no linear layer")
            shape = Shape.of(linear, config.form)
            if rank is not None and rank > shape.full_rank:
                raise ValueError(
                    f"the folder has rank {rank:,} for {path!r}, which is {shape.out_features} x {shape.in_features}"
                )
            bias = bias_of(linear) is not None or (config.affine and rank is not None)
            layer = shape.empty(rank, config.bits.get(path), config.coding, bias=bias, dtype=weight_of(linear).dtype)
            _put(model, path, layer)
        found_by_tying = {f"^{re.escape(name)}$" for name in tied_tables(model, config)}
        model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *found_by_tying}
        ignored = model._keys_to_ignore_on_load_unexpected
        base = f"{model.base_model_prefix}."
        names = (name.removeprefix(base) for name in guards(model, config))
        expected = (f"^({re.escape(base)})?{re.escape(name)}$" for name in names)
        model._keys_to_ignore_on_load_unexpected = {*(ignored or ()), *expected}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        tied = tied_tables(model, self.quantization_config)
        tie_tables(model, tied)
        for path in self.quantization_config.changed:
            layer = model.get_submodule(path)
            for name, parameter in (*layer.named_parameters(), *layer.named_buffers()):
                absent = f"{path}.{name}" not in tied and not getattr(
                    parameter, "_is_hf_initialized", False
                )  # transformers warns, and goes on with random values
                if absent and not parameter.is_meta:  # what is offloaded is still on its way
                    raise ValueError(f"the folder's weights lack {path}.{name}, or it has another shape there")
            if isinstance(layer, PivotedLinear) and not layer.is_ordered:
                raise ValueError(f"{path}.order in the folder's weights is no order: a place is missing")
        if self.quantization_config.rate is not None:
            self._compress(model, self.quantization_config.rate, self.quantization_config.form)
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                del module.config._is_quantized  # some models would read their layers' weights another way
        model.is_quantized = False  # the factors are ordinary floats: `half()`, Trainer and the like need refuse nothing
        return model

    def _compress(self, model: nn.Module, rate: float, form: str) -> None:
        from rankwise.integration.artifact import Artifact

        artifact = Artifact.at(Path(self.files[0]).parent if self.files else None)
        if artifact is None:
            raise ValueError("rate= is for a local folder that `rankwise decompose` wrote; compress other models first")
        attach(model, artifact.apply(model, rate, form))  # from here on it is a compressed model like any other

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """What transformers does with the names and tensors in the files: nothing, where they are the model's own."""
        return [] if self.quantization_config.own_names else weight_conversions

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The model's tensors and the guards. Raises `RankwiseError` where weights were quantized: the format holds floats."""
        for name, weight in model.named_parameters():
            if hasattr(weight, "__tensor_flatten__") and not isinstance(weight, DTensor):
                raise RankwiseError(
                    f"{name} is a {type(weight).__name__}, quantized after loading, which a rankwise folder cannot hold: "
                    "keep the folder it was loaded from and quantize again after loading it"
                )
        return {**model.state_dict(), **guards(model, self.quantization_config)}, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from rankwise.integration.densify import densify_in_place

        return densify_in_place(model, self.quantization_config)

    def is_serializable(self) -> bool:
        """Compressed models are saved like any other."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are plain linear layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Nothing but matrix products."""
        return True


def guards(model: nn.Module, config: RankwiseConfig) -> dict[str, Tensor]:
    """Dense name of each parameter that compression replaced -> its guard: the parameter's shape, its last axis empty."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in config.experts:
        shapes |= {f"{path}.{name}": shape for name, shape in stacked_shapes(model.get_submodule(path)).items()}
    for path in config.written:
        if not path.startswith(tuple(f"{expert}." for expert in config.experts)):
            layer: Any = model.get_submodule(path)
            rows = layer.num_embeddings if isinstance(layer, QuantisedEmbedding) else layer.out_features
            shapes[f"{path}.weight"] = (rows, 0)
    return {name: torch.empty(*shape[:-1], 0) for name, shape in shapes.items()}


def _tensors_in(files: Iterable[str]) -> Iterator[str]:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            yield from opened.keys()


def _put(model: Any, path: str, layer: nn.Module) -> None:
    """Put an empty layer in the place of the one at `path`."""
    _initialised(*layer.modules())
    model.set_submodule(path, layer)
    model.all_tied_weights_keys.pop(f"{path}.weight", None)  # by the config, though not by the files


def _coding_of(config: dict[str, Any]) -> Coding:
    """How a folder's few bits are read. Raises ValueError where this rankwise does not know."""
    group, coding = config.get("group", GROUP), config.get("coding", "grid")
    if type(group) is not int or group != GROUP:
        raise ValueError(f"in quantization_config, group is {group!r}, not {GROUP}: upgrade with pip")
    if coding not in ("grid", "trellis"):
        raise ValueError(f"in quantization_config, coding is {coding!r}, neither 'grid' nor 'trellis': upgrade with pip")
    return coding if "group" in config else "floats"


def tied_tables(model: Any, config: RankwiseConfig) -> dict[str, str]:
    """Tensor of a table in few bits -> that of the table which it is tied to, as the dense ones share their weight."""
    ties = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    own = type(model)._tied_weights_keys if ties else None
    paths = {target.removesuffix(".weight"): source.removesuffix(".weight") for target, source in (own or {}).items()}
    both = {target: source for target, source in paths.items() if {target, source} <= config.bits.keys()}
    return {f"{target}.{name}": f"{source}.{name}" for target, source in both.items() for name in ("codes", "scales")}


def tie_tables(model: Any, tied: dict[str, str]) -> None:
    """Have tables share their tensors, and transformers know it where it saves them."""
    for target, source in tied.items():
        path, _, name = target.rpartition(".")
        setattr(model.get_submodule(path), name, model.get_buffer(source))
    if tied:
        model._tied_weights_keys = tied


def attach(model: Any, config: RankwiseConfig) -> None:
    """Make a model that was factorised in memory what it will be once saved and loaded."""
    made: dict[str, Tensor] = guards(model, config)
    for path in (*config.changed, *config.experts):
        made |= model.get_submodule(path).state_dict(prefix=f"{path}.")
    config.own_names = not spares(model, {name: tensor.to("meta") for name, tensor in made.items()})
    if config.own_names:
        model._weight_conversions = []
    tie_tables(model, tied_tables(model, config))
    model.config.quantization_config = config
    model.hf_quantizer = RankwiseQuantizer(config)
    model.is_quantized = False
    model.quantization_method = METHOD


def _is_size(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 3 and all(type(side) is int and side > 0 for side in size)


def _initialised(*modules: nn.Module) -> None:
    """Keep transformers from initialising what is read anyway: it goes by names, and looks for what is no longer there."""
    for module in modules:
        vars(module)["_is_hf_initialized"] = True


def _rename(model: Any, of_each: dict[str, Any]) -> None:
    """Put what the folder says of each matrix under its path in the model, and leave out what the model does not have."""
    found = {path: value for matrix, value in of_each.items() if (path := _path_in(model, matrix)) is not None}
    of_each.clear()
    of_each.update(found)


def _path_in(model: Any, path: str) -> str | None:
    """Where in the model a module of the folder is: one of them may have a head, and the other not.

    None for a module that the class does not have. Raises ValueError where the folder is of that class.
    """
    base = f"{model.base_model_prefix}."
    for place in (path, path.removeprefix(base), base + path):
        with contextlib.suppress(AttributeError):
            model.get_submodule(place)
            return place
    if type(model).__name__ in (model.config.architectures or [type(model).__name__]):
        raise ValueError(f"the folder has a rank for {path!r}, which {type(model).__name__} does not have")
    return None


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(RankwiseConfig)
    register_quantizer(METHOD)(RankwiseQuantizer)
