"""The architectures that compression is tested on: name -> the auto class, the config class and its settings. Tiny, random."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 96
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = SMALL | {"num_key_value_heads": 2, "head_dim": 12}
EXPERTS = GQA | {"num_experts_per_tok": 2}
CAUSAL, ENCODER, ENCODER_DECODER = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (CAUSAL, "LlamaConfig", SMALL),
    "llama-gqa-tied": (CAUSAL, "LlamaConfig", GQA | {"tie_word_embeddings": True}),
    "mistral": (CAUSAL, "MistralConfig", GQA | {"sliding_window": 8}),
    "qwen2": (CAUSAL, "Qwen2Config", GQA),
    "qwen3": (CAUSAL, "Qwen3Config", GQA),
    "gemma3": (CAUSAL, "Gemma3TextConfig", GQA | {"sliding_window": 8}),
    "phi3": (CAUSAL, "Phi3Config", GQA),
    "gpt2": (CAUSAL, "GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": (CAUSAL, "OPTConfig", SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt-neox": (CAUSAL, "GPTNeoXConfig", SMALL),
    "falcon": (CAUSAL, "FalconConfig", SMALL | {"bias": True}),
    "mixtral": (CAUSAL, "MixtralConfig", EXPERTS | {"num_local_experts": 4}),
    "qwen3-moe": (CAUSAL, "Qwen3MoeConfig", EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32}),
    "gpt-oss": (CAUSAL, "GptOssConfig", EXPERTS | {"num_local_experts": 4, "sliding_window": 8}),
    "jetmoe": (CAUSAL, "JetMoeConfig", EXPERTS | {"num_local_experts": 4, "kv_channels": 12}),
    "t5": (
        ENCODER_DECODER,
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        | {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
    ),
    "bert-mlm": (ENCODER, "BertConfig", SMALL),
    "bert": ("AutoModel", "BertConfig", SMALL),
    "bert-classifier": ("AutoModelForSequenceClassification", "BertConfig", SMALL | {"num_labels": 3}),
}

ROPE = {"rope_type": "default", "rope_theta": 1e4}
MOE = EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32, "rope_parameters": ROPE | {"mrope_section": [2, 2, 2]}}
VISION = {"depth": 1, "hidden_size": 48, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 48}
AUDIO = {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "d_model": 48, "num_mel_bins": 16}
IMAGES = "AutoModelForImageTextToText"
OF_THEIR_OWN: dict[str, tuple[str, str, dict[str, Any]]] = {  # they store, fill or run their weights as others do not
    "llama4": (
        CAUSAL,
        "Llama4TextConfig",
        EXPERTS | {"intermediate_size_mlp": 64, "num_local_experts": 4, "interleave_moe_layer_step": 1},
    ),
    "phimoe": (CAUSAL, "PhimoeConfig", EXPERTS | {"num_local_experts": 4}),
    "dbrx": (
        CAUSAL,
        "DbrxConfig",
        {"vocab_size": VOCABULARY, "d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "rope_parameters": ROPE}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}}
        | {"ffn_config": {"hidden_size": 48, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
    ),
    "nomic-bert": ("AutoModel", "NomicBertConfig", SMALL),
    "qwen3-vl-moe": (
        IMAGES,
        "Qwen3VLMoeConfig",
        {"text_config": MOE, "vision_config": VISION | {"deepstack_visual_indexes": [0]}},
    ),
    "qwen3-omni": (
        IMAGES,
        "Qwen3OmniMoeThinkerConfig",
        {"text_config": MOE, "vision_config": VISION | {"deepstack_visual_indexes": [0]}}
        | {"audio_config": AUDIO | {"output_dim": 48, "downsample_hidden_size": 16}},
    ),
    "xlstm": (
        CAUSAL,
        "xLSTMConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 1, "num_heads": 4, "qk_dim_factor": 1.0}
        | {"mode": "inference"},
    ),
    "falcon-mamba": (
        CAUSAL,
        "FalconMambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 8},
    ),
}


def build(name: str, **changes: Any) -> PreTrainedModel:
    """The architecture with random weights, the same at each call; biases and norms are random too, so that each one counts."""
    auto, config, settings = (ARCHITECTURES | OF_THEIR_OWN)[name]
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(getattr(transformers, config)(**settings | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
