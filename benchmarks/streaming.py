"""A random Llama of 7B's shape, compressed with 8 GB, or with all of the machine: the peak memory, and the seconds of a block.

    python benchmarks/streaming.py [--layers 3] [--memory 8GB] [--allocation energy] [--rate 0.2] [--windows 16] [--length 1024]
    python benchmarks/streaming.py --allocation llrc --decomposition kronecker --options rounds=1 value_steps=2 --output FILE
    python benchmarks/streaming.py --memory all --effort quick --layers 32 --windows 64 --length 512
                                   --allocation llrc:quick --decomposition kronecker --output FILE

The model (hidden 4096, ffn 11008, 32 heads, 32,000 tokens, bfloat16) is written shard by shard, with fewer layers than 32 and
less calibration text than the default: what a block costs does not depend on how many there are, so 32 layers are extrapolated.
The compression runs in a process of its own, whose peak is the kernel's (VmHWM). With --memory all rankwise chooses the way; a
quick --effort measures no matrix by itself afterwards. Writes results/streaming.md, or --output.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from real_models import machine
from transformers import LlamaConfig

HERE = Path(__file__).parent
FULL = 32  # layers of the model whose shape this is
ALL = "all"  # of the machine's memory


def write_model(folder: Path, layers: int) -> None:
    """Random weights, one shard per layer and one for what is outside."""
    from rankwise.integration.checkpoint import skeleton
    from rankwise.integration.weights import write_safetensors

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, vocab_size=32000, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    tensors = {name: tensor.bfloat16() for name, tensor in skeleton(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)

    def read(name: str) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(tensors[name].shape, dtype=torch.bfloat16)
        values = torch.randn(tensors[name].shape, generator=generator) / tensors[name].shape[-1] ** 0.5
        return values.bfloat16()

    files = {name: f"model-{name.split('.')[2] if '.layers.' in name else 'outside'}.safetensors" for name in tensors}
    for file in dict.fromkeys(files.values()):
        write_safetensors(folder / file, {n: t for n, t in tensors.items() if files[n] == file}, {"format": "pt"}, read)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def compress_in_a_process(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The report of the run."""
    code = f"""
import json, torch, rankwise
torch.set_num_threads({args.threads})
windows = torch.randint(32000, ({args.windows}, {args.length}), generator=torch.Generator().manual_seed(0))
result = rankwise.compress({str(folder / "model")!r}, {args.rate}, calibration=windows, output={str(folder / "small")!r},
    allocation={args.allocation!r}, decomposition={args.decomposition!r}, memory={None if args.memory == ALL else args.memory!r},
    effort={args.effort!r}, overwrite=True,
    options={dict(option.split("=") for option in args.options)!r})
print(json.dumps(result.report))
"""
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True, env=environment)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def text_of(report: dict[str, Any], args: argparse.Namespace) -> str:
    """The figures as Markdown."""
    seconds, peaks = report["seconds"], report["peak_memory_bytes"]
    each = {stage: value / args.layers for stage, value in seconds.items() if stage != "allocation"}
    method = " ".join((args.allocation, *args.options)) + f", effort {args.effort},"
    stages = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    return f"""A Llama of hidden 4096, ffn 11008, 32 heads, bfloat16, {args.layers} of 7B's {FULL} layers; {method} on
{args.decomposition} at rate {args.rate}, {args.windows} windows of {args.length} tokens, {machine()}, torch
{torch.__version__}.

| | |
|---|---|
| memory promised | {args.memory} |
| peak memory of the process | {", ".join(f"{kind} {peak / 1e9:.2f} GB" for kind, peak in peaks.items())} |
| rate achieved | {report["achieved_rate"]["linear"]:.4f} |
| seconds | {stages} |
| seconds of a block | {", ".join(f"{stage} {value:.0f}" for stage, value in each.items())} |
| {FULL} layers at that, the allocation apart (extrapolated, not run) | {FULL * sum(each.values()) / 3600:.1f} hours |

Statistics and the passes of a block grow with the tokens, its decompositions do not; peak memory does not grow with the layers.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--memory", default="8GB", help=f"to promise; {ALL} for no promise")
    parser.add_argument("--effort", default="default")
    parser.add_argument("--allocation", default="energy")
    parser.add_argument("--decomposition", default="whitened")
    parser.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE", help="of the allocation")
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "streaming.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model").mkdir()
        write_model(Path(folder) / "model", args.layers)
        text = text_of(compress_in_a_process(Path(folder), args), args)
    args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
