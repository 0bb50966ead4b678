"""A compressed model leaves torch like any other: torch.export, ONNX, ExecuTorch; for GGUF, its dense equivalent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from architectures import build
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rankwise import bundled, compress, densify

AUTO = {"input_ids": dict.fromkeys((0, 1), torch.export.Dim.AUTO)}  # any number of sequences, of any length
EXAMPLE = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(3, 90, (3, 20), generator=torch.Generator().manual_seed(1))


class Logits(nn.Module):
    """The model as a function of its tokens alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.fixture
def model(tmp_path: Path) -> nn.Module:
    """A tiny Llama of one block, compressed."""
    windows = torch.randint(3, 90, (12, 16), generator=torch.Generator().manual_seed(2))
    folder, dense = tmp_path / "small", build("llama", num_hidden_layers=1)
    compress(dense, 0.25, calibration=windows, allocation="uniform", output=folder)
    return Logits(AutoModelForCausalLM.from_pretrained(folder)).eval()


@torch.no_grad()
def test_torch_export(model: nn.Module, tmp_path: Path) -> None:
    program = torch.export.export(model, (EXAMPLE,), dynamic_shapes=AUTO, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(OTHER), model(OTHER))


@torch.no_grad()
def test_onnx(model: nn.Module, tmp_path: Path) -> None:
    """Run by onnxruntime; the factors are stored, not their product."""
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (EXAMPLE,), file, dynamo=True, dynamic_shapes=AUTO, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(file)
    [logits] = session.run(None, {session.get_inputs()[0].name: OTHER.numpy()})
    np.testing.assert_allclose(logits, model(OTHER).numpy(), rtol=1e-3, atol=1e-4)
    weights = sum(len(tensor.raw_data) for tensor in onnx.load(file).graph.initializer)
    assert weights == pytest.approx(sum(p.nbytes for p in model.parameters()), rel=0.05)


@torch.no_grad()
def test_executorch(model: nn.Module) -> None:
    """On XNNPACK, where ExecuTorch is installed: it is too much for every test run (pip install executorch)."""
    exir = pytest.importorskip("executorch.exir")
    partitioner = pytest.importorskip("executorch.backends.xnnpack.partition.xnnpack_partitioner").XnnpackPartitioner
    program = torch.export.export(model, (EXAMPLE,), strict=False)
    edge = exir.to_edge_transform_and_lower(program, partitioner=[partitioner()]).to_executorch()
    runtime = pytest.importorskip("executorch.runtime").Runtime.get()
    [logits] = runtime.load_program(edge.buffer).load_method("forward").execute([EXAMPLE])
    torch.testing.assert_close(logits, model(EXAMPLE), rtol=1e-3, atol=1e-4)


def tensors(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  not a mapping


def test_densified_is_what_converters_expect(small_bundled: Path, tmp_path: Path) -> None:
    """llama.cpp's converter (GGUF) and its like read tensors by name: the original's names and shapes, and nothing else."""
    densify(small_bundled, tmp_path / "dense")
    assert tensors(tmp_path / "dense") == tensors(bundled.MODEL)
    assert '"quantization_config"' not in (tmp_path / "dense" / "config.json").read_text()
    assert (tmp_path / "dense" / "tokenizer.json").exists()
