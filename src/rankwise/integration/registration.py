"""Register the quantizer with transformers as soon as transformers is imported, and no sooner.

transformers knows the quantization methods that were registered before `from_pretrained` is called, and has no entry points for
them. Importing it takes seconds; so `import rankwise` only leaves a note for the import system.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence

REGISTRY = "transformers.quantizers.auto"


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the registry's module as everybody else does, and has it run our registration after its own code."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: types.ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from rankwise.integration import quantizer  # noqa: F401  importing it is the registration


def register_when_imported() -> None:
    """Register now where transformers' registry is already loaded, else when it will be."""
    if REGISTRY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())
