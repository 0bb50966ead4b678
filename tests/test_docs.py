"""The documentation builds without a broken link; its blocks marked `<!-- runs -->` run, on the bundled model and little text."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from transformers import AutoModelForCausalLM

import rankwise
from rankwise import bundled, compress
from rankwise.allocation.allocator import ALLOCATORS
from rankwise.allocation.llrc import LLRC
from rankwise.decomposition.metric import METRICS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "docs/api.md", *(f"docs/guide/{p.name}" for p in sorted((ROOT / "docs" / "guide").glob("*.md")))]
BLOCK = re.compile(r"<!-- runs -->\n```(\w*)\n(.*?)```", re.DOTALL)
NOT_RUN = ("pip install",)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [text[:800] for text in bundled.standard_library("held-out") if len(text) > 800][:16]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class QuickLLRC(LLRC):
    """The default in seconds."""

    points: int = 0
    rounds: int = 1
    value_steps: int = 2


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch, documents: list[str]) -> None:
    """16 windows of 64 tokens wherever nothing else is asked for, and the default in its shortest form."""
    monkeypatch.setitem(ALLOCATORS["llrc"], "default", QuickLLRC)
    monkeypatch.setattr("rankwise.calibration.tokens.text_of", lambda *_: 0)
    monkeypatch.setattr("rankwise.calibration.tokens.MAX_LENGTH", 64)
    monkeypatch.setattr("rankwise.bundled.standard_library", lambda split: documents)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two blocks of the bundled model."""
    folder = Path(shutil.copytree(bundled.MODEL, tmp_path_factory.mktemp("docs") / "MODEL"))
    AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(model: Path, documents: list[str]) -> Path:
    folder = model.with_name("small")
    compress(model, rate=0.1, calibration=documents, allocation="uniform", samples=16, length=64, output=folder)
    return folder


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, little: None, no_peaks: None, model: Path, documents: list[str]
) -> Path:
    """A folder with the files that the documentation names."""
    shutil.copytree(model, tmp_path / "MODEL")
    (tmp_path / "my_text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (tmp_path / "tasks").mkdir()
    task = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/guide/evaluate.md").read_text(), re.DOTALL)
    assert task
    (tmp_path / "tasks" / "my_task.yaml").write_text(task[1])
    rows = [{"ctx": f"x{i} =", "choices": ["1", "import"], "gold": 0} for i in range(4)]
    (tmp_path / "tasks" / "my_task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str, place: Path, small: Path, rankwise: Callable[..., Any]) -> None:
    blocks = BLOCK.findall((ROOT / page).read_text())
    assert blocks
    if "--output small\n" not in blocks[0][1]:
        shutil.copytree(small, place / "small")
    namespace: dict[str, Any] = {"__name__": "page"}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, page, "exec", dont_inherit=True), namespace)
            continue
        for line in (line for line in block.splitlines() if not line.startswith(NOT_RUN)):
            command, *arguments = shlex.split(line)
            assert command == "rankwise", line
            finished = rankwise(*arguments)
            assert finished.code == 0, f"{line}\n{finished.err}"


def test_every_public_name_has_an_example() -> None:
    examples = "".join(block for _, block in BLOCK.findall((ROOT / "docs" / "api.md").read_text()))
    assert not [name for name in rankwise.__all__ if f"rankwise.{name}" not in examples]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built as `make docs` does, but for starting a process."""
    folder = tmp_path_factory.mktemp("site")
    with contextlib.chdir(ROOT):
        build(load_config("mkdocs.yml", site_dir=str(folder)))
    return folder


def test_every_method_has_a_page(site: Path) -> None:
    for name, presets in ALLOCATORS.items():
        for preset, cls in presets.items():
            page = (site / "methods" / "allocation" / f"{name}{'' if preset == 'default' else '-' + preset}.html").read_text()
            assert all(f"<code>{option}</code>" in page for option in (field.name for field in dataclasses.fields(cls)))
            assert "When." in page
    assert {p.stem for p in (site / "methods" / "decomposition").glob("*.html")} == METRICS.keys()


def test_the_pages_know_the_names_they_use(site: Path) -> None:
    """Commands and options in the guide are those of the command line."""
    known = set(re.findall(r"--[a-z][a-z-]+", (site / "cli.html").read_text())) | {"--json"}
    for page in PAGES:
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / page).read_text()))
        assert used <= known, page


IN_BITS = {"nearest": 1, "gptq": 2, "llm-compressor GPTQ": 3, "HQQ": 4, "alike": 5, "mixed": 6}  # the column of each way


def test_the_first_pages_bits_are_those_that_were_measured() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "bytes.json").read_text())["SmolLM2-135M-Instruct"]
    section = (ROOT / "README.md").read_text().partition("For size, bits are what counts")[2].partition("Judged on")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[2:3].isdigit()]
    assert [line[0] for line in lines] == ["4.25", "3.25", "2.75", "2.5", "2.25"]
    told = 0
    for line in lines:
        for way, column in IN_BITS.items():
            if not line[column]:
                continue
            kl, other, size = re.fullmatch(r"\**([\d.]+)\** \(([\d.]+)\)(?:, in ([\d.]+))?", line[column]).groups()  # type: ignore[union-attr]
            (row,) = (row for row in rows if row["way"] == way and abs(row["bits"] - float(size or line[0])) < 0.01)
            for text, figure in (("WikiText-2", kl), ("C4", other)):
                digits = len(figure.partition(".")[2])
                assert round(row["texts"][text]["kl"], digits) == float(figure), (way, line[0], text)
                told += 1
    assert told == 2 * 18


NARROWER = "pivoted, and MLPs with fewer neurons"
IN_THE_TABLE = [  # what each of its lines is by: form and method, and way and allocation
    *(("real_models", form, method) for form, method in (("pair", "uniform"), ("pivoted", "uniform"), ("pivoted", "zero-sum"))),
    *(("real_models", "pivoted", method) for method in ("kl-knapsack", "kl-knapsack points=3", "mask-fisher")),
    ("forms", "pairs of factors", "llrc"),
    ("forms", "pivoted", "llrc"),
    ("forms", NARROWER, "llrc:quick"),
    ("forms", NARROWER, "llrc"),
]


def test_the_first_pages_figures_are_those_that_were_measured() -> None:
    models, forms = (
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["SmolLM2-135M-Instruct"]
        for name in ("real_models", "forms")
    )
    judged: dict[tuple[Any, ...], tuple[float, float]] = {}
    for row in models["calibrated on c4, 64 windows of 256"]:
        costs = row["texts"]["WikiText-2"]
        judged["real_models", row["form"], row["method"], row["rate"]] = costs["kl"], costs["perplexity"]
    for row in forms["costs"]:
        judged["forms", row["way"], row["allocation"], row["rate"]] = row["kl"]["WikiText-2"], row["perplexity"]["WikiText-2"]
    section = (ROOT / "README.md").read_text().partition("## What it costs")[2]
    lines = [line for line in section.partition("Dense int8")[0].splitlines() if line.startswith("| ") and "(" in line]
    for made_by, line in zip(IN_THE_TABLE, lines, strict=True):
        cells = re.findall(r"([\d.]+)\*{0,2} \(([\d.]+)\)", line)
        for rate, (kl, perplexity) in zip((0.1, 0.2, 0.3, 0.4), cells, strict=True):
            measured = judged[*made_by, rate]
            assert float(kl) == pytest.approx(measured[0], abs=5.1e-4), (made_by, rate)
            assert float(perplexity) == pytest.approx(measured[1], rel=5e-3), (made_by, rate)


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    """Under the settings of our build, on a page of its own."""
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.md").write_text("# Here\n\n[there](#here)\n")
    settings = {
        "docs_dir": str(tmp_path / "pages"),
        "site_dir": str(tmp_path / "site"),
        "nav": ["index.md"],
        "plugins": [],
        "theme": "mkdocs",
    }
    build(load_config(str(ROOT / "mkdocs.yml"), **settings))
    for target in ("nowhere.md", "#nowhere", "/absolute"):
        (tmp_path / "pages" / "index.md").write_text(f"# Here\n\n[there]({target})\n")
        with pytest.raises(Abort):
            build(load_config(str(ROOT / "mkdocs.yml"), **settings))
