"""The vLLM plugin, on vLLM's own loader and linear layers where it is installed, else on stand-ins made from their source."""

from __future__ import annotations

import importlib.util
import tempfile
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_interfaces
from architectures import build
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from rankwise import RankwiseError, compress

REAL = importlib.util.find_spec("vllm") is not None
if not REAL:
    vllm_interfaces.install()

from vllm.model_executor.layers import linear  # noqa: E402
from vllm.model_executor.layers.quantization import get_quantization_config  # noqa: E402
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper  # noqa: E402

from rankwise.integration.vllm import LowRankMethod, register  # noqa: E402

WINDOWS = torch.randint(3, 90, (12, 32), generator=torch.Generator().manual_seed(1))
HIDDEN, HEAD, HEADS, KV_HEADS, INNER = 48, 12, 4, 2, 64
JOINED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
MAPPER = WeightsMapper(
    orig_to_new_stacked={  # as LlamaModel.hf_to_vllm_mapper
        ".q_proj": (".qkv_proj", "q"),
        ".k_proj": (".qkv_proj", "k"),
        ".v_proj": (".qkv_proj", "v"),
        ".gate_proj": (".gate_up_proj", 0),
        ".up_proj": (".gate_up_proj", 1),
    }
)


@pytest.fixture(autouse=True)
def engine() -> Iterator[None]:
    """vLLM's own globals: one process, no parallelism."""
    if not REAL:
        yield
        return
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized

    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        if not model_parallel_is_initialized():
            init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", 0, backend="gloo")
            initialize_model_parallel(1, 1)
        yield


@pytest.fixture(params=["llama-gqa-tied", "qwen2"], scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """Compressed but for k and gate, so that joined layers mix low-rank and dense parts; Qwen2 has biases."""
    path = tmp_path_factory.mktemp(request.param) / "small"
    options: dict[str, Any] = {"allocation": "uniform", "exclude": ("*.k_proj", "*.gate_proj"), "calibration": WINDOWS}
    return compress(build(request.param), 0.3, output=path, **options).model, path


class Layer(nn.Module):
    """The linear layers of vLLM's LlamaDecoderLayer, under its names."""

    def __init__(self, quant_config: Any, bias: bool) -> None:
        super().__init__()
        self.quant_config = quant_config
        options: dict[str, Any] = {"quant_config": quant_config, "params_dtype": torch.float32}
        attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Module()])
        layer: Any = self.model.layers[0]
        layer.self_attn, layer.mlp = nn.Module(), nn.Module()
        layer.self_attn.qkv_proj = linear.QKVParallelLinear(
            HIDDEN, HEAD, HEADS, KV_HEADS, bias=bias, prefix=f"{attention}.qkv_proj", **options
        )
        layer.self_attn.o_proj = linear.RowParallelLinear(
            HEAD * HEADS, HIDDEN, bias=False, prefix=f"{attention}.o_proj", **options
        )
        layer.mlp.gate_up_proj = linear.MergedColumnParallelLinear(
            HIDDEN, [INNER, INNER], bias=False, prefix=f"{mlp}.gate_up_proj", **options
        )
        layer.mlp.down_proj = linear.RowParallelLinear(INNER, HIDDEN, bias=False, prefix=f"{mlp}.down_proj", **options)
        for module in self.modules():  # vLLM's own dense product needs its compiled kernels
            if REAL and type(getattr(module, "quant_method", None)).__name__ == "UnquantizedLinearMethod":
                module.quant_method.apply = lambda of, x, bias=None: nn.functional.linear(x, of.weight, bias)  # type: ignore


def served(model: PreTrainedModel, path: Path) -> Any:
    """The first decoder layer of a folder as vLLM makes and fills it."""
    quantization = AutoConfig.from_pretrained(path).quantization_config
    config = get_quantization_config("rankwise").from_config(
        quantization if isinstance(quantization, dict) else quantization.to_dict()
    )
    config.packed_modules_mapping = JOINED
    config.apply_vllm_mapper(MAPPER.get_rename_mapper())
    layer = Layer(config, bias=model.config.model_type == "qwen2")
    tensors = load_file(path / "model.safetensors")
    names = [name for name in tensors if "layers.0." in name and "proj" in name]
    loaded = AutoWeightsLoader(layer).load_weights([(name, tensors[name]) for name in names], mapper=MAPPER)
    low_rank = {n for n, m in layer.named_modules() if isinstance(getattr(m, "quant_method", None), LowRankMethod)}
    assert {name.rpartition(".")[2] for name in low_rank} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert {n for n, p in layer.named_parameters() if p.numel()} <= set(loaded)
    return layer.model.layers[0]


def expected(model: PreTrainedModel, x: Tensor, inner: Tensor) -> dict[str, Tensor]:
    layer: Any = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "qkv_proj": torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], -1),
        "o_proj": attention.o_proj(x),
        "gate_up_proj": torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], -1),
        "down_proj": mlp.down_proj(inner),
    }


def test_is_found_by_its_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    group = "vllm.general_plugins"
    assert EntryPoint("rankwise", project["entry-points"][group]["rankwise"], group).load() is register
    register()
    register()
    assert get_quantization_config("rankwise").__name__ == "RankwiseVllmConfig"


@torch.no_grad()
def test_joined_layers_give_what_the_model_gives(folder: tuple[PreTrainedModel, Path]) -> None:
    model, path = folder
    layer = served(model, path)
    x, inner = torch.randn(5, HIDDEN), torch.randn(5, INNER)
    got = {
        name: getattr(layer.self_attn if name in ("qkv_proj", "o_proj") else layer.mlp, name)
        for name in expected(model, x, inner)
    }
    got = {name: module(inner if name == "down_proj" else x)[0] for name, module in got.items()}
    torch.testing.assert_close(got, expected(model, x, inner))


@pytest.mark.skipif(REAL, reason="vLLM itself needs a process per device")
@pytest.mark.parametrize("size", [2, 4])  # 4: two devices share a head of keys and values
@torch.no_grad()
def test_split_over_devices(folder: tuple[PreTrainedModel, Path], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Column-parallel outputs concatenate, row-parallel ones add up to the whole layer's."""
    model, path = folder
    x, inner = torch.randn(5, HIDDEN), torch.randn(5, INNER)
    parts: dict[str, list[Tensor]] = {"qkv_proj": [], "o_proj": [], "gate_up_proj": [], "down_proj": []}
    for rank in range(size):
        monkeypatch.setattr(vllm_interfaces, "WORLD", {"rank": rank, "size": size})
        layer = served(model, path)
        parts["qkv_proj"].append(layer.self_attn.qkv_proj(x)[0])
        parts["o_proj"].append(layer.self_attn.o_proj(x.chunk(size, -1)[rank])[0])
        parts["gate_up_proj"].append(layer.mlp.gate_up_proj(x)[0])
        parts["down_proj"].append(layer.mlp.down_proj(inner.chunk(size, -1)[rank])[0])
    whole = expected(model, x, inner)
    for name in ("o_proj", "down_proj"):
        torch.testing.assert_close(sum(parts[name]), whole[name])
    gate_up = torch.stack(parts["gate_up_proj"]).unflatten(-1, (2, -1))  # [device, tokens, part, out]
    torch.testing.assert_close(gate_up.permute(1, 2, 0, 3).flatten(1), whole["gate_up_proj"])
    heads = whole["qkv_proj"].unflatten(-1, (HEADS + 2 * KV_HEADS, HEAD))
    q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)
    kv = max(1, KV_HEADS // size)
    for rank, part in enumerate(parts["qkv_proj"]):
        mine = rank * KV_HEADS // size
        wanted = [q.chunk(size, 1)[rank], k[:, mine : mine + kv], v[:, mine : mine + kv]]
        torch.testing.assert_close(part, torch.cat(wanted, 1).flatten(1))


def test_what_cannot_be_served_is_refused(folder: tuple[PreTrainedModel, Path]) -> None:
    config: Any = get_quantization_config("rankwise")
    good = {"quant_method": "rankwise", "format_version": 1, "ranks": {"lm_head": 4, "h.c_attn": 4}, "experts": []}
    with pytest.raises(RankwiseError, match="experts"):
        config.from_config(good | {"experts": ["model.layers.0.mlp.experts"]})
    with pytest.raises(ValueError, match="format 9"):
        config.from_config(good | {"format_version": 9})
    with pytest.raises(RankwiseError, match="lm_head"):
        config.from_config(good).get_quant_method(nn.Embedding(3, 3), "lm_head")
    assert config.from_config(good).get_quant_method(nn.Embedding(3, 3), "embed") is None
    with pytest.raises(RankwiseError, match="one low-rank matrix"):
        linear.QKVParallelLinear(
            HIDDEN,
            HEAD,
            HEADS,
            KV_HEADS,
            bias=False,
            quant_config=config.from_config(good),
            prefix="h.c_attn",
            params_dtype=torch.float32,
        )
    model, path = folder
    tensors = load_file(path / "model.safetensors")
    layer = served(model, path).self_attn.o_proj.first
    with pytest.raises(RankwiseError, match="expected"):
        layer.weight.weight_loader(layer.weight, tensors["model.layers.0.self_attn.o_proj.first.weight"][:-1])
