"""The compressed model drafts for its own original: how many of its tokens does the original accept?

    python benchmarks/assisted.py [--models babyllama-tok105 bundled] [--rates 0.1 0.2 0.3]

Assisted generation (speculative decoding) as transformers has it, 4 tokens drafted for a call of the original, on prompts of 32
tokens from held-out text: the last 500 stories, or the bundled model's held-out split. BabyLlama needs the data folder beside
the repository (--data). Writes benchmarks/results/assisted.md; compressed models are kept in --work and not made again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from main_job import HERE, LENGTH, stories
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise import bundled, compress
from rankwise.calibration.text import read_documents
from rankwise.calibration.tokens import windows_of

DATA = HERE.parent.parent / "shared" / "data"
DRAFTED, PROMPT, NEW = 4, 32, 96
MODES: dict[str, dict[str, Any]] = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "top_k": 0, "top_p": 1.0}}


class Calls:
    """Counts a model's calls."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.count += 1


def measure(original: Any, draft: Any, prompts: Tensor, mode: dict[str, Any]) -> tuple[float, float]:
    """The fraction of drafted tokens that the original accepts, and the tokens generated for each of its calls."""
    torch.manual_seed(0)
    draft.generation_config.update(
        num_assistant_tokens=DRAFTED, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    calls, drafted, tokens = Calls(original), Calls(draft), 0
    for prompt in prompts[:, None]:
        answer = original.generate(
            prompt, attention_mask=torch.ones_like(prompt), assistant_model=draft, max_new_tokens=NEW, min_new_tokens=NEW, **mode
        )
        tokens += answer.shape[1] - prompt.shape[1]
    return (tokens - calls.count) / drafted.count, tokens / calls.count  # each call of the original adds a token of its own


def speed(per_call: float, rate: float) -> float:
    """Of decoding, over the original alone: a call costs its bytes, however many tokens it checks; and embeddings nothing."""
    return per_call / (1 + DRAFTED * (1 - rate))


def compressed(model: str, rate: float, work: Path, data: Path = DATA) -> Path:
    """The folder of `model` at `rate`, made where it is not there."""
    folder = work / f"{model}-{rate}"
    if not folder.exists():
        calibration = "stdlib:train" if model == "bundled" else stories(data, work)[0]
        compress(source_of(model, data), rate, calibration=calibration, output=folder, length=LENGTH, resume=True)
    return folder


def source_of(model: str, data: Path) -> Path:
    """The original's folder."""
    return bundled.MODEL if model == "bundled" else data / "models" / model


def rows(model: str, rates: list[float], prompts: int, data: Path, work: Path) -> list[str]:
    """A line of the table for each rate."""
    source = source_of(model, data)
    held_out = "stdlib:held-out" if model == "bundled" else stories(data, work)[1]
    windows = windows_of(AutoTokenizer.from_pretrained(source), read_documents(held_out), PROMPT, prompts, seed=0)
    lines = []
    for rate in rates:
        folder = compressed(model, rate, work, data)
        cells = []
        for mode in MODES.values():
            original, draft = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, folder))
            accepted, per_call = measure(original, draft, windows, mode)
            cells.append(f"{accepted:.1%} | {per_call:.2f} | {speed(per_call, rate):.2f}")
        lines.append(f"| {model} | {rate} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["babyllama-tok105", "bundled"])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rankwise-assisted")
    args = parser.parse_args()
    head = [
        f"{args.prompts} prompts of {PROMPT} tokens, {NEW} generated for each, {DRAFTED} drafted for each call of the original "
        f"({DRAFTED + 1} tokens at best). Accepted: of the drafted tokens. Speed: over the original alone where both run at the "
        "speed of their bytes, so that a call of the draft costs 1 - rate of one of the original; computed, not timed.\n",
        "| model | rate | " + " | ".join(f"{m}: accepted | tokens per call | speed" for m in MODES) + " |",
        "|---|---|" + "---|" * (3 * len(MODES)),
    ]
    body = [line for m in args.models for line in rows(m, args.rates, args.prompts, args.data, args.work)]
    (HERE / "results" / "assisted.md").write_text("\n".join([*head, *body]) + "\n")


if __name__ == "__main__":
    main()
