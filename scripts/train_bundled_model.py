"""Train the bundled model on the source of Python's standard library.

    python scripts/train_bundled_model.py [--output DIR] [--steps 6000]

Seeded; writes a checkpoint every 200 steps and resumes from it. Matrices are trained by Muon, which keeps their
spectra flat: a model whose every direction works is one that compression really hurts. About an hour on 2 threads.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import trange
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankwise import bundled

CONTEXT = 256
VOCABULARY = 1024
BATCH = 32
WARMUP = 100
MUON_LR, ADAM_LR, WEIGHT_DECAY = 0.02, 4e-3, 0.01


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT)


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=352, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, head_dim=16, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY, momentum=0.95),
        torch.optim.AdamW(others, lr=ADAM_LR, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, constant, then linear decay to zero over the last 40 % of the steps."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (0.4 * steps))


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    return torch.tensor([i for ids in tokenizer(texts, verbose=False)["input_ids"] for i in ids], dtype=torch.int32)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Mean nats per token over consecutive windows of `CONTEXT` held-out tokens."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT).long()
    losses = [model(batch, labels=batch).loss.item() * len(batch) for batch in windows.split(64)]
    return sum(losses) / len(windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=bundled.MODEL)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    checkpoint = args.output / "training.pt"

    texts = bundled.standard_library("train")
    tokenizer = train_tokenizer(texts)
    tokens, held_out = encode(tokenizer, texts), encode(tokenizer, bundled.standard_library("held-out"))
    print(f"{len(tokens):,} training tokens, {len(held_out):,} held-out tokens")

    torch.manual_seed(args.seed)
    model = build_model()
    optims = optimizers(model)
    base_lrs = [o.param_groups[0]["lr"] for o in optims]
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        start = state["step"]

    bar = trange(start, args.steps, initial=start, total=args.steps, desc="training")
    for step in bar:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # a resumed run sees the same batches
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=generator)
        batch = torch.stack([tokens[s : s + CONTEXT] for s in starts]).long()
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim, lr in zip(optims, base_lrs, strict=True):
            optim.param_groups[0]["lr"] = lr * schedule(step, args.steps)
            optim.step()
            optim.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            temporary = checkpoint.with_suffix(".tmp")
            torch.save({"model": model.state_dict(), "optims": [o.state_dict() for o in optims], "step": step + 1}, temporary)
            os.replace(temporary, checkpoint)
        if (step + 1) % 1000 == 0 or step + 1 == args.steps:
            value = held_out_loss(model, held_out)
            bar.write(f"step {step + 1}: held-out {value:.4f} nats per token, perplexity {math.exp(value):.2f}")

    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, do_sample=False)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    checkpoint.unlink()


if __name__ == "__main__":
    main()
