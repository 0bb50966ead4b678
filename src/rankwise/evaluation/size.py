"""How large the original and the compressed model are, under both scopes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rankwise.layers.matrices import Shape


@dataclass(frozen=True)
class Size:
    """Parameters and bytes of the original and the compressed model.

    scope "linear" counts the weight matrices that might be compressed, "model" every parameter, tied ones once.
    """

    parameters: dict[str, dict[str, int]]
    bytes: dict[str, dict[str, int]]

    @classmethod
    def of(
        cls,
        shapes: Mapping[str, Shape],
        ranks: Mapping[str, int | None],
        model_parameters: int,
        model_bytes: int,
        element_bytes: int,
    ) -> Size:
        """model_parameters, model_bytes: of the original; element_bytes: of one entry of its weight matrices."""
        before = sum(shape.dense for shape in shapes.values())
        after = sum(shapes[name].parameters(rank) for name, rank in ranks.items())
        saved = before - after
        return cls(
            parameters={
                "linear": {"reference": before, "compressed": after},
                "model": {"reference": model_parameters, "compressed": model_parameters - saved},
            },
            bytes={
                "linear": {"reference": before * element_bytes, "compressed": after * element_bytes},
                "model": {"reference": model_bytes, "compressed": model_bytes - saved * element_bytes},
            },
        )

    def achieved(self, scope: str) -> float:
        """The rate in `scope`: the fraction of parameters removed."""
        counts = self.parameters[scope]
        return 1 - counts["compressed"] / counts["reference"]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: parameters and bytes by scope, and the rates achieved."""
        rates = {scope: self.achieved(scope) for scope in self.parameters}
        return {"parameters": self.parameters, "bytes": self.bytes, "achieved_rate": rates}
