"""The command that makes a result once more."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from rankwise import bundled
from rankwise.allocation.allocator import is_known, spelling
from rankwise.options import flag
from rankwise.recipe import IN_MEMORY, Recipe


def command_of(base_model: str, recipe: Mapping[str, Any], output: str) -> str | None:
    """The `rankwise compress` line of a recipe, or None where the text or the method is no option."""
    words = ["rankwise", "compress", *([] if base_model == bundled.NAME else [base_model])]
    if recipe["calibration"] == IN_MEMORY or not (recipe.get("ranks") or is_known(recipe["allocation"])):
        return None
    if recipe.get("ranks"):  # too many for a line
        return shlex.join([*words, "--recipe", output, "--output", f"{output}-again"])
    options = recipe.get("options", {})
    if not all(isinstance(value, int | float | str) for value in options.values()):  # what no word says
        return None
    method = spelling(recipe["allocation"], recipe.get("preset", "default"), options)
    recipe = {**recipe, "allocation": method, "preset": "default", "options": {}}
    always = "calibration", "allocation"  # which allocation is usual depends on the effort
    for name, field in Recipe.model_fields.items():
        value = recipe.get(name, field.default)
        if isinstance(field.default, dict | tuple):
            items = [f"{key}={item}" for key, item in value.items()] if isinstance(value, Mapping) else value
            words += [word for item in items for word in (flag(name), str(item))]
        elif value != field.default or name in always:
            words += [flag(name), str(value)]
    return shlex.join([*words, "--output", output])
