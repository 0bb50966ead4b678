"""Tasks of lm-evaluation-harness from local files, against answers worked out by hand."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise import compress
from rankwise.evaluation.intervals import mcnemar, of_paired_difference, of_proportion

Run = Callable[..., Any]
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "tasks"
ITEMS = 12
TEXT = ["--samples", 4, "--length", 64]


@pytest.fixture(scope="module")
def here(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model, a text, and the first items of every task in `examples`, with its YAML file."""
    folder = tmp_path_factory.mktemp("tasks")
    stories = (shared / "text" / "tinystories-3000.jsonl").read_text().splitlines(keepends=True)
    (folder / "seen.jsonl").write_text("".join(stories[:30]))
    model = shared / "models" / "stories260k"
    compress(model, 0.1, calibration=folder / "seen.jsonl", output=folder / "small", allocation="uniform", samples=8, length=128)
    (folder / "tasks").mkdir()
    for file in (shared / "tasks").glob("*.jsonl"):
        lines = itertools.islice(file.open(), ITEMS + 3)
        (folder / "tasks" / file.name).write_text("".join(lines))
    for file in EXAMPLES.glob("*.yaml"):
        shutil.copy(file, folder / "tasks")
    return folder


def evaluated(rankwise: Run, here: Path, shared: Path, *tasks: object) -> Any:
    command = ["evaluate", here / "small", "--reference", shared / "models" / "stories260k", "--text", here / "seen.jsonl", *TEXT]
    finished = rankwise(*command, *tasks, "--cache", here / "cache", "--json")
    assert finished.code == 0, finished.err
    return json.loads(finished.out)["tasks"]


def likelihoods(model: Any, tokenizer: Any, context: str, continuations: list[str]) -> list[float]:
    """The log likelihood of each continuation after the context."""
    found = []
    for continuation in continuations:
        start = len(tokenizer(context)["input_ids"])
        ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
        found.append(logs[start - 1 :].sum().item())
    return found


def test_multiple_choice_by_hand(rankwise: Run, here: Path, shared: Path) -> None:
    found = evaluated(rankwise, here, shared, "--tasks", here / "tasks" / "arc_easy.yaml", "--limit", ITEMS)["local_arc_easy"]
    rows = [json.loads(line) for line in (here / "tasks" / "arc_easy_test.jsonl").read_text().splitlines()[:ITEMS]]
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    answers, right = {}, {}
    for kind, folder in (("reference", shared / "models" / "stories260k"), ("compressed", here / "small")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        scores = [likelihoods(model, tokenizer, row["ctx"], [f" {choice}" for choice in row["choices"]]) for row in rows]
        answers[kind] = [max(range(len(s)), key=s.__getitem__) for s in scores]
        right[kind] = [a == row["gold"] for a, row in zip(answers[kind], rows, strict=True)]
        assert found["metrics"]["acc"][kind] == pytest.approx(sum(right[kind]) / ITEMS)
        assert found["metrics"]["acc"]["intervals"][kind] == pytest.approx(of_proportion(sum(right[kind]), ITEMS))
    pairs = list(zip(right["reference"], right["compressed"], strict=True))
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    acc = found["metrics"]["acc"]
    assert found["items"] == ITEMS
    assert found["chance"] == pytest.approx(sum(1 / len(row["choices"]) for row in rows) / ITEMS)
    assert found["answer_changes"] == sum(a != b for a, b in zip(*answers.values(), strict=True)) / ITEMS
    assert acc["difference"] == pytest.approx((won - lost) / ITEMS)
    assert acc["flips"] == pytest.approx((won + lost) / ITEMS)
    assert acc["intervals"]["difference"] == pytest.approx(of_paired_difference(lost, won, ITEMS))
    assert acc["p_value"] == pytest.approx(mcnemar(lost, won))
    assert acc["above_chance"]["reference"] == (acc["intervals"]["reference"][0] > found["chance"])


def test_every_example_runs(rankwise: Run, here: Path, shared: Path) -> None:
    found = evaluated(rankwise, here, shared, "--tasks", here / "tasks", "--limit", 3)
    assert found.keys() == {f"local_{file.stem}" for file in EXAMPLES.glob("*.yaml")}
    chances = {name: task["chance"] for name, task in found.items()}
    assert (chances["local_winogrande"], chances["local_mmlu"], chances["local_lambada"]) == (0.5, 0.25, None)
    assert found["local_lambada"]["other"]["perplexity"]["reference"] > 1
    assert all(task["items"] == 3 for task in found.values())


def test_winogrande_by_hand(rankwise: Run, here: Path, shared: Path) -> None:
    """The same ending is judged after each context."""
    found = evaluated(rankwise, here, shared, "--tasks", here / "tasks" / "winogrande.yaml", "--limit", ITEMS)["local_winogrande"]
    rows = [json.loads(line) for line in (here / "tasks" / "winogrande_xl_val.jsonl").read_text().splitlines()[:ITEMS]]
    folder = shared / "models" / "stories260k"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for row in rows:
        first, second = (likelihoods(model, tokenizer, context, [f" {row['cont']}"])[0] for context in row["ctx_options"])
        right += (second > first) == bool(row["gold"])
    assert found["metrics"]["acc"]["reference"] == pytest.approx(right / ITEMS)


def test_shots_and_groups(rankwise: Run, here: Path, shared: Path, tmp_path: Path) -> None:
    """A group's figures are over all its items; examples come from the split the task names."""
    for part in ("one", "two"):
        rows = [{"question": f"{part} {i} is", "answers": ["odd", "even"], "label": int(i % 2 == 0)} for i in range(6)]
        for split in ("test", "train"):
            (tmp_path / f"{part}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{part}.yaml").write_text(
            f"""task: {part}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {part}.test.jsonl, train: {part}.train.jsonl}}}}
test_split: test
training_split: train
fewshot_split: train
output_type: multiple_choice
doc_to_text: question
doc_to_choice: answers
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
        )
    (tmp_path / "both.yaml").write_text("group: both\ntask: [one, two]\n")
    few = evaluated(rankwise, here, shared, "--tasks", tmp_path, "--shots", 2)
    none = evaluated(rankwise, here, shared, "--tasks", f"{tmp_path}/one.yaml,{tmp_path}/two.yaml")
    assert none.keys() == {"one", "two"}
    assert (few["one"]["shots"], none["one"]["shots"]) == (2, 0)
    assert few["both"]["tasks"] == ["one", "two"]
    assert few["both"]["items"] == few["one"]["items"] + few["two"]["items"] == 12
    for kind in ("reference", "compressed", "difference", "flips"):
        parts = [few[part]["metrics"]["acc"][kind] for part in ("one", "two")]
        assert few["both"]["metrics"]["acc"][kind] == pytest.approx(sum(parts) / 2)


def test_free_answers(rankwise: Run, here: Path, shared: Path, tmp_path: Path) -> None:
    """Written out greedily and compared as text; there is no chance level."""
    (tmp_path / "free.jsonl").write_text("".join(json.dumps({"ctx": ctx}) + "\n" for ctx in ("Once upon a", "Tom and")))
    (tmp_path / "free.yaml").write_text(
        """task: free
dataset_path: json
dataset_kwargs: {data_files: {test: free.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: ctx
doc_to_target: "time"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
    )
    found = evaluated(rankwise, here, shared, "--tasks", tmp_path / "free.yaml")["free"]
    tokenizer, written = AutoTokenizer.from_pretrained(here / "small"), []
    for folder in (shared / "models" / "stories260k", here / "small"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        prompts = [tokenizer(ctx, return_tensors="pt") for ctx in ("Once upon a", "Tom and")]
        answers = [model.generate(**p, max_new_tokens=4, do_sample=False)[0, p.input_ids.shape[1] :] for p in prompts]
        written.append([tokenizer.decode(tokens, skip_special_tokens=True).split(".")[0] for tokens in answers])
    assert found["chance"] is None
    assert found["metrics"]["exact_match"]["above_chance"] is None
    assert found["answer_changes"] == sum(a != b for a, b in zip(*written, strict=True)) / 2


def test_what_was_answered_is_not_asked_again(
    rankwise: Run, here: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    task = ["--tasks", here / "tasks" / "piqa.yaml", "--limit", 4]
    first = evaluated(rankwise, here, shared, *task)

    def again(*_: Any) -> None:
        pytest.fail("asked a second time")

    with monkeypatch.context() as patch:
        patch.setattr("lm_eval.evaluate", again)
        assert evaluated(rankwise, here, shared, *task) == first
    asked, ask = [], lm_eval.evaluate
    monkeypatch.setattr("lm_eval.evaluate", lambda *a, **options: asked.append(a) or ask(*a, **options))
    for number, change in enumerate((("Question", "Query"), ('"gold": 0', '"gold": 1'))):  # other items; other right answers
        folder = tmp_path / str(number)
        shutil.copytree(here / "tasks", folder)
        rows = (folder / "piqa_val.jsonl").read_text()
        (folder / "piqa_val.jsonl").write_text(rows.replace(*change))
        evaluated(rankwise, here, shared, "--tasks", folder / "piqa.yaml", "--limit", 4)
        assert len(asked) == 2 * (number + 1)


def test_the_terminal_says_what_is_chance(rankwise: Run, here: Path, shared: Path) -> None:
    command = ["evaluate", here / "small", "--reference", shared / "models" / "stories260k", "--text", here / "seen.jsonl", *TEXT]
    finished = rankwise(*command, "--tasks", here / "tasks" / "mmlu.yaml", "--limit", 4, "--cache", here / "cache")
    assert finished.code == 0, finished.err
    assert "25.0%" in finished.out
    assert "not above chance, so these say nothing of the compression: local_mmlu" in finished.out


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["--tasks", "nowhere.yaml"], "no YAML file 'nowhere.yaml'"),
        (["--tasks", "no-such-task-anywhere"], "no such task: 'no-such-task-anywhere'"),
        (["--tasks", "TASKS/arc_easy.yaml", "--limit", "0"], "limit=0"),
        (["--tasks", "TASKS/arc_easy.yaml", "--shots", "-1"], "shots=-1"),
        (["--tasks", "broken.yaml"], "broken.yaml"),
        (["--tasks", "no-data.yaml"], "no-data.yaml.*cannot be loaded.*absent.jsonl"),
    ],
)
def test_bad_tasks(
    rankwise: Run, here: Path, shared: Path, tasks: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("no: task\n")
    Path("no-data.yaml").write_text((EXAMPLES / "arc_easy.yaml").read_text().replace("arc_easy_test", "absent"))
    few = Path(lm_eval.tasks.manager.__file__).with_name("arc")  # of the harness's own tasks: to read all takes long
    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(few / "manager.py"))
    monkeypatch.setattr("rankwise.evaluation.evaluate.load_compressed", lambda *_: pytest.fail("the long work has begun"))
    arguments = [part.replace("TASKS", str(here / "tasks")) for part in tasks]
    finished = rankwise(
        "evaluate", here / "small", "--reference", shared / "models" / "stories260k", "--text", here / "seen.jsonl", *arguments
    )
    assert finished.code == 2, finished
    assert finished.err.count("error: ") == 1
    assert re.search(message, finished.err), finished.err
