"""How large the original and the compressed model are, under both scopes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rankwise.allocation.plan import Shapes
from rankwise.layers.linear import bias_of, weight_of
from rankwise.layers.tables import table_bytes
from rankwise.schema import Sizes


@dataclass(frozen=True)
class Size:
    """Parameters and bytes of the original and the compressed model.

    scope "linear" counts the weight matrices that might be compressed, "model" every parameter, tied ones once.
    """

    parameters: dict[str, dict[str, int]]
    bytes: dict[str, dict[str, int]]

    @classmethod
    def of(cls, model: Any, shapes: Shapes, ranks: Mapping[str, int | None], bits: Mapping[str, int] | None = None) -> Size:
        """Of the dense `model`, its experts unstacked, and of what `ranks` and `bits` make of its matrices, which may be smaller,
        of `shapes`."""
        weights = {name: weight_of(model.get_submodule(name)) for name in ranks}
        biases = {name: bias_of(model.get_submodule(name)) for name in ranks}
        gone = {name: len(bias) - shapes[name].out_features for name, bias in biases.items() if bias is not None}
        before = {name: weight.numel() for name, weight in weights.items()}
        after = {name: shapes[name].parameters(rank) for name, rank in ranks.items()}
        saved = {name: before[name] - after[name] for name in ranks}
        held = {
            name: shapes[name].stored_bytes(rank, (bits or {}).get(name), weights[name].dtype) for name, rank in ranks.items()
        }
        bytes_saved = sum(weights[name].nbytes - held[name] for name in ranks)
        bias_bytes = sum(number * weights[name].element_size() for name, number in gone.items())
        of_tables = table_bytes({name: model.get_submodule(name) for name in (bits or {}).keys() - ranks.keys()})
        model_bytes = sum(p.nbytes for p in model.parameters())
        return cls(
            parameters={
                "linear": _both(sum(before.values()), sum(saved.values())),
                "model": _both(model.num_parameters(), sum(saved.values()) + sum(gone.values())),
            },
            bytes={
                "linear": _both(sum(w.nbytes for w in weights.values()), bytes_saved),
                "model": _both(model_bytes, bytes_saved + bias_bytes + of_tables[0] - of_tables[1]),
            },
        )

    def achieved(self, scope: str) -> float:
        """The rate in `scope`: the fraction of parameters removed."""
        counts = self.parameters[scope]
        return 1 - counts["compressed"] / counts["reference"]

    def to_dict(self) -> Sizes:
        """For JSON: parameters and bytes by scope, and the rates achieved."""
        rates = {scope: self.achieved(scope) for scope in self.parameters}
        return {"parameters": self.parameters, "bytes": self.bytes, "achieved_rate": rates}


def held_bytes(model: nn.Module) -> int:
    """Bytes of the weights as they are held: of a quantized weight (torchao's, a tensor made of tensors) its integers, scales
    and zero points, where `nbytes` still tells those of the floats it stands for. Tied weights count once."""
    return sum(_held(weight) for weight in model.parameters())


def _held(tensor: Tensor) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    parts, _ = tensor.__tensor_flatten__()
    return sum(_held(getattr(tensor, part)) for part in parts)


def _both(reference: int, saved: int) -> dict[str, int]:
    return {"reference": reference, "compressed": reference - saved}
