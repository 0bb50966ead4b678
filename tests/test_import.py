"""Importing rankwise costs nothing, and teaches transformers to load compressed folders whichever comes first."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REGISTERED = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; assert 'rankwise' in known"
HEAVY = "import sys; assert not {'torch', 'transformers', 'numpy', 'scipy', 'datasets'} & set(sys.modules)"


SOURCE = Path(__file__).resolve().parents[1] / "src" / "rankwise"
ORDER = [  # of the packages: the way of the data
    "layers",
    "bundled",
    "calibration",
    "decomposition",
    "masks",
    "allocation",
    "integration",
    "refinement",
    "runtime",
    "evaluation",
    "streaming",
    "reporting",
    "testing",
    "cli",
]


def imported(file: Path) -> Iterator[str]:
    """What of rankwise a file imports at module level, by first names; what is there for types alone is not among it."""
    for statement in ast.parse(file.read_text()).body:
        if isinstance(statement, ast.ImportFrom):
            names = [f"{statement.module}.{alias.name}" for alias in statement.names]
        else:
            names = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
        yield from (name.split(".")[1] for name in names if name.startswith("rankwise."))


def test_a_package_imports_only_from_those_before_it() -> None:
    """No way leads back, not by a module outside of packages either."""
    packages = {file.parent.name for file in SOURCE.glob("*/__init__.py")}
    assert sorted(ORDER) == sorted(packages)
    later: dict[str, set[str]] = {}
    for number, package in enumerate(ORDER):
        files, seen = [*(SOURCE / package).rglob("*.py")], set[str]()
        while files:
            new = {*imported(files.pop())} - seen
            files += [SOURCE / f"{name}.py" for name in new - packages if (SOURCE / f"{name}.py").exists()]
            seen |= new
        if back := seen & set(ORDER[number + 1 :]):
            later[package] = back
    assert later == {}


@pytest.mark.parametrize(
    "script",
    [
        f"import rankwise; {HEAVY}",
        f"import rankwise; assert rankwise.__version__; rankwise.RankwiseError; dir(rankwise); {HEAVY}",
    ],
)
def test_import_is_light(script: str) -> None:
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (0, ""), process.stderr


EACH_IN_A_FORK = """
import os, sys, torch, torch.distributed.tensor, torchao, huggingface_hub.hf_api, jinja2, PIL.Image, yaml
# most of what transformers takes seconds to import
assert "transformers" not in sys.modules
for script in sys.argv[1:]:
    if not os.fork():
        exec(script, {})
        break
    assert os.wait()[1] == 0, script
"""


OWN_SETTINGS = """
import logging, os
from transformers.utils import logging as theirs
for name in ("torchao", "transformers"):
    logging.getLogger(name).setLevel(logging.INFO)
theirs.enable_progress_bar()
import rankwise, rankwise.cli
rankwise.compress(os.environ["MODEL"], 0.3, calibration=os.environ["TEXT"], samples=6, length=16, allocation="uniform")
assert [logging.getLogger(name).level for name in ("torchao", "transformers")] == [logging.INFO] * 2
assert theirs.is_progress_bar_enabled()
"""
ORDERS = [
    f"import transformers; import rankwise; {REGISTERED}",
    f"import rankwise.cli; from importlib.util import find_spec; find_spec('transformers.quantizers.auto'); {REGISTERED}",
]
MORE_ORDERS = [
    f"import transformers.quantizers.auto; import rankwise; {REGISTERED}",
    f"import rankwise, importlib; importlib.reload(rankwise); {REGISTERED}; importlib.reload(rankwise)",
    f"import rankwise; {REGISTERED}",
    f"import rankwise, sys; del sys.modules['rankwise']; import rankwise; {REGISTERED}",
    f"import rankwise.cli; {REGISTERED}; import rankwise.integration.quantizer",
    f"import rankwise; from importlib.util import find_spec; find_spec('transformers.quantizers.auto'); {REGISTERED}",
]


@pytest.mark.parametrize("scripts", [ORDERS, pytest.param(MORE_ORDERS, marks=pytest.mark.slow)], ids=["few", "more"])
def test_whichever_comes_first_and_whatever_is_set_before(scripts: list[str], llama: Path, story: Path) -> None:
    """A library user's own settings are left alone, too."""
    ours = "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"MODEL": str(llama), "TEXT": str(story)}
    process = subprocess.run(
        [sys.executable, "-c", EACH_IN_A_FORK, *scripts, OWN_SETTINGS],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stdout) == (0, ""), process.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], []])
def test_help_is_light(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "rankwise", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Usage" in process.stdout
    modules = {line.split("|")[-1].strip() for line in process.stderr.splitlines() if line.startswith("import time:")}
    assert "typer" in modules
    assert not {"torch", "transformers", "numpy"} & modules


def test_an_unknown_name_is_an_attribute_error() -> None:
    import rankwise

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = rankwise.nonsense
    assert all(getattr(rankwise, name) for name in rankwise.__all__)
    assert set(rankwise.__all__) <= set(dir(rankwise))
