"""`rankwise bench`: how fast a model runs on this machine, beside the model it was made from and beside the ideal.

The ideal speed-up is that of the numbers to be read and multiplied: dense over compressed weights of all linear layers (of a
mixture of experts: of all experts). A token of decoding reads each of them once; in prefill the output head counts for one
position only, and is left out.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, StaticCache

from rankwise.errors import RankwiseError, reason
from rankwise.integration.checkpoint import load_config, load_model, quantization_of, refuse_compressed, skeleton
from rankwise.layers.linear import holds_matrix, weight_of
from rankwise.layers.lowrank import LowRankLinear
from rankwise.layers.matrices import unstack_experts
from rankwise.layers.quantised import QuantisedLinear
from rankwise.memory import peak_memory
from rankwise.runtime.optimize import optimize
from rankwise.runtime.timing import alternating, ratio

PROMPT = 512  # tokens, where the model takes as many
CHILD = "import json, sys; from rankwise.runtime import bench; bench.print_peaks(**json.loads(sys.argv[1]))"


@dataclass(frozen=True)
class Load:
    """What is run: a prompt of `prompt` random tokens, then `new_tokens` more, one at a time, for each of `batch` sequences."""

    batch: int
    prompt: int
    new_tokens: int


def bench(
    path: str | Path,
    reference: str | Path | None = None,
    *,
    batches: Sequence[int] = (1, 16),
    prompt: int | None = None,
    new_tokens: int = 32,
    repeats: int = 5,
    threads: int | None = None,
    compiled: bool = False,
    dtype: str = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Measure the speed of prefill and decode, and memory, and compare with `reference` and the ideal.

    path: a folder that rankwise wrote, or any causal model; compressed ones run as `optimize` leaves them. prompt: tokens, by
    default 512 or as many as the models take beside the `new_tokens`. Both models run in turn in this process, `repeats` times;
    speeds are medians, speed-ups medians of the pairs. compiled: both run through `torch.compile`, as loaded and not as
    `optimize` leaves them, with a cache of fixed size, on a GPU as CUDA graphs. Peak memory is that of a fresh process that runs
    the model alone, not compiled. Returns plain values for JSON. Raises `RankwiseError`.
    """
    asked = [] if prompt is None else [prompt]
    if not batches or min(*batches, *asked, new_tokens, repeats) < 1:
        given = f"batches={[*batches]}, prompt={prompt}, new_tokens={new_tokens}, repeats={repeats}"
        raise RankwiseError(f"{given}: all of these must be 1 or more")
    if threads is not None:
        if threads < 1:
            raise RankwiseError(f"threads={threads} must be at least 1")
        torch.set_num_threads(threads)
    paths = {"compressed": path} if reference is None else {"compressed": path, "reference": reference}
    configs = {role: load_config(p) for role, p in paths.items()}
    if reference is not None:
        refuse_compressed(reference, configs["reference"])
    context = min(getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf for config in configs.values())
    prompt = int(max(1, min(PROMPT, context - new_tokens))) if prompt is None else prompt
    if prompt + new_tokens > context:
        raise RankwiseError(
            f"prompt={prompt} and new_tokens={new_tokens} exceed the model's {context} tokens: ask for fewer",
        )
    models = {role: _open(p, configs[role], dtype, device) for role, p in paths.items()}
    if not compiled:
        models = {role: optimize(model) for role, model in models.items()}
    ideal = ideal_speedup(models["compressed"])
    rows = []
    loads = [Load(batch, prompt, new_tokens) for batch in sorted(set(batches))]
    for load in loads:
        run = all_compiled(models.values(), load) if compiled else list(models.values())
        seconds = times(run, load, repeats)
        for phase, tokens in (("prefill", load.batch * prompt), ("decode", load.batch * new_tokens)):
            own = dict(zip(models, seconds[phase], strict=True))
            row: dict[str, Any] = {"phase": phase, "batch": load.batch}
            row["tokens_per_second"] = {role: tokens / statistics.median(s) for role, s in own.items()}
            if reference is not None:
                row["speedup"] = ratio(own["reference"], own["compressed"])
                row["ideal"] = ideal[phase]
                row["of_ideal"] = row["speedup"] / ideal[phase]
            rows.append(row)
    peaks = {role: peaks_alone(p, loads, torch.get_num_threads(), dtype, device) for role, p in paths.items()}
    return {
        "model": str(path),
        "reference": None if reference is None else str(reference),
        "dtype": str(models["compressed"].dtype).removeprefix("torch."),
        "device": str(models["compressed"].device),
        "threads": torch.get_num_threads(),
        "compiled": compiled,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "speed": rows,
        "weight_bytes": {role: weight_bytes(model) for role, model in models.items()},
        "peak_memory_bytes": {
            role: {str(load.batch): peak for load, peak in zip(loads, own, strict=True)} for role, own in peaks.items()
        },
    }


def _open(path: str | Path, config: PreTrainedConfig, dtype: str, device: str) -> Any:
    model = load_model(path, config, dtype, device)
    if not model.can_generate() or config.is_encoder_decoder:
        raise RankwiseError(
            f"{path} is a {type(model).__name__}, but only causal language models are timed: give one",
        )
    return model


@torch.inference_mode()
def prefill(model: Any, ids: Tensor) -> Any:
    """The output for the prompts [batch, length], with the cache, the logits of the last position alone."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def decode(model: Any, output: Any, tokens: int) -> None:
    """Greedy steps from a prefill's output on."""
    for _ in range(tokens):
        output = step(model, output, output.logits[:, -1:].argmax(-1))


@torch.inference_mode()
def step(model: Any, output: Any, token: Tensor) -> Any:
    """The output for `token` [batch, 1], which goes on from the earlier `output`."""
    name = cache_in(output)
    return model(input_ids=token, use_cache=True, **{name: output[name]})


def cache_in(output: Any) -> str:
    """What a model's output calls its cache, and so do its inputs."""
    return "cache" if "cache" in output.keys() else "past_key_values"  # noqa: SIM118  `in output` knows, and warns of, the old name


def all_compiled(models: Iterable[Any], load: Load) -> list[Compiled]:
    """The models as `torch.compile` runs them for this load. Raises `RankwiseError` for one that cannot be run so."""
    torch.compiler.reset()  # of what was compiled for another load: it would be compiled once more, for any size
    return [Compiled(model, load) for model in models]


class Compiled:
    """A model that `torch.compile` runs, with a cache that has room for `load` and no more: nothing is allocated between
    steps, so that a GPU replays each as one graph. It is called as the model is."""

    def __init__(self, model: Any, load: Load) -> None:
        self.model, self.step = model, torch.compile(model, mode="reduce-overhead", dynamic=False)
        self.cache = StaticCache(config=model.config, max_cache_len=load.prompt + load.new_tokens)
        ids = _prompts(model, load)
        try:
            self.name = cache_in(prefill(model, ids))
            with torch.inference_mode():
                model(input_ids=ids, use_cache=True, **{self.name: self.cache})  # lays out the cache, outside of any graph
            for _ in range(3):  # compiles, records, replays
                decode(self, prefill(self, ids), 1)
        except Exception as error:  # as many ways as there are models
            raise RankwiseError(
                f"{type(model).__name__} does not run compiled, with a cache of fixed size "
                f"({reason(error)}): bench it without --compile",
            ) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **options: Any) -> Any:
        """The model's output: the prompt starts the cache anew, a step goes on with it."""
        if self.name not in options:
            self.cache.reset()
        torch.compiler.cudagraph_mark_step_begin()
        output = self.step(**options | {self.name: self.cache})
        output.logits = output.logits.clone()  # a graph's own memory is overwritten by the next
        return output


def _prompts(model: Any, load: Load) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (load.batch, load.prompt), generator=generator)
    return ids.to(model.device)


def times(models: Sequence[Any], load: Load, repeats: int) -> dict[str, list[list[float]]]:
    """Phase ("prefill", "decode") -> seconds [model][repeat]."""
    outputs: list[Any] = [None for _ in models]

    def start(index: int) -> None:
        outputs[index] = prefill(models[index], _prompts(models[index], load))

    prefills = [functools.partial(start, index) for index in range(len(models))]
    decodes = [lambda i=i: decode(models[i], outputs[i], load.new_tokens) for i in range(len(models))]
    seconds = alternating([*prefills, *decodes], repeats)
    return {"prefill": seconds[: len(models)], "decode": seconds[len(models) :]}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the model's tensors as they are stored, tied ones once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def ideal_speedup(model: nn.Module) -> dict[str, float]:
    """Dense over compressed weights that a token of prefill and one of decoding is multiplied with."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    low_rank = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    factors = {id(factor) for layer in low_rank for factor in layer.children()}
    linear = [module for module in model.modules() if _multiplies(module)]
    others = [module for module in linear if module is not head and id(module) not in factors]
    stacks = [parameter for parameter in model.parameters() if parameter.ndim == 3]  # of experts
    same = sum(map(_numbers, others)) + sum(stack.numel() for stack in stacks)
    dense = same + sum(layer.in_features * layer.out_features for layer in low_rank) + _numbers_gone(model)
    compressed = same + sum(_numbers(factor) for layer in low_rank for factor in layer.children())
    last = _numbers(head) if head is not None and _multiplies(head) else 0
    return {"prefill": dense / compressed, "decode": (dense + last) / (compressed + last)}


def _numbers_gone(model: Any) -> int:
    """Of the original's matrices, with neurons that the model no longer has."""
    sizes = quantization_of(model.config).get("sizes", {})
    if not sizes:
        return 0
    original = skeleton(model.config)
    unstack_experts(original)
    return sum(weight_of(original.get_submodule(name)).numel() - math.prod(sides) for name, (*sides, _) in sizes.items())


def _multiplies(module: nn.Module) -> bool:
    return holds_matrix(module) or isinstance(module, QuantisedLinear)


def _numbers(module: Any) -> int:
    """Of the module's matrix, whatever they are written in."""
    return module.in_features * module.out_features if isinstance(module, QuantisedLinear) else weight_of(module).numel()


def print_peaks(path: str, loads: list[list[int]], threads: int, dtype: str, device: str) -> None:
    """Run the model on each of the rising loads and print the process's peak memory after each as JSON."""
    torch.set_num_threads(threads)
    model = optimize(load_model(path, load_config(path), dtype, device))
    peaks = []
    for load in (Load(*numbers) for numbers in loads):
        decode(model, prefill(model, _prompts(model, load)), load.new_tokens)
        peaks.append(peak_memory())
    print(json.dumps(peaks))


def peaks_alone(path: str | Path, loads: Sequence[Load], threads: int, dtype: str, device: str) -> list[dict[str, int]]:
    """Bytes by kind ("host", "gpu") for each of the rising loads, of a fresh process that runs nothing else."""
    task = {"path": str(path), "loads": [astuple(load) for load in loads], "threads": threads, "dtype": dtype, "device": device}
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(task)], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]
        raise RankwiseError(f"the process that was to run {path} alone failed: {reason}")
    peaks: list[dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return peaks
