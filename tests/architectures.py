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


def build(name: str, **changes: Any) -> PreTrainedModel:
    """The architecture with random weights, the same at each call; biases and norms are random too, so that each one counts."""
    auto, config, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(getattr(transformers, config)(**settings | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
