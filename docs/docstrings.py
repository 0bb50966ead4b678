"""Our docstrings explain arguments in lines of `name: meaning`, not in sections: as Markdown, each is an item of a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*): (.*)$")


def as_list(text: str) -> str:
    """The text with every run of argument lines as a list."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        found = ARGUMENT.match(line)
        if found and (inside or not lines or lines[-1] == ""):
            line = f"- `{found[1]}`: {found[2]}"
            inside = True
        elif inside and line and not line.startswith(" "):
            lines.append("")
            inside = False
        elif not line:
            inside = False
        lines.append(line)
    return "\n".join(lines)


class ArgumentLists(griffe.Extension):
    """Rewrites every docstring before it is rendered."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Called for every object that has been read."""
        if obj.docstring is not None:
            obj.docstring.value = as_list(obj.docstring.value)
