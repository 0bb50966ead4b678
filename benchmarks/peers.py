"""What other tools make of a model in few bits, on the same windows of text: llm-compressor's GPTQ, and HQQ, as they come
but for groups of 64 numbers, which divide the models' rows. (llm-compressor's AWQ needs an accelerator.)

They are `--peers` of bytes.py, in an environment of their own, for their versions of transformers:

    pip install "llmcompressor==0.14.0.1" hqq "rankwise[quantize]"
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

GROUP = 64
SCALE = 16  # bits of a scale, and of HQQ's zero points


def by_gptq(model: PreTrainedModel, windows: Tensor, bits: int) -> float:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    rows = windows.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    groups = {"weights": {"targets": ["Linear"], "weights": weights}}
    recipe = GPTQModifier(ignore=["lm_head"], config_groups=groups)
    oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples=len(rows), max_seq_length=windows.shape[1])
    return bits + SCALE / GROUP


def by_hqq(model: PreTrainedModel, windows: Tensor, bits: int) -> float:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            layer = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
            linear.weight.data = layer.dequantize()
    return bits + 2 * SCALE / GROUP


PEERS: dict[str, Callable[[PreTrainedModel, Tensor, int], float]] = {  # each rounds a model's weights where they stand
    "llm-compressor GPTQ": by_gptq,
    "HQQ": by_hqq,
}


def rounded(peer: str, folder: Path, windows: Tensor, bits: int) -> tuple[nn.Module, float]:
    """The model with every matrix rounded, in float32, and the bits per weight that it would take. windows: [samples, tokens]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, PEERS[peer](model, windows, bits)
