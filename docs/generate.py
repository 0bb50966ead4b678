"""Pages that are made of what is written elsewhere: the README, the methods' docstrings and options, the command line's help."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import io
import re
import sys
import tokenize
from pathlib import Path
from typing import Any

import mkdocs_gen_files
import typer
from typer.cli import get_docs_for_click

from rankwise.allocation.allocator import ALLOCATORS, spelling
from rankwise.cli import application
from rankwise.decomposition.metric import METRICS
from rankwise.refinement.refinement import REFINEMENTS
from rankwise.reporting.methods import WHEN
from rankwise.schema import schema

HERE = Path(__file__).parent
SECOND_FILES = {"llrc:paper": "rankwise.masks.gumbel", "ars": "rankwise.masks.hypernetwork", "ara": "rankwise.masks.staircase"}


def write(path: str, text: str) -> None:
    with mkdocs_gen_files.open(path, "w") as page:
        page.write(text)


def markdown(docstring: str) -> str:
    """A docstring as Markdown: lists set off from the line above, sources as links."""
    lines: list[str] = []
    for line in inspect.cleandoc(docstring).splitlines():
        item = re.match(r"(- |\d\. )", line)
        if item and lines and lines[-1].strip() and not re.match(r"(- |\d\. |  )", lines[-1]):
            lines.append("")
        lines.append(line)
    text = "\n".join(lines)
    text = re.sub(r"\barXiv\s+(\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    text = re.sub(r"\bopenreview (\w+)", r"[openreview \1](https://openreview.net/forum?id=\1)", text)
    text = re.sub(r"\bcode (?:github\.com/)?([\w-]+/[\w.-]*\w)", r"code [\1](https://github.com/\1)", text)
    return re.sub(r"\b(\d{4}\.naacl-long\.\d+)", r"[\1](https://aclanthology.org/\1)", text)


def first_sentence(docstring: str) -> str:
    """Up to the first full stop that is none of an abbreviation."""
    return re.split(r"(?<! al)\.(?:\s|$)", " ".join(docstring.split()), maxsplit=1)[0]


def options(cls: Any) -> str:
    """A table of the options: name, type, default, and the comment beside it in the source."""
    said: dict[str, tuple[str, str]] = {}  # of a preset that is made from another one, the other's too
    for base in [base for base in reversed(cls.__mro__) if hasattr(base, "__dataclass_fields__")]:
        source = inspect.getsource(base)
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        for line in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                said[line.target.id] = ast.unparse(line.annotation), comments.get(line.lineno, "")
    rows = []
    for field in dataclasses.fields(cls):
        kind, comment = said[field.name]
        rows.append(f"| `{field.name}` | `{kind}` | `{field.default!r}` | {comment} |")
    if not rows:
        return "None."
    return "\n".join(["| option | type | default | |", "|---|---|---|---|", *rows])


def allocation_page(name: str, preset: str, cls: Any) -> tuple[str, str]:
    """The page's title and text."""
    title = spelling(name, preset)
    module = sys.modules[cls.__module__]
    parts = [
        f"# {title}",
        f"**When.** {WHEN['allocation'][title]}",
        f"**Use.** `rankwise compress MODEL --allocation {title}`; on "
        f"[`{cls.decomposition}`](../decomposition/{cls.decomposition}.md) where no other decomposition is named.",
        "## What it does",
        markdown(module.__doc__ or ""),
        *([markdown(importlib.import_module(SECOND_FILES[title]).__doc__ or "")] if title in SECOND_FILES else []),
        "## Options",
        markdown(cls.__doc__ or ""),
        options(cls),
        f"Given as `--option NAME=VALUE`, or in Python as `allocation={cls.__name__}(...)` from `{cls.__module__}`.",
    ]
    return title, "\n\n".join(parts) + "\n"


def decomposition_page(name: str, metric: Any) -> str:
    """The page's text."""
    needs = ", ".join(f"`{n}`" for n in sorted(metric.NEEDS)) or "nothing: it sees only the weights"
    constants = {n: v for n, v in vars(metric).items() if n.isupper() and n != "NEEDS"}
    parts = [
        f"# {name}",
        f"**When.** {WHEN['decomposition'][name]}",
        f"**Use.** `rankwise compress MODEL --decomposition {name}`",
        "## What it does",
        markdown(metric.__doc__ or ""),
        f"The metric: {inspect.cleandoc(metric.roots.__doc__)}",
        f"**Statistics it needs.** {needs}.",
        *(["**Constants.** " + ", ".join(f"`{n} = {v}`" for n, v in constants.items()) + "."] if constants else []),
    ]
    return "\n\n".join(parts) + "\n"


def methods() -> None:
    index = [
        "# Methods",
        "A method is an *allocation*, which chooses ranks, on a *decomposition*, which makes factors whose first components are "
        "the best. Any goes with any. These pages are made of docstrings, in `rankwise.allocation` and `rankwise.decomposition`; "
        "[`rankwise compare`](../guide/choose.md) measures all of them on your model.",
        "## Allocations",
    ]
    table = ["| allocation | what it is | when |", "|---|---|---|"]
    for name, presets in ALLOCATORS.items():
        for preset, cls in presets.items():
            title, text = allocation_page(name, preset, cls)
            file = f"allocation/{title.replace(':', '-')}.md"
            write(f"methods/{file}", text)
            what = markdown(first_sentence(sys.modules[cls.__module__].__doc__ or ""))
            table.append(f"| [{title}]({file}) | {what} | {WHEN['allocation'][title]} |")
    index += ["\n".join(table), "## Decompositions"]
    table = ["| decomposition | what it is | when |", "|---|---|---|"]
    for name, metric in METRICS.items():
        write(f"methods/decomposition/{name}.md", decomposition_page(name, metric))
        what = markdown(first_sentence(metric.__doc__ or ""))
        table.append(f"| [{name}](decomposition/{name}.md) | {what} | {WHEN['decomposition'][name]} |")
    index += ["\n".join(table), "## Refinements"]
    table = ["| refinement | what it is | when |", "|---|---|---|"]
    for name, refinement in REFINEMENTS.items():
        what = markdown(first_sentence(sys.modules[refinement.__module__].__doc__ or ""))
        table.append(f"| [{name}](../guide/refine.md) | {what} | {WHEN['refinement'][name]} |")
    write("methods/index.md", "\n\n".join([*index, "\n".join(table)]) + "\n")


def copies() -> None:
    """The repository's own pages, links from its root made to fit."""
    for source, page in (("README.md", "index.md"), ("CONTRIBUTING.md", "contributing.md"), ("CHANGELOG.md", "changelog.md")):
        text = (HERE.parent / source).read_text()
        text = text.replace("](docs/", "](").replace("](CONTRIBUTING.md)", "](contributing.md)")
        write(page, text)
        mkdocs_gen_files.set_edit_path(page, f"../{source}")


def command_line() -> None:
    context = typer.Context(typer.main.get_command(application()))
    write("cli.md", get_docs_for_click(obj=context.command, ctx=context, name="rankwise", title="Command line"))


def report() -> None:
    """The fields of a report: what `python -m rankwise.schema` prints, to read."""
    found = schema()
    rows = [f"| `{name}` | {field['description']} |" for name, field in found["properties"].items()]
    head = ["| field | what it is |", "|---|---|"]
    costs = [f"| `{name}` | {field['description']} |" for name, field in found["$defs"]["Costs"]["properties"].items()]
    parts = ["# Report", found["description"], "\n".join([*head, *rows])]
    parts += ["## Costs", "The fields of `before_refinement`.", "\n".join([*head, *costs])]
    write("report.md", "\n\n".join(parts) + "\n")


methods()
report()
copies()
command_line()
