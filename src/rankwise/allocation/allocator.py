"""What an allocator is given, what it gives back, and the list of those there are.

A new allocator is one file and one line in `ALLOCATORS`; the command line and the documentation find it there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from rankwise.allocation.ara import ARA
from rankwise.allocation.ars import ARS
from rankwise.allocation.dobi import Dobi
from rankwise.allocation.effective_rank import EffectiveRank
from rankwise.allocation.energy import Energy
from rankwise.allocation.error_bound import ErrorBound, UniformError
from rankwise.allocation.evolutionary import Evolutionary
from rankwise.allocation.given import Given, GivenByLLRC
from rankwise.allocation.heavy_tail import HeavyTail
from rankwise.allocation.kl_knapsack import KLKnapsack
from rankwise.allocation.llrc import LLRC, LLRCQuick
from rankwise.allocation.llrc_paper import LLRCPaper
from rankwise.allocation.mask_fisher import MaskFisher
from rankwise.allocation.mixed import Mixed
from rankwise.allocation.problem import Allocation, Problem
from rankwise.allocation.rocket import Rocket
from rankwise.allocation.strs import STRS
from rankwise.allocation.uniform import Uniform
from rankwise.allocation.zero_sum import ZeroSum
from rankwise.errors import RankwiseError
from rankwise.options import made_of, pairs


class Allocator(Protocol):
    """A frozen dataclass whose fields are the method's options. It is made once, then asked once per budget."""

    decomposition: ClassVar[str]  # the metric used where the user names none

    def allocate(self, problem: Problem) -> Allocation:
        """One rank, or dense, for every matrix, within the budget; deterministic by the problem's seed."""
        ...


ALLOCATORS: dict[str, dict[str, type[Allocator]]] = {  # name -> preset -> class
    "uniform": {"default": Uniform},
    "llrc": {"default": LLRC, "quick": LLRCQuick, "paper": LLRCPaper},
    "ars": {"default": ARS},
    "ara": {"default": ARA},
    "dobi": {"default": Dobi},
    "effective-rank": {"default": EffectiveRank},
    "heavy-tail": {"default": HeavyTail},
    "energy": {"default": Energy},
    "error-bound": {"default": ErrorBound, "uniform-error": UniformError},
    "knapsack": {"default": Rocket},
    "strs": {"default": STRS},
    "zero-sum": {"default": ZeroSum},
    "mask-fisher": {"default": MaskFisher},
    "kl-knapsack": {"default": KLKnapsack},
    "evolutionary": {"default": Evolutionary},
}
OF_BYTES: dict[str, dict[str, type[Allocator]]] = {"mixed": {"default": Mixed}}  # bits too: they stand beside no others

PAPERS = {  # what the papers call them
    "svd-llm": "uniform",
    "asvd": "strs",
    "d-rank": "effective-rank",
    "welore": "heavy-tail",
    "l-greco": "error-bound",
    "rocket": "knapsack",
    "zs-svd": "zero-sum",
    "lems": "kl-knapsack",
    "evopress": "evolutionary",
    "dobi-svd": "dobi",
}

FORWARD_ONLY = (Uniform, EffectiveRank, HeavyTail, Energy, ErrorBound, UniformError, Rocket, KLKnapsack, Mixed, STRS, Given)
"""Those that ask the student for no more than weights, factors, spectra and `divergence`."""
DIFFERENTIATING = (MaskFisher, ZeroSum, LLRC, GivenByLLRC)
"""Those that ask it for gradients too, as far as it can give them with its model on disk."""


def spelled(method: str) -> tuple[str, str, dict[str, Any]]:
    """The name, the preset and the options of a method that is written NAME[:PRESET] [KEY=VALUE ...], where the name may be a
    paper's. Raises `RankwiseError` for what is written in another way; whether they exist, `allocator_named` knows."""
    full_name, *options = method.split() or [""]
    name, _, preset = full_name.partition(":")
    return PAPERS.get(name.lower(), name), preset or "default", pairs(options)


def spelling(name: str, preset: str = "default", options: Mapping[str, Any] | None = None) -> str:
    """The text from which `spelled` reads these again; a list or None has no spelling that an option takes."""
    full_name = name if preset == "default" else f"{name}:{preset}"
    return " ".join([full_name, *(f"{key}={value}" for key, value in (options or {}).items())])


def known_as(allocator: Allocator) -> tuple[str, str, dict[str, Any]]:
    """The name, the preset and the options that make this allocator again; of a class that is not in `ALLOCATORS`, its name."""
    for name, presets in (ALLOCATORS | OF_BYTES).items():
        for preset, cls in presets.items():
            if type(allocator) is cls:
                fields = dataclasses.fields(cls)  # type: ignore[arg-type]
                values = {field.name: getattr(allocator, field.name) for field in fields}
                return name, preset, {field.name: values[field.name] for field in fields if values[field.name] != field.default}
    return type(allocator).__name__, "default", {}


def is_known(method: str) -> bool:
    """Whether there is an allocator of the name in a method's spelling."""
    return spelled(method)[0] in ALLOCATORS | OF_BYTES


def allocator_named(name: str, preset: str, options: Mapping[str, Any]) -> Allocator:
    """The allocator `name` in `preset`, with `options` over its defaults.

    Raises `RankwiseError` for a name, a preset or an option that there is not, and for a value of the wrong type.
    """
    if name not in ALLOCATORS | OF_BYTES:
        raise RankwiseError(
            f"unknown allocation {name!r}; there are {', '.join(ALLOCATORS)}; "
            f"papers' names: {', '.join(PAPERS)}; if it is a class of your own, give its object beside the recipe"
        )
    presets = (ALLOCATORS | OF_BYTES)[name]
    if preset not in presets:
        raise RankwiseError(f"allocation {name!r} has no preset {preset!r}; it has {', '.join(presets)}")
    return made_of(presets[preset], options, f"{name} ({preset})")
