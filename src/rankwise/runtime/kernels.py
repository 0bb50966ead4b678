"""Layers of few bits as torch's kernels of whole numbers multiply them. Tensors and checkpoint stay what they are; what a kernel
reads in another order is held beside them, and where torch has no kernel the dense weight is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.errors import RankwiseError
from rankwise.layers.quantised import BYTE, QuantisedLinear, on_trellis

NIBBLE = 4  # bits
OUTPUTS = 16  # of which the kernel of 4 bits takes a multiple
INPUTS = 64  # that of 8 bits reads past the end of rows that are no multiple, that of 4 of rows that are no groups


class KernelLinear(QuantisedLinear):
    """A layer of few bits, multiplied by a kernel of 8 bits, by one of 4, which does for fewer, or as a dense weight."""

    ready: Tensor  # as the kernel reads it
    scales_and_zeros: Tensor
    at: tuple[torch.device, torch.dtype]

    @classmethod
    def of_layer(cls, layer: QuantisedLinear) -> KernelLinear:
        """The same layer, ready to be run where it is and in its dtype."""
        bias = layer.bias is not None
        made = cls(layer.in_features, layer.out_features, layer.bits, bias, "meta", layer.dtype, layer.coding)
        made.codes, made.scales, made.unit, made.bias = layer.codes, layer.scales, layer.unit, layer.bias
        on_cpu = layer.codes.device.type == "cpu" and layer.dtype == torch.bfloat16
        whole = layer.in_features % layer.group == layer.out_features % OUTPUTS == 0
        if on_cpu and whole and layer.bits <= NIBBLE and not on_trellis(layer.bits, layer.coding):
            unsigned = layer.whole_numbers.int() + 2 ** (NIBBLE - 1)
            ready = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
            zeros = torch.zeros_like(layer.steps.T)
            made.register_buffer("scales_and_zeros", torch.stack([layer.steps.T, zeros], -1).contiguous(), persistent=False)
        elif on_cpu and layer.bits == BYTE and layer.in_features % INPUTS == 0:
            ready = layer.codes
        else:
            ready = layer.weight
        made.register_buffer("ready", ready, persistent=False)
        made.at = ready.device, layer.dtype
        return made

    @property
    def as_dense(self) -> bool:
        """Whether torch has no kernel for it here, so that its dense weight is multiplied."""
        return self.ready.is_floating_point()

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m]. Raises `RankwiseError` where the layer was moved or cast since."""
        if (self.ready.device, self.dtype) != self.at:
            raise RankwiseError(
                "an optimized model was moved or cast: load it on that device in that dtype and optimize it",
            )
        if self.as_dense:
            return F.linear(x, self.ready, self.bias)
        rows = x.reshape(-1, self.in_features)
        if self.bits == BYTE:
            y = torch._weight_int8pack_mm(rows, self.ready, self.scales[:, 0])
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.ready, self.group, self.scales_and_zeros)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def with_kernels(model: nn.Module) -> None:
    """Have every layer of few bits run by a kernel, in place."""
    for name, layer in [(n, m) for n, m in model.named_modules() if type(m) is QuantisedLinear]:
        model.set_submodule(name, KernelLinear.of_layer(layer))
