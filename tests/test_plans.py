"""Plans: what was chosen is a value that is printed, saved, edited by hand and applied; what is settled stays settled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import rankwise as package
from rankwise import Plan, RankwiseError, Recipe, stages
from rankwise.layers.matrices import Shape

Run = Callable[..., Any]
METHOD = "kl-knapsack points=2 trials=1"
FEW: dict[str, Any] = {"samples": 10, "length": 32}
MATRIX = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def made(llama: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "small"
    package.compress(llama, 0.3, calibration=str(story), allocation=METHOD, output=output, **FEW)
    return output


@pytest.fixture(scope="module")
def plan(llama: Path, story: Path) -> Plan:
    return package.plan(llama, 0.3, calibration=str(story), allocation=METHOD, **FEW)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


RANKS = st.one_of(st.none(), st.integers(1, 40))


@settings(deadline=None, max_examples=50)
@given(
    ranks=st.dictionaries(st.text('ab."é', min_size=1), RANKS, min_size=1),
    known=st.booleans(),
    kl=st.one_of(st.none(), st.floats(0, 10)),
    recipe=st.sampled_from([None, Recipe.of(rate=0.3, keep={"*": 0.5}, include=("a", "b"), options={"points": 3})]),
)
def test_a_plan_is_read_as_it_was_saved(
    ranks: dict[str, int | None], known: bool, kl: float | None, recipe: Recipe | None, tmp_path_factory: Any
) -> None:
    shapes = {name: Shape(100, 80, 3, "pair") for name in ranks} if known else {}
    plan, file = Plan(ranks, shapes, kl, "a model", recipe), tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(file)
    assert Plan.read(file) == plan
    content = json.loads(file.read_text())
    content["ranks"][next(iter(ranks))] = 41
    file.write_text(json.dumps(content))
    assert Plan.read(file) == plan.edited({next(iter(ranks)): 41})  # whose KL is not known
    assert not (plan - plan).ranks
    assert all(name in str(plan) for name in ranks)


def test_a_plan_tells_what_compress_does(plan: Plan, made: Path) -> None:
    report = json.loads((made / "report.json").read_text())
    assert plan.ranks == report["ranks"]
    assert (plan.kl, plan.base_model) == (report["kl"], report["base_model"])
    assert plan.parameters == report["parameters"]["linear"]["compressed"]


def test_a_plan_makes_the_same_weights(rankwise: Run, llama: Path, plan: Plan, made: Path, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    for number, file in enumerate((tmp_path / "plan.json", made)):
        done = rankwise("compress", llama, "--plan", file, "-o", tmp_path / str(number))
        assert done.code == 0, done.err
        assert weights(tmp_path / str(number)) == weights(made)
    again = package.compress(llama, recipe=tmp_path / "0")  # it has the ranks
    assert (again.ranks, again.recipe) == (plan.ranks, Recipe.read(tmp_path / "0"))
    other = package.compress(llama, 0.5, recipe=again.recipe, allocation="uniform").recipe
    assert (other.rate, other.ranks, other.allocation) == (0.5, None, "uniform")


def test_an_edited_plan_is_applied_as_it_is(llama: Path, plan: Plan, made: Path, tmp_path: Path) -> None:
    file = tmp_path / "ranks.json"
    file.write_text(json.dumps(json.loads((made / "ranks.json").read_text()) | {MATRIX: 3}))
    (tmp_path / "recipe.yaml").write_bytes((made / "recipe.yaml").read_bytes())
    edited = Plan.read(file)
    assert edited.ranks == plan.edited({MATRIX: 3}).ranks
    difference = edited - plan
    assert difference.ranks == {MATRIX: (plan.ranks[MATRIX], 3)}
    assert difference.parameters[MATRIX] == difference.shapes[MATRIX].parameters(3) - plan.shapes[MATRIX].parameters(
        plan.ranks[MATRIX]
    )
    assert "-> 3" in str(difference)
    assert package.compress(llama, plan=file).ranks == edited.ranks
    assert package.plan(llama, plan=edited).kl != plan.kl


def test_block_by_block(llama: Path, story: Path, plan: Plan, made: Path, tmp_path: Path) -> None:
    package.compress(llama, plan=plan, memory="2GB", output=tmp_path / "out", exclude=["lm_head"])
    assert weights(tmp_path / "out") == weights(made)
    asked: dict[str, Any] = {"calibration": str(story), "allocation": METHOD, "keep": {"*.mlp.*": 0.8}, **FEW}
    streamed = package.plan(llama, 0.3, memory="2GB", output=tmp_path / "plan.json", **asked)
    assert streamed == Plan.read(tmp_path / "plan.json")
    assert streamed.ranks == package.plan(llama, 0.3, **asked).ranks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plan.json"]


def test_a_dry_run_stops_at_the_plan(
    rankwise: Run, llama: Path, story: Path, plan: Plan, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["--rate", 0.3, "--calibration", story, "--allocation", METHOD, "--samples", 10, "--length", 32, "--dry-run"]
    done = rankwise("compress", llama, *asked)
    assert done.code == 0, done.err
    assert done.out == f"{plan}\n"
    assert not list(tmp_path.iterdir())
    assert json.loads(rankwise("compress", llama, *asked, "-o", "plan.json", "--json").out)["ranks"] == plan.ranks
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert Plan.read("plan.json") == plan
    assert "is there already" in rankwise("compress", llama, *asked, "-o", "plan.json").err


def test_a_model_in_memory_stays_as_it_is(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = package.plan(model, 0.3, calibration=torch.randint(3, 60, (10, 16)), allocation="uniform")
    assert found.ranks.keys() == found.shapes.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.layers.9.mlp.up_proj": 3}, "model.layers.9.mlp.up_proj, which is none of"),
        ({MATRIX: ...}, f"no rank for {MATRIX}"),
        ({MATRIX: 1000}, f"rank 1000 for {MATRIX}"),
        ({MATRIX: 0}, f"0 for {MATRIX}"),
        ({MATRIX: "3"}, f"'3' for {MATRIX}"),
    ],
)
def test_a_plan_of_another_model_is_a_line(
    rankwise: Run, llama: Path, made: Path, tmp_path: Path, change: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "collect", lambda *_: pytest.fail("the long work has begun"))
    ranks = {n: r for n, r in (json.loads((made / "ranks.json").read_text()) | change).items() if r is not ...}
    (tmp_path / "ranks.json").write_text(json.dumps(ranks))
    done = rankwise("compress", llama, "--plan", tmp_path / "ranks.json", "-o", tmp_path / "out", "--calibration", "stdlib:train")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert said in done.err
    assert not (tmp_path / "out").exists()


def test_what_contradicts_a_plan_is_refused(llama: Path, plan: Plan, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = [{"rate": 0.2}, {"allocation": "uniform"}, {"keep": {"*": 0.5}}, {"target_bytes": "1MB"}]
    for more in asked:
        with pytest.raises(RankwiseError, match=r"two targets|remove allocation and keep"):
            package.compress(llama, plan=plan, **more)
    (tmp_path / "ranks.json").write_text(json.dumps(dict(plan.ranks)))
    (tmp_path / "report.json").write_text("7")
    with pytest.raises(RankwiseError, match="is no report"):
        Plan.read(tmp_path / "ranks.json")
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(RankwiseError, match="is no plan"):
        Plan.read(tmp_path / "plan.json")
    with pytest.raises(RankwiseError, match="different matrices"):
        _ = plan - Plan({"a": 1})


@pytest.mark.parametrize("allocation", ["uniform", METHOD, "llrc points=0 rounds=1 value_steps=2", "evolutionary generations=1"])
def test_what_is_to_be_kept_is_kept_and_the_rate_holds(llama: Path, story: Path, allocation: str) -> None:
    keep = {"*.mlp.*": 0.9, "*.down_proj": 1.0, "re:.*q_proj$": 0.5}
    found = package.plan(llama, 0.25, calibration=str(story), allocation=allocation, keep=keep, **FEW)
    for name, shape in found.shapes.items():
        share = shape.parameters(found.ranks[name]) / shape.dense
        step = shape.per_rank / shape.dense
        if name.endswith("down_proj"):
            assert found.ranks[name] is None
        elif ".mlp." in name or name.endswith("q_proj"):
            wanted = 0.9 if ".mlp." in name else 0.5
            assert wanted - step < share <= wanted
    dense = sum(shape.dense for shape in found.shapes.values())
    largest = max(shape.per_rank for shape in found.shapes.values())
    assert found.parameters is not None
    assert 0.75 * dense - largest < found.parameters <= 0.75 * dense


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ("*.nothing=0.5", "matches none"),
        ("*.mlp.*=1.5", "less than or equal to 1"),
        ("*.mlp.*=1", "keep leaves"),
        ("*.mlp.*=0.2", "keep alone removes"),
        ("*=0.7", "fixes every matrix"),
        ("*.mlp.*=0.001", "where rank 1 takes"),
        ("*.mlp.*", "must be written as PATTERN=FRACTION"),
    ],
)
def test_what_cannot_be_kept_is_a_line_before_the_work(
    rankwise: Run, llama: Path, story: Path, tmp_path: Path, keep: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "collect", lambda *_: pytest.fail("the long work has begun"))
    rate = 0.6 if keep == "*.mlp.*=1" else 0.3
    done = rankwise("compress", llama, "--rate", rate, "--keep", keep, "--calibration", story, "-o", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert said in done.err


def test_a_budget_of_bytes_has_room_for_what_is_kept(llama: Path, story: Path, tmp_path: Path) -> None:
    result = package.compress(
        llama,
        target_bytes="160kB",
        keep={"*.q_proj": 1},
        calibration=str(story),
        allocation="uniform",
        output=tmp_path / "out",
        **FEW,
    )
    assert all(rank is None for name, rank in result.ranks.items() if name.endswith("q_proj"))
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= 160_000


@pytest.mark.parametrize("memory", [None, "2GB"])
def test_a_plan_of_llrc_costs_what_it_says(llama: Path, story: Path, tmp_path: Path, memory: str | None) -> None:
    asked: dict[str, Any] = {"calibration": str(story), "allocation": "llrc rounds=1 value_steps=3", **FEW}
    plan = package.plan(llama, 0.4, output=tmp_path / "plan.json", memory=memory, neurons="all", **asked)
    applied = package.compress(llama, plan=tmp_path / "plan.json", output=tmp_path / "applied")
    own = package.compress(llama, 0.4, output=tmp_path / "own", memory=memory, neurons="all", **asked)
    assert applied.ranks == own.ranks == plan.ranks
    assert applied.report["kl"] == plan.kl
    assert [record["step"] for record in applied.report["history"]] == ["the plan", "values"]
    again = package.compress(llama, recipe=tmp_path / "applied", output=tmp_path / "again")
    assert (again.report["kl"], again.recipe.allocation) == (plan.kl, "llrc")
    fewer = package.compress(llama, 0.6, recipe=tmp_path / "applied", output=tmp_path / "fewer")  # no plan
    assert "start" in fewer.report["history"][0]["step"]


def test_ranks_without_a_recipe_train_nothing(llama: Path, story: Path, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "ranks.json").write_text(json.dumps(dict(plan.ranks)))
    found = package.compress(llama, plan=tmp_path / "ranks.json", calibration=str(story), **FEW)
    assert (found.ranks, found.report["history"]) == (dict(plan.ranks), [])
