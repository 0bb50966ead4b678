"""Models of many kinds run block by block, read through transformers' own conversions: they agree with the model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import EXPERTS, GQA, SMALL, VOCABULARY
from safetensors.torch import load_file, save_file
from test_streaming import both
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from rankwise import RankwiseError, compress
from rankwise.calibration.signal import frozen, signal_of
from rankwise.integration.checkpoint import load_config
from rankwise.integration.source import empty_model
from rankwise.layers.matrices import find_matrices
from rankwise.streaming.blocks import StoredBlocks

WINDOWS = torch.randint(3, 90, (12, 24), generator=torch.Generator().manual_seed(0))
OWN_NAMES = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
STATE = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 8}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = SMALL | LATENT | {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_group": 1}
DEEPSEEK |= {"topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 4}
SPARSE = EXPERTS | {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
PER_LAYER = GQA | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}
PER_LAYER |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}

POPULAR: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["cohere2", "gemma2", "gemma3_text", "glm4", "granite"], GQA),
    **dict.fromkeys(["llama", "mistral", "nemotron", "olmo2", "phi3"], GQA),
    **dict.fromkeys(["qwen2", "qwen3", "smollm3", "starcoder2"], GQA),
    **dict.fromkeys(["gpt_oss", "mixtral", "qwen3_moe"], SPARSE),
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 4},
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "falcon": SMALL,
    "gpt2": OWN_NAMES,
    "gpt_neox": SMALL,
    "jamba": SPARSE | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "llama4_text": SPARSE | {"num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 64},
    "mamba": STATE | {"time_step_rank": 4},
    "mamba2": STATE | {"num_heads": 4, "head_dim": 24, "n_groups": 1, "chunk_size": 8},
    "opt": SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "stablelm": GQA | {"partial_rotary_factor": 0.5},
    "rwkv": {"vocab_size": VOCABULARY, "hidden_size": 48, "attention_hidden_size": 48, "intermediate_size": 64}
    | {"num_hidden_layers": 3, "rescale_every": 2},
}
OTHERS: dict[str, dict[str, Any]] = {
    "bamba": GQA | MAMBA2 | {"attn_layer_indices": [1]},
    "bert": SMALL | {"is_decoder": True},
    "cpmant": {"vocab_size": VOCABULARY, "hidden_size": 48, "num_attention_heads": 4, "dim_head": 12, "dim_ff": 64}
    | {"num_hidden_layers": 2, "prompt_length": 4},
    "ctrl": OWN_NAMES | {"dff": 64},
    "minimax_m2": SPARSE,
    "gemma3n_text": PER_LAYER | {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": PER_LAYER | {"global_head_dim": 12, "num_global_key_value_heads": 2},
    "openai-gpt": OWN_NAMES,
    "xlnet": {"vocab_size": VOCABULARY, "d_model": 48, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "xlstm": STATE | {"num_heads": 4, "qk_dim_factor": 1.0},
    "zamba2": SMALL
    | {"num_key_value_heads": 4, "layers_block_type": ["linear_attention", "hybrid"], "chunk_size": 8}
    | {"mamba_d_state": 8, "n_mamba_heads": 4},
}
REFUSED: dict[str, dict[str, Any]] = {
    "xlm": {"vocab_size": VOCABULARY, "emb_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    "zaya": SPARSE | {"num_experts_per_tok": 1},
}


def random_model(kind: str, **changes: Any) -> PreTrainedModel:
    """A tiny model whose weights and stored buffers are all random."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(REFUSED | POPULAR | OTHERS)[kind] | changes)).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


@torch.no_grad()
def run_block_by_block(folder: Path, windows: Tensor) -> Tensor:
    """The logits [tokens, vocabulary] of windows, one block's weights in memory at a time."""
    empty, source = empty_model(folder, load_config(folder), "auto")
    blocks = StoredBlocks.of(empty, find_matrices(empty)[0], torch.device("cpu"), source=source)
    batch = {"input_ids": windows}
    blocks.try_out(batch)
    ends = blocks.outside()
    with frozen(empty), blocks.loaded(ends["rest"]):
        with blocks.loaded(ends["embedding"]):
            hidden = blocks.enter(batch)
        for index in range(len(blocks)):
            with blocks.loaded(blocks.names(index)):
                hidden = blocks.run(index, hidden, blocks.call_of(index, batch))
        with blocks.loaded(ends["head"]):
            signal = blocks.leave(batch, hidden)
            return signal.logits(signal.values)


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    """The same of a model in memory."""
    with frozen(model):
        signal = signal_of(model, {"input_ids": WINDOWS[:2]})
        return signal.logits(signal.values)


@pytest.mark.parametrize("kind", sorted(POPULAR | OTHERS))
def test_every_kind_agrees_with_the_model_in_memory(kind: str, tmp_path: Path) -> None:
    model = random_model(kind)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(run_block_by_block(tmp_path, WINDOWS[:2]), logits_of(model), rtol=1e-4, atol=1e-4)


def test_a_model_that_reads_its_embeddings_weight_has_it(tmp_path: Path) -> None:
    """Gemma 4 puts that of its padding token where pictures go."""
    text = PER_LAYER | {"model_type": "gemma4_text", "global_head_dim": 12, "num_global_key_value_heads": 2}
    vision = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 12}
    config = Gemma4Config(text_config=text, vision_config=vision | {"num_key_value_heads": 4}, audio_config=None)
    model = Gemma4ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(run_block_by_block(tmp_path, WINDOWS[:2]), logits_of(model), rtol=1e-4, atol=1e-4)


def test_beside_a_larger_tower_of_pictures_the_text_goes_block_by_block(tmp_path: Path) -> None:
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16}
    text = GQA | {"model_type": "llama"}
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(run_block_by_block(tmp_path, WINDOWS[:2]), logits_of(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_keys_and_values_that_later_blocks_read_go_beside_the_hidden_states(kind: str, tmp_path: Path) -> None:
    sharing = {"num_hidden_layers": 5, "num_kv_shared_layers": 3, "activation_sparsity_pattern": [0.0] * 5}
    sharing |= {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"], "global_head_dim": 24}
    model = random_model(kind, **sharing)
    model.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(run_block_by_block(tmp_path / "model", WINDOWS[:2]), logits_of(model), rtol=1e-4, atol=1e-4)
    options: dict[str, Any] = {"allocation": "energy", "decomposition": "kronecker", "include": ["model.layers.*"]}
    options |= {"calibration": WINDOWS, "output": tmp_path / "out", "overwrite": True}
    whole, streamed = (compress(tmp_path / "model", 0.2, memory=memory, **options).report for memory in (None, "8GB"))
    assert whole["ranks"] == streamed["ranks"]
    assert streamed["kl"] == pytest.approx(whole["kl"], rel=1e-3)


def test_a_mixture_is_compressed_as_in_memory(tmp_path: Path) -> None:
    """Its first block has no experts, and those of its third are left stacked."""
    random_model("deepseek_v3", num_hidden_layers=3).bfloat16().save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"allocation": "energy", "exclude": ["model.layers.2.mlp.experts.*"]}
    whole, streamed = both(tmp_path / "model", tmp_path, WINDOWS, **options)
    assert whole["ranks"] == streamed["ranks"]
    assert streamed["kl"] == pytest.approx(whole["kl"], rel=1e-4)
    assert any(rank for name, rank in streamed["ranks"].items() if "layers.1.mlp.experts" in name)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("xlm", "does more with its blocks than hand on hidden states"),
        ("zaya", "hands its blocks more than the previous hidden states"),
    ],
)
def test_what_blocks_do_besides_is_refused(kind: str, message: str, tmp_path: Path) -> None:
    random_model(kind, **REFUSED[kind]).save_pretrained(tmp_path / "model")
    with pytest.raises(RankwiseError, match=message):
        compress(tmp_path / "model", 0.2, calibration=WINDOWS, output=tmp_path / "out", memory="8GB", allocation="uniform")
    assert not list(tmp_path.glob("out*"))


def stored(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def store(tensors: dict[str, Tensor], folder: Path) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_names_of_the_base_model_and_tensors_that_nobody_needs(prefix: str, tmp_path: Path) -> None:
    model = random_model("llama", tie_word_embeddings=True)
    tensors = {name.replace("model.", prefix): tensor for name, tensor in stored(model, tmp_path).items()}
    store(tensors | {f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": torch.rand(6)}, tmp_path)
    torch.testing.assert_close(run_block_by_block(tmp_path, WINDOWS[:2]), logits_of(model), rtol=1e-4, atol=1e-4)


def test_tied_by_the_config_but_not_by_the_file(tmp_path: Path) -> None:
    model = random_model("llama", tie_word_embeddings=True)
    tensors = stored(model, tmp_path / "model")
    head = tensors["model.embed_tokens.weight"] + 0.1 * torch.randn(VOCABULARY, 48)
    store(tensors | {"lm_head.weight": head}, tmp_path / "model")
    compress(tmp_path / "model", 0.2, calibration=WINDOWS, output=tmp_path / "out", memory="8GB", allocation="uniform")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], head)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, head)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert not loaded.config.tie_word_embeddings


def test_tensors_of_another_shape_are_named(tmp_path: Path) -> None:
    tensors = stored(random_model("mixtral"), tmp_path)
    name = next(name for name in tensors if "experts.3.w2" in name)
    store({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path)
    with pytest.raises(RankwiseError, match=r"experts\.down_proj"):
        empty_model(tmp_path, load_config(tmp_path), "auto")
