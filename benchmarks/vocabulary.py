"""What a large vocabulary costs: peak memory of `rankwise compress` on random models of two layers.

    python benchmarks/vocabulary.py [--words 16384 65536 262144]

A Gemma-3-like decoder of width 640, weights in bfloat16, head tied; 2,048 tokens that it writes itself, and every stage of the
default once, as time grows with the vocabulary. Peak resident memory of the process, by its own report; of it the embedding in
float32, which no way of working can do without here. Writes benchmarks/results/vocabulary.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from main_job import HERE
from transformers import Gemma3ForCausalLM, Gemma3TextConfig


def model_of(words: int, folder: Path) -> Path:
    config = Gemma3TextConfig(
        vocab_size=words,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def peak(folder: Path, output: Path) -> tuple[float, float]:
    """GB and minutes of compressing at rate 0.2."""
    few = ["--samples", "16", "--length", "128", "--allocation", "llrc points=1 rounds=1 value_steps=2"]
    command = [sys.executable, "-m", "rankwise", "compress", folder, "--rate", "0.2", *few, "--json", "-o", output]
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "2"})
    report = json.loads(done.stdout)
    return report["peak_memory_bytes"]["host"] / 1e9, sum(report["seconds"].values()) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", nargs="+", type=int, default=[16384, 65536, 262144])
    args = parser.parse_args()
    lines = ["| words | embedding in float32, GB | peak memory, GB | minutes |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as work:
        for words in args.words:
            memory, minutes = peak(model_of(words, Path(work, f"{words}")), Path(work, f"{words}-small"))
            lines.append(f"| {words:,} | {4 * 640 * words / 1e9:.2f} | {memory:.2f} | {minutes:.1f} |")
            print(lines[-1], flush=True)
    (HERE / "results" / "vocabulary.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
