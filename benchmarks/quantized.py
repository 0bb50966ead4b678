"""Low rank and quantization together: bytes held and KL to the original, of the bundled model.

    python benchmarks/quantized.py [--rates 0.1 0.2 0.3]

torchao's int8 weight-only, and int4 in groups of 32 where the kernel takes the shape, int8 elsewhere. The output
head is tied to the embedding and stays in float32, as do the norms: bytes are those of the decoder layers. Judged on 100 windows
of the held-out split. Writes benchmarks/results/quantized.md; the compressed models are those of assisted.py.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from assisted import compressed
from main_job import HERE, LENGTH
from torch import nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise import bundled
from rankwise.calibration.batches import batches_of
from rankwise.calibration.signal import signal_of
from rankwise.calibration.text import read_documents
from rankwise.calibration.tokens import windows_of
from rankwise.evaluation.compare import compare
from rankwise.evaluation.size import held_bytes

GROUP = 32


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def int8(model: nn.Module, only: Any = lambda linear: True) -> None:
    quantize_(model, Int8WeightOnlyConfig(), lambda module, _: type(module) is nn.Linear and only(module))


def fits(linear: nn.Linear) -> bool:
    """What the int4 kernel takes: rows of whole groups, and a multiple of 16 of them."""
    return linear.in_features % GROUP == 0 and linear.out_features % 16 == 0


def int4(model: nn.Module) -> None:
    quantize_(
        model,
        PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False),
        lambda module, _: type(module) is nn.Linear and fits(module),
    )
    int8(model, only=lambda linear: not fits(linear))


WAYS: dict[str, Any] = {"float32": lambda model: None, "int8": int8, "int4": int4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rankwise-assisted")
    args = parser.parse_args()
    original = load(bundled.MODEL)
    windows = windows_of(AutoTokenizer.from_pretrained(bundled.MODEL), read_documents("stdlib:held-out"), LENGTH, 100, seed=0)
    batches = batches_of(original, windows)
    folders = {0.0: bundled.MODEL} | {rate: compressed("bundled", rate, args.work) for rate in args.rates}
    lines = [
        "KB of the decoder layers (embedding and tied head, 512 KB, not counted) and KL to the original, nats per token, on 100 "
        "windows of 256 tokens.\n",
        "| rate | " + " | ".join(f"{way}: KB | KL" for way in WAYS) + " |",
        "|---|" + "---|" * (2 * len(WAYS)),
    ]
    for rate, folder in folders.items():
        cells = []
        for quantize in WAYS.values():
            model = load(folder)
            quantize(model.model.layers)
            cost = compare(lambda b: signal_of(original, b), lambda b, m=model: signal_of(m, b), batches, causal=True)  # type: ignore[misc]
            cells.append(f"{held_bytes(model.model.layers) / 1024:.0f} | {cost.kl:.4f}")
        lines.append(f"| {rate:g} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    (HERE / "results" / "quantized.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
