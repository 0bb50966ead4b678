"""The page: its figures are the report's, it needs nothing but itself, and what an older folder lacks is left out."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise import compress
from rankwise.evaluation.costs import costs_of_each, first_tokens
from rankwise.evaluation.samples import sample_texts
from rankwise.evaluation.spectra import thinned_spectra
from rankwise.masks.descent import Descent
from rankwise.masks.layers import hard_mask
from rankwise.masks.values import train_values
from rankwise.reporting.grid import places, short_names
from rankwise.reporting.numbers import FORMATS
from rankwise.reporting.view import grid
from rankwise.testing.allocators import tiny_student

pytestmark = pytest.mark.page
Run = Callable[..., Any]
SECTIONS = [
    "Where the ranks went",
    "What each matrix paid",
    "Spectra",
    "How the ranks were found",
    "How they write",
    "Make it again",
]
UNITS = {"%": 0.01, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "s": 1, "min": 60, "h": 3600}


class Page(HTMLParser):
    """The marked figures (path, value, text), the cells of heat maps (matrix -> text), the addresses, scripts and all text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.figures: list[tuple[str, float, str]] = []
        self.cells: dict[str, str] = {}
        self.addresses: list[str] = []
        self.text = self.script = ""
        self._open: list[dict[str, str]] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.data = json.loads(self.script)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.addresses += [value for name, value in given.items() if name in ("src", "href", "xlink:href", "action", "data")]
        if tag not in ("meta", "link", "col"):
            self._open.append(given)

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else {}
        if inside.get("id") == "data":
            self.script += data
        elif "data-path" in inside:
            self.figures.append((inside["data-path"], float(inside["data-value"]), data))
        elif "data-matrix" in inside:
            self.cells[inside["data-matrix"]] = data
        self.text += data


def at(data: Any, path: str) -> float:
    """The value at a path."""
    for key in path.split("/")[1:]:
        data = data[int(key)] if isinstance(data, list) else data[key.replace("~1", "/").replace("~0", "~")]
    return float(data)


def assert_same(text: str, value: float) -> None:
    """The text is the value, but for the digits that it leaves out."""
    number, unit = re.fullmatch(r"([−\d.,e+-]+)\s*(%|[a-zA-Z]+)?", text.strip().removesuffix("×").replace("−", "-")).groups()  # type: ignore[union-attr]
    digits = number.replace(",", "").split("e")[0].partition(".")[2]
    exponent = int(number.partition("e")[2] or 0)
    step = 10.0 ** (exponent - len(digits)) * (1 if digits or exponent else 10 ** (len(number.replace(",", "")) > 4))
    scale = UNITS[unit] if unit else 1
    assert abs(float(number.replace(",", "")) * scale - value) <= 0.51 * step * scale, (text, value)


@pytest.fixture(scope="module")
def folder(llama: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of the default allocation, with its page."""
    output = tmp_path_factory.mktemp("report") / "small"
    options: dict[str, Any] = {"samples": 12, "length": 32, "options": {"rounds": 1, "value_steps": 2}}
    compress(llama, 0.3, calibration=story, output=output, **options)
    return output


@pytest.fixture(scope="module")
def old_folder(folder: Path) -> Path:
    """The same as version 0.1.0 would have written it first."""
    old = shutil.copytree(folder, folder.with_name("old"))
    report = json.loads((old / "report.json").read_text())
    for name in ("shapes", "costs", "samples", "versions"):
        del report[name]
    (old / "report.json").write_text(json.dumps(report))
    (old / "spectra.json").unlink()
    (old / "report.html").unlink()
    return old


@pytest.fixture(scope="module")
def contest(llama: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `rankwise compare` writes."""
    from rankwise.contest import hold_contest

    output = tmp_path_factory.mktemp("contest") / "many"
    options: dict[str, Any] = {"allocations": ["uniform", "energy"], "calibration": str(story), "samples": 12, "length": 32}
    hold_contest(llama, [0.2, 0.4], [str(story)], output, judge_samples=2, **options)
    return output


def test_compress_writes_a_page_whose_figures_are_the_reports(folder: Path) -> None:
    page = Page(folder / "report.html")
    report = json.loads((folder / "report.json").read_text())
    assert page.data == {"results": [report], "evaluations": [None], "speeds": [None], "contests": [], "explored": []}
    assert len(page.figures) > 20
    for path, value, text in page.figures:
        assert value == at(page.data, path)
        assert_same(text, value)
    shown = {path.removeprefix("/results/0/") for path, *_ in page.figures}
    assert shown >= {"perplexity", "kl", "agreement", "achieved_rate/linear", "bytes/model/compressed", "costs/tokens"}
    for name, rank in report["ranks"].items():
        left, whole = (math.prod(report.get(of, {}).get(name, report["shapes"][name])) for of in ("narrowed", "shapes"))
        dense = "dense" if left == whole else f"{100 * left / whole:.0f} %"
        assert page.cells[name] == (dense if rank is None else str(rank))
    assert page.cells.keys() == report["ranks"].keys()
    for section in SECTIONS:
        assert section in page.text
    for sample in report["samples"]:
        assert sample["prompt"] in page.text
    bytes_ = report["bytes"]["model"]
    assert f"{bytes_['reference'] / bytes_['compressed']:.2f}×" in page.text


def test_a_page_of_few_bits_counts_bytes(llama: Path, story: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"calibration": str(story), "samples": 12, "length": 32, "bits": 4}
    report = compress(llama, output=tmp_path / "small", **asked).report
    page = Page(tmp_path / "small" / "report.html")
    assert set(page.cells.values()) == {"4 bits"}
    assert report["costs"]["kl"]["model.embed_tokens"] > 0
    size = report["bytes"]["model"]
    assert f"{100 * (1 - size['compressed'] / size['reference']):.1f}\u202f% smaller" in page.text
    assert "in 4 bits" in page.text
    assert "low-rank" not in page.text
    assert "Where the bits went" in page.text


def test_the_page_asks_for_nothing(folder: Path) -> None:
    page = Page(folder / "report.html")
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    html = (folder / "report.html").read_text()
    assert set(re.findall(r"https?://[^\"'<\s]+", html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "default-src 'none'" in html
    identities = re.findall(r' id="([^"]+)"', html)
    assert len(identities) == len(set(identities))
    assert len(html) < 500_000


def test_what_models_write_is_text(folder: Path, rankwise: Run, tmp_path: Path) -> None:
    """A text that looks like markup is shown, not run, and does not end the embedded JSON."""
    evil = shutil.copytree(folder, tmp_path / "evil")
    report = json.loads((evil / "report.json").read_text())
    text = "</script><script>alert(1)</script>"
    report["samples"] = [{"prompt": text, "original": text, "compressed": text + "!", "tokens": 3, "same_tokens": 2}]
    (evil / "report.json").write_text(json.dumps(report))
    assert rankwise("report", evil, "-o", tmp_path / "page.html").code == 0
    page = Page(tmp_path / "page.html")
    assert page.data["results"][0]["samples"] == report["samples"]
    assert text in page.text
    assert "<script>alert" not in (tmp_path / "page.html").read_text()


def test_an_older_folder_has_fewer_sections(old_folder: Path, rankwise: Run, tmp_path: Path) -> None:
    finished = rankwise("report", old_folder, "-o", tmp_path / "page.html")
    assert finished.code == 0, finished.err
    page = Page(tmp_path / "page.html")
    there = [section in page.text for section in SECTIONS]
    assert there == [True, False, False, True, False, True]
    assert page.cells.keys() == json.loads((old_folder / "ranks.json").read_text()).keys()


def test_folders_and_a_contest_side_by_side(folder: Path, old_folder: Path, contest: Path, rankwise: Run, tmp_path: Path) -> None:
    finished = rankwise("report", folder, contest, old_folder, "-o", tmp_path / "page.html")
    assert finished.code == 0, finished.err
    page = Page(tmp_path / "page.html")
    rows = json.loads((contest / "results.json").read_text())
    assert page.data["contests"] == [rows]
    assert len(page.data["results"]) == 2
    for path, value, text in page.figures:
        assert value == at(page.data, path)
        assert_same(text, value)
    assert {f"/contests/0/{i}/kl" for i in range(len(rows))} <= {path for path, *_ in page.figures}
    assert "Quality against rate" in page.text
    identities = re.findall(r' id="([^"]+)"', (tmp_path / "page.html").read_text())
    assert len(identities) == len(set(identities))


@pytest.mark.usefixtures("no_peaks")
def test_evaluation_and_speed_are_added(
    folder: Path, llama: Path, story: Path, rankwise: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.compile", lambda model, **_: model)  # that it is said, not that it is so
    small = shutil.copytree(folder, tmp_path / "small")
    evaluate = ["evaluate", small, "--reference", llama, "--text", story, "--length", "32", "--samples", "4"]
    evaluated = rankwise(*evaluate, "--cache", tmp_path / "cache", "--add-to-report", "--json")
    assert evaluated.code == 0, evaluated.err
    timing = ["--prompt", "8", "--new-tokens", "2", "--repeats", "1", "--batches", "1"]
    timed = rankwise("bench", small, "--reference", llama, *timing, "--compile", "--add-to-report", "--json")
    assert timed.code == 0, timed.err
    page = Page(small / "report.html")
    assert page.data["evaluations"] == [json.loads(evaluated.out)]
    assert page.data["speeds"] == [json.loads(timed.out)]
    for path, value, text in page.figures:
        assert value == at(page.data, path)
        assert_same(text, value)
    name = str(story).replace("/", "~1")
    shown = {path for path, *_ in page.figures}
    assert shown >= {
        f"/evaluations/0/texts/{name}/kl",
        f"/evaluations/0/texts/{name}/intervals/kl/1",
        "/speeds/0/speed/1/speedup",
    }
    assert "Faster, measured" in page.text
    assert ", compiled)" in page.text


def test_nothing_is_added_to_what_has_no_report(llama: Path, contest: Path, rankwise: Run) -> None:
    for folder in (llama, contest):
        for command in ("evaluate", "bench"):
            finished = rankwise(command, folder, "--reference", llama, "--add-to-report")
            assert finished.code == 2
            assert finished.err.count("\n") == 1
            assert str(folder) in finished.err


def test_a_single_result_is_compared_with_nothing(folder: Path) -> None:
    assert "Quality against rate" not in Page(folder / "report.html").text


def test_the_command_makes_it_again(folder: Path, rankwise: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    page = (folder / "report.html").read_text()
    command = shlex.split(html.unescape(re.search(r"<pre[^>]*>(.*?)</pre>", page)[1]))  # type: ignore[index]
    monkeypatch.chdir(tmp_path)
    finished = rankwise(*command[1:])
    assert finished.code == 0, finished.err
    assert (tmp_path / "small" / "ranks.json").read_bytes() == (folder / "ranks.json").read_bytes()
    weights = "model.safetensors"
    assert (tmp_path / "small" / weights).read_bytes() == (folder / weights).read_bytes()
    again, before = (yaml.safe_load((f / "recipe.yaml").read_text()) for f in (tmp_path / "small", folder))
    assert again == before


def test_a_text_in_memory_has_no_command(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    windows = torch.randint(3, 60, (12, 16), generator=torch.Generator().manual_seed(0))
    result = compress(model, 0.3, calibration=windows, allocation="uniform")
    result.save(tmp_path / "small")
    page = Page(tmp_path / "small" / "report.html")
    assert "no command makes it again" in page.text
    assert result.report["samples"] == []  # no tokenizer
    assert "How they write" not in page.text


@pytest.mark.parametrize("content", [None, "[]", "{", ""])
def test_no_report(content: str | None, rankwise: Run, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    finished = rankwise("report", tmp_path, "-o", tmp_path / "page.html")
    assert finished.code == 2
    assert finished.err.startswith("error: ")
    assert str(tmp_path) in finished.err
    assert not (tmp_path / "page.html").exists()


def test_costs_are_those_of_each_matrix_alone() -> None:
    student = tiny_student("whitened")
    masks = {name: hard_mask(4, len(d.spectrum)) for name, d in student.decompositions.items()}
    dense = next(iter(masks))
    costs, tokens = costs_of_each(student, masks | {dense: None}, student.selection)
    assert costs.keys() == masks.keys() - {dense}
    assert tokens == sum(batch["input_ids"].numel() for batch in student.selection)
    for name, kl in costs.items():
        assert kl == pytest.approx(student.divergence({name: masks[name]}), rel=1e-5)
        assert kl > 0


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=4), st.integers(1, 60))
def test_first_tokens(sizes: list[tuple[int, int]], wanted: int) -> None:
    batches = [{"input_ids": torch.arange(a * b).view(a, b), "more": torch.zeros(a, b)} for a, b in sizes]
    few = first_tokens(batches, wanted)
    total = sum(batch["input_ids"].numel() for batch in few)
    everything = sum(a * b for a, b in sizes)
    assert 0 < total <= min(wanted, everything)
    longest = max(b for _, b in sizes)
    assert total == everything or total > wanted - longest
    for part, batch in zip(few, batches, strict=False):
        rows, columns = part["input_ids"].shape
        assert torch.equal(part["input_ids"], batch["input_ids"][:rows, :columns])
        assert part["more"].shape == part["input_ids"].shape


@pytest.mark.parametrize(("wanted", "rows"), [(17, [1]), (23, [1]), (24, [1, 0.5]), (33, [2])])
def test_first_tokens_end_with_half_a_sequence_or_more(wanted: int, rows: list[float]) -> None:
    batches = [{"input_ids": torch.zeros(wanted // 16, 16)}, {"input_ids": torch.zeros(4, 16)}]
    assert [batch["input_ids"].numel() / 16 for batch in first_tokens(batches, wanted)] == rows


def test_first_tokens_keeps_inputs_of_different_shapes_whole() -> None:
    batch = {"input_ids": torch.zeros(3, 8), "labels": torch.zeros(3)}
    (part,) = first_tokens([batch], 4)
    assert {name: tuple(tensor.shape) for name, tensor in part.items()} == {"input_ids": (1, 8), "labels": (1,)}


def test_samples_are_what_both_models_write(folder: Path, llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for sample in json.loads((folder / "report.json").read_text())["samples"]:
        ids = tokenizer(sample["prompt"][::2], return_tensors="pt")["input_ids"]  # it decodes with a space between tokens
        for side, path in (("original", llama), ("compressed", folder)):
            model = AutoModelForCausalLM.from_pretrained(path)
            written = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
            assert tokenizer.decode(written, skip_special_tokens=True) == sample[side]


def test_the_same_model_writes_the_same(llama: Path) -> None:
    student = tiny_student("svd")
    own = student.model.generation_config
    records = sample_texts(
        student, dict.fromkeys(student.decompositions), student.selection, AutoTokenizer.from_pretrained(llama)
    )
    assert records
    assert all(record["original"] == record["compressed"] for record in records)
    assert all(record["same_tokens"] == record["tokens"] for record in records)
    assert student.model.generation_config is own


def test_a_model_that_cannot_generate_costs_the_samples_only(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_student("svd")

    def broken(*_: Any, **__: Any) -> Iterator[None]:
        raise NotImplementedError("no cache of this kind")

    monkeypatch.setattr(student.model, "generate", broken)
    masks = dict.fromkeys(student.decompositions)
    assert sample_texts(student, masks, student.selection, AutoTokenizer.from_pretrained(llama)) == []


def test_thinned_spectra_have_the_cut() -> None:
    student = tiny_student("svd")
    masks = {name: hard_mask(5, len(d.spectrum)) for name, d in student.decompositions.items()}
    name = next(iter(masks))
    masks[name] = masks[name].flip(0)
    for matrix, spectrum in thinned_spectra(student.decompositions, masks).items():
        values = student.decompositions[matrix].spectrum
        assert len(spectrum["points"]) <= 49
        assert [5, pytest.approx(values[4].item(), rel=1e-3)] in spectrum["points"]
        assert spectrum["beyond"] == (5 if matrix == name else 0)
        assert [spectrum["points"][0][0], spectrum["points"][-1][0]] == [1, len(values)]


def test_losses_of_value_training_are_told() -> None:
    student = tiny_student("svd")
    masks = {name: hard_mask(4, len(d.spectrum)) for name, d in student.decompositions.items()}
    losses: list[float] = []
    train_values(student, masks, Descent(steps=30), losses)
    assert len(losses) == 30
    assert sum(losses[-10:]) < sum(losses[:10])  # ten batches: the same text at the end as at the start


def test_places() -> None:
    names = ["model.layers.1.mlp.experts.down_matrices.3", "model.layers.1.self_attn.q_proj", "lm_head"]
    assert [tuple(place) for place in places(names).values()] == [
        ("1", "mlp.experts.down_matrices"),
        ("1", "self_attn.q_proj"),
        ("", "lm_head"),
    ]
    both = places(["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.1.EncDecAttention.q"])
    assert [place.layer for place in both.values()] == ["encoder 0", "decoder 0"]
    assert short_names(["self_attn.q_proj", "mlp.up_proj"]) == {"self_attn.q_proj": "q", "mlp.up_proj": "up"}
    assert len(set(short_names(["a.q", "b.q"]).values())) == 2
    gpt2 = short_names(["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
    assert list(gpt2.values()) == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    bert = short_names(["attention.output.dense", "output.dense", "intermediate.dense"])
    assert len(set(bert.values())) == 3  # the second is the first's ending, whole


def test_experts_share_a_cell() -> None:
    ranks = {f"layers.0.mlp.experts.up_matrices.{e}": rank for e, rank in enumerate((3, None, 7))} | {"layers.1.mlp.up_proj": 2}
    heat = grid(ranks, {n: 1.0 if r is None else r / 10 for n, r in ranks.items()}, dict.fromkeys(ranks, ""))
    (_, (experts, nothing)), (_, (no_experts, single)) = heat["rows"]
    assert (experts["text"], experts["dense"], nothing, no_experts, single["text"]) == ("3–7", False, None, None, "2")
    assert experts["share"] == pytest.approx(2 / 3)


@given(st.floats(1e-6, 1e12) | st.just(0.0), st.integers(0, 10**12 - 10**10))
def test_figures_keep_their_digits(value: float, count: int) -> None:
    assert_same(FORMATS["brief"](value), value)
    assert_same(FORMATS["significant"](value), value)
    assert_same(FORMATS["integer"](count), count)
    assert_same(FORMATS["size"](count), count)


@pytest.mark.parametrize(
    ("style", "value", "text"),
    [
        ("percent", 0.1968, "19.7 %"),
        ("percent", 0.9995, "99.95 %"),
        ("signed", -0.012, "−1.2 %"),
        ("duration", 71.3, "71.3 s"),
        ("duration", 7300, "2.0 h"),
        ("size", 3_745_792, "3.75 MB"),
        ("brief", 0.18, "0.180"),
        ("significant", 12345.6, "12,346"),
    ],
)
def test_formats(style: str, value: float, text: str) -> None:
    assert FORMATS[style](value).replace("\u202f", " ") == text
