"""Tasks of lm-evaluation-harness: the original and the compressed model answer the very same items, and are compared by item.

Every model's answers to every task are kept by content, so that what was answered once is not asked again.
"""

from __future__ import annotations

import contextlib
import copy
import glob
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.calibration.tokens import TOKENS_PER_BATCH, window_length
from rankwise.errors import RankwiseError
from rankwise.evaluation.intervals import Interval, mcnemar, of_paired_difference, of_proportion, of_ratio
from rankwise.run_folder import RunFolder, digest

FEWSHOT_SEED = 1234  # the harness's own
KINDS = ("reference", "compressed")
Items = dict[str, Any]  # a model's answers to a task, see `_ask`


@dataclass(frozen=True)
class Tasks:
    """The harness's tasks by name, and the groups asked for: name -> names of their tasks."""

    tasks: dict[str, Any]
    groups: dict[str, list[str]]
    limit: int | None


def load_tasks(names: Sequence[str], limit: int | None = None, shots: int | None = None) -> Tasks:
    """The tasks `names`: the harness's own tasks, groups and tags, or YAML files, folders of them and patterns.

    limit: the first items of each task; None: all.
    shots: examples before each item, where the task does not fix them; None: as the task says.
    A data file that a YAML file names stands beside it. Raises `RankwiseError` for what does not load, or is no task.
    """
    if limit is not None and limit < 1:
        raise RankwiseError(f"limit={limit}: at least one item of each task is needed")
    if shots is not None and shots < 0:
        raise RankwiseError(f"shots={shots}: the number of examples before an item cannot be negative")
    files = [file for name in names for file in _files_of(name)]
    named = [name for name in names if not _files_of(name)]
    manager = _harness().tasks.TaskManager(include_path=sorted({str(f.parent) for f in files}), include_defaults=bool(named))
    found: dict[str, Any] = {"tasks": {}, "groups": {}}
    for spec in [*named, *files]:
        known = [n for n, e in manager.task_index.items() if e.yaml_path == spec] if isinstance(spec, Path) else [spec]
        if not known or known[0] not in manager.task_index:
            raise RankwiseError(
                f"no such task: {str(spec)!r} is no task, group or tag that lm-evaluation-harness knows or can read"
            )
        try:
            with _quiet(), contextlib.chdir(spec.parent if isinstance(spec, Path) else "."):
                loaded = manager.load(known)
                for task in loaded["tasks"].values():
                    own = task.get_config("num_fewshot")
                    task.set_config("num_fewshot", (own or 0) if shots is None or own == 0 else shots)
                    _build(task, limit)
        except Exception as error:  # a data set fails in many ways, and so does a task's template
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise RankwiseError(f"the task {str(spec)!r} cannot be loaded: {reason}") from None
        found["tasks"] |= loaded["tasks"]
        found["groups"] |= {name: [t.task_name for t in g.get_all_tasks()] for name, g in loaded.get("groups", {}).items()}
    return Tasks(found["tasks"], found["groups"], limit)


def _files_of(name: str) -> list[Path]:
    """The YAML files that `name` stands for: itself, those of a folder, or those that match; none for a name of the harness's.

    Raises `RankwiseError` where there is no such file.
    """
    files = [Path(f).resolve() for f in sorted(glob.glob(f"{name}/*.yaml" if Path(name).is_dir() else name))]
    if name.endswith((".yaml", ".yml")) and not files:
        raise RankwiseError(f"no such task: there is no YAML file {name!r}")
    return [file for file in files if file.suffix in (".yaml", ".yml")]


def _harness() -> Any:
    try:
        with _quiet():
            import lm_eval
            import lm_eval.tasks
    except ImportError:
        raise RankwiseError("tasks need lm-evaluation-harness: pip install 'rankwise[eval]'") from None
    return lm_eval


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's running commentary, which is not about the user's doing."""
    logger = logging.getLogger("lm_eval")
    before, logger.level = logger.level, logging.ERROR
    try:
        yield
    finally:
        logger.level = before


def _build(task: Any, limit: int | None) -> None:
    """Fill `task.instances`, the same way every time."""
    task.set_fewshot_seed(FEWSHOT_SEED)
    task.build_all_requests(limit=limit)


def answer(
    tasks: Tasks, models: Mapping[str, PreTrainedModel], identities: Mapping[str, str], tokenizer: Any, folder: RunFolder
) -> dict[str, Any]:
    """Both models' figures on every task and group, see `figures_of`. `models` are "reference" and "compressed"."""
    harnessed: dict[str, Any] = {}
    items: dict[str, dict[str, Items]] = {}
    for name, task in tasks.tasks.items():
        content = digest(_content(task), version("lm_eval"), tokens_of(tokenizer))
        items[name] = {}
        for kind in KINDS:

            def ask(kind: str = kind, task: Any = task) -> Items:
                if kind not in harnessed:
                    harnessed[kind] = _wrap(models[kind], tokenizer)
                return _ask(harnessed[kind], task, tasks.limit)

            items[name][kind] = folder.cached_values(f"task/{name}", digest(identities[kind], content), ask)
    results = {
        name: {"items": len(found["reference"]["answers"]), "shots": tasks.tasks[name].get_config("num_fewshot")}
        | figures_of(*(found[kind] for kind in KINDS))
        for name, found in items.items()
    }
    for group, members in tasks.groups.items():
        pooled = [_pool([items[name][kind] for name in members]) for kind in KINDS]
        results[group] = {"items": len(pooled[0]["answers"]), "tasks": members} | figures_of(*pooled)
    return results


def _content(task: Any) -> str:
    """All that answers and figures depend on: the items, what is asked of each, and how answers are judged."""
    asked = [(i.request_type, i.doc_id, i.args) for i in task.instances]
    judged = {key: value for key, value in task.dump_config().items() if key != "metadata"}  # which has the file's path
    return digest(asked, {i.doc_id: i.doc for i in task.instances}, judged)


def _wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model as the harness wants it."""
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        batch = max(1, TOKENS_PER_BATCH // window_length(model))
        return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch)  # it sets a padding token


def tokens_of(tokenizer: Any) -> str:
    """What a tokenizer does, as a digest."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return digest(rules, sorted(map(str, tokenizer.special_tokens_map.items())))


def _ask(lm: Any, task: Any, limit: int | None) -> Items:
    """The model's answers, item by item.

    metrics: name -> the value of each item, of metrics that are means over items.
    other: name -> the value over all items, of the others (a perplexity).
    answers: of a multiple choice the likeliest one's number, else the text, filtered.
    chances: of each item, what guessing gets right; None where the answer is free.
    """
    with _quiet():
        task.set_fewshot_seed(FEWSHOT_SEED)
        # Not `simple_evaluate`, which asks the system for all it knows about itself, every time.
        found = _harness().evaluate(lm, {"tasks": {task.task_name: task}}, limit=limit, bootstrap_iters=0)
    samples, results = found["samples"][task.task_name], found["results"][task.task_name]
    means = {name for name, function in task.aggregation().items() if getattr(function, "__name__", "") == "mean"}
    metrics: dict[str, list[float]] = {}
    for sample in samples:
        for name in (name for name in sample["metrics"] if name in means):
            label = name if sample["filter"] == "none" else f"{name},{sample['filter']}"
            metrics.setdefault(label, []).append(float(sample[name]))
    other = {k.removesuffix(",none"): float(v) for k, v in results.items() if k.split(",")[0] in task.aggregation()}
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    choices = task.OUTPUT_TYPE == "multiple_choice"
    counts = [len(task.doc_to_choice(sample["doc"])) for sample in first] if choices else []
    answers = [_answer(s["filtered_resps"], n) for s, n in zip(first, counts or [0] * len(first), strict=True)]
    return {
        "metrics": metrics,
        "other": {name: value for name, value in other.items() if name not in metrics},
        "answers": answers,
        "chances": [1 / n for n in counts] if choices else None,
    }


def _answer(responses: Sequence[Any], choices: int) -> int | str:
    if choices:
        likelihoods = torch.tensor([float(response[0]) for response in responses[:choices]])
        return int(likelihoods.argmax())
    return str(responses[0][1] if isinstance(responses[0], tuple | list) else responses[0])


def _pool(parts: Sequence[Items]) -> Items:
    """A group's items: all of its tasks', one after another, with the metrics that all of them have."""
    shared = [name for name in parts[0]["metrics"] if all(name in part["metrics"] for part in parts)]
    chances = [part["chances"] for part in parts]
    return {
        "metrics": {name: [value for part in parts for value in part["metrics"][name]] for name in shared},
        "other": {},
        "answers": [a for part in parts for a in part["answers"]],
        "chances": None if None in chances else [c for part in chances for c in part],
    }


def figures_of(reference: Items, compressed: Items) -> dict[str, Any]:
    """Of two models' answers to the same items:

    chance: what guessing gets right on average; None where the answer is free.
    answer_changes: fraction of items with another answer.
    metrics: name -> each model's mean, standard error, interval, and whether it is above chance; the paired difference,
        compressed - reference, and its interval; flips, the fraction of items whose value changes (of an accuracy: right to wrong
        or wrong to right; Dutta et al. 2024, arXiv 2407.09141); McNemar's p value of an accuracy.
    other: name -> each model's value, of metrics that are no means over items.
    """
    chances = reference["chances"]
    chance = sum(chances) / len(chances) if chances else None
    pairs = list(zip(reference["answers"], compressed["answers"], strict=True))
    return {
        "chance": chance,
        "answer_changes": sum(a != b for a, b in pairs) / len(pairs),
        "metrics": {
            name: _paired(torch.tensor(values).double(), torch.tensor(compressed["metrics"][name]).double(), chance)
            for name, values in reference["metrics"].items()
        },
        "other": {name: {"reference": v, "compressed": compressed["other"][name]} for name, v in reference["other"].items()},
    }


def _paired(reference: torch.Tensor, compressed: torch.Tensor, chance: float | None) -> dict[str, Any]:
    """Of one metric, [items] float64 each."""
    items, difference = len(reference), compressed - reference
    values = dict(zip((*KINDS, "difference"), (reference, compressed, difference), strict=True))
    errors = {kind: (v.std() / items**0.5).item() if items > 1 else None for kind, v in values.items()}
    intervals: dict[str, Interval | None]
    p_value = None
    if all(bool(((v == 0) | (v == 1)).all()) for v in (reference, compressed)):
        lost, won = int((difference < 0).sum()), int((difference > 0).sum())
        intervals = {kind: of_proportion(int(values[kind].sum()), items) for kind in KINDS}
        intervals["difference"] = of_paired_difference(lost, won, items)
        p_value = mcnemar(lost, won)
    else:
        intervals = {kind: of_ratio(v, torch.ones_like(v)) for kind, v in values.items()}
    above = None
    if chance is not None:
        above = {kind: (interval := intervals[kind]) is not None and interval[0] > chance for kind in KINDS}
    return {
        **{kind: v.mean().item() for kind, v in values.items()},
        "standard_errors": errors,
        "intervals": intervals,
        "above_chance": above,
        "flips": (difference != 0).double().mean().item(),
        "p_value": p_value,
    }
