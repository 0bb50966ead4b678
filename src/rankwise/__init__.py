"""rankwise: low-rank compression of Hugging Face language models, the rank of every matrix learned by gradient.

Importing it teaches transformers to load compressed folders, and loads neither torch nor transformers itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankwise.errors import RankwiseError as RankwiseError
from rankwise.integration.registration import register_when_imported

if TYPE_CHECKING:
    from rankwise.decomposing import decompose as decompose
    from rankwise.evaluation.evaluate import evaluate as evaluate
    from rankwise.exploring import explore as explore
    from rankwise.integration.densify import densify as densify
    from rankwise.integration.peft import lora_targets as lora_targets
    from rankwise.integration.quantizer import RankwiseConfig as RankwiseConfig
    from rankwise.pipeline import Compressed as Compressed
    from rankwise.pipeline import compress as compress
    from rankwise.pipeline import plan as plan
    from rankwise.plans import Plan as Plan
    from rankwise.recipe import Recipe as Recipe
    from rankwise.refining import refine as refine
    from rankwise.reporting.inspect import inspect as inspect
    from rankwise.reporting.page import report as report
    from rankwise.runtime.bench import bench as bench
    from rankwise.runtime.optimize import optimize as optimize
    from rankwise.runtime.pack import pack as pack
    from rankwise.schema import Report as Report

__version__ = "0.1.0"
__all__ = [
    "Compressed",
    "Plan",
    "RankwiseConfig",
    "RankwiseError",
    "Recipe",
    "Report",
    "bench",
    "compress",
    "decompose",
    "densify",
    "evaluate",
    "explore",
    "inspect",
    "lora_targets",
    "optimize",
    "pack",
    "plan",
    "refine",
    "report",
]

_HOMES = {
    "bench": "rankwise.runtime.bench",
    "compress": "rankwise.pipeline",
    "Compressed": "rankwise.pipeline",
    "plan": "rankwise.pipeline",
    "refine": "rankwise.refining",
    "report": "rankwise.reporting.page",
    "Plan": "rankwise.plans",
    "Recipe": "rankwise.recipe",
    "Report": "rankwise.schema",
    "RankwiseConfig": "rankwise.integration.quantizer",
    "decompose": "rankwise.decomposing",
    "densify": "rankwise.integration.densify",
    "evaluate": "rankwise.evaluation.evaluate",
    "explore": "rankwise.exploring",
    "inspect": "rankwise.reporting.inspect",
    "lora_targets": "rankwise.integration.peft",
    "optimize": "rankwise.runtime.optimize",
    "pack": "rankwise.runtime.pack",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


register_when_imported()
