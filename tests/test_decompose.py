"""One artifact for every rate: what comes out of it is what the direct way gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, build
from transformers import AutoModelForCausalLM

import rankwise
from rankwise import stages
from rankwise.integration.artifact import Artifact
from rankwise.layers.lowrank import LowRankLinear, PairLinear

TEXT = ["--samples", "10", "--length", "32"]


@pytest.fixture(scope="module")
def artifact(llama: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decomposed") / "artifact"
    rankwise.decompose(llama, folder, calibration=str(story), samples=10, length=32)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("rate", [0.2, 0.35, 0.6])
def test_every_rate_is_what_the_direct_way_gives(
    rate: float, artifact: Path, llama: Path, story: Path, tmp_path: Path, rankwise: Callable[..., Any]
) -> None:
    direct, quick = tmp_path / "direct", tmp_path / "quick"
    ended = rankwise(
        "compress", llama, "-o", direct, "--calibration", story, *TEXT, "--rate", rate, "--allocation", "mask-fisher"
    )
    assert ended.code == 0, ended.err
    ended = rankwise("compress", artifact, "-o", quick, "--rate", rate, "--json")
    assert ended.code == 0, ended.err
    assert equal(weights(direct), weights(quick))
    report = json.loads(ended.out)
    assert report["achieved_rate"]["linear"] >= rate
    assert report["recipe"]["calibration"] == str(story)

    from rankwise import RankwiseConfig

    loaded = AutoModelForCausalLM.from_pretrained(artifact, quantization_config=RankwiseConfig(rate=rate))
    assert equal(dict(loaded.state_dict()), weights(direct))
    loaded.save_pretrained(tmp_path / "saved")
    assert equal(weights(tmp_path / "saved"), weights(direct))


def test_other_allocators_reuse_what_is_there(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any, **options: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(stages, "collect", forbidden)
    monkeypatch.setattr(stages, "decompose_in", forbidden)
    monkeypatch.setattr("rankwise.masks.student.sampled_loss", forbidden)  # of which prices are the gradients
    before = {file: file.stat().st_mtime_ns for file in artifact.rglob("*")}
    result = rankwise.compress(artifact, 0.3, options={"rounds": 1, "value_steps": 2}, allocation="llrc", output=tmp_path / "out")
    assert any("round" in record["step"] for record in result.report["history"])
    assert before == {file: file.stat().st_mtime_ns for file in artifact.rglob("*")}


def test_the_artifact_is_also_the_original(artifact: Path, llama: Path) -> None:
    assert equal(weights(artifact), weights(llama))
    assert not artifact.with_name("artifact.run").exists()


@pytest.mark.parametrize(
    ("name", "metric"), [("mixtral", "kronecker"), ("gpt2", "centred-kronecker"), ("llama", "centred"), ("t5", "kronecker")]
)
def test_architectures_and_affine_factors(name: str, metric: str, tmp_path: Path) -> None:
    model, windows = build(name), torch.randint(3, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    rankwise.decompose(model, tmp_path / "artifact", calibration=windows, decomposition=metric)
    assert equal(before, dict(model.state_dict()))
    options = {"calibration": windows, "decomposition": metric, "allocation": "mask-fisher"}
    direct = rankwise.compress(model, 0.3, **options).model
    config = rankwise.RankwiseConfig(rate=0.3)
    loaded = type(model).from_pretrained(tmp_path / "artifact", quantization_config=config)
    assert loaded.config.quantization_config.ranks == direct.config.quantization_config.ranks
    expected = direct.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for key, tensor in loaded.state_dict().items():  # the biases of affine factors may differ in their last bits
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6 if key.endswith("bias") else 0)


def test_what_is_settled_cannot_be_asked_otherwise(artifact: Path, rankwise: Callable[..., Any], tmp_path: Path) -> None:
    for options in (["--seed", "1"], ["--calibration", "other.txt"], ["--length", "16"], ["--decomposition", "svd"]):
        ended = rankwise("compress", artifact, "-o", tmp_path / "x", *options)
        assert ended.code == 2
        assert "decompose again" in ended.err
    assert not list(tmp_path.iterdir())


def test_an_option_that_was_given_counts_though_it_is_the_default(
    llama: Path, story: Path, tmp_path: Path, rankwise: Callable[..., Any]
) -> None:
    from rankwise import RankwiseError, compress

    folder = tmp_path / "artifact"
    own = ["--seed", "1", "--dtype", "float32", "--exclude", "*.layers.0.*"]
    ended = rankwise("decompose", llama, "-o", folder, "--calibration", story, *TEXT, *own)
    assert ended.code == 0, ended.err
    for options in (
        ["--seed", "0"],
        ["--dtype", "auto"],
        ["--calibration", "self"],
        ["--exclude", "*.layers.1.*"],
        ["--memory", "8GB"],
    ):
        ended = rankwise("compress", folder, "-o", tmp_path / "x", *options)
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert f"was decomposed with {options[0][2:]}=" in ended.err
    with pytest.raises(RankwiseError, match="was decomposed with seed=1, not 0"):
        compress(folder, 0.3, seed=0)
    with pytest.raises(RankwiseError, match="run without calibration"):
        compress(folder, 0.3, calibration=torch.zeros(12, 16, dtype=torch.long))
    same = rankwise("compress", folder, "-o", tmp_path / "y", "--calibration", story, *TEXT, *own, "--json")
    assert same.code == 0, same.err
    assert json.loads(same.out)["recipe"]["seed"] == 1
    assert compress(folder, 0.3, seed=1, exclude=["*.layers.0.*"], length=None).report["recipe"]["seed"] == 1


def test_a_broken_artifact_says_so(artifact: Path, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "decomposed.json").write_text('{"format_version": 2}')
    with pytest.raises(rankwise.RankwiseError, match="decompose again"):
        Artifact.at(tmp_path)
    (tmp_path / "decomposed.json").write_text("{")
    with pytest.raises(rankwise.RankwiseError, match="cannot be read"):
        Artifact.at(tmp_path)
    assert Artifact.at(llama) is None
    with pytest.raises(ValueError, match="rankwise decompose"):
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=rankwise.RankwiseConfig(rate=0.3))
    with pytest.raises(rankwise.RankwiseError, match="cannot be reached"):
        AutoModelForCausalLM.from_pretrained(artifact, quantization_config=rankwise.RankwiseConfig(rate=0.999))


def test_the_form_is_asked_for_when_a_rate_is(artifact: Path, tmp_path: Path) -> None:
    config = rankwise.RankwiseConfig(rate=0.3, form=PairLinear.form)
    loaded = AutoModelForCausalLM.from_pretrained(artifact, quantization_config=config)
    rankwise.compress(artifact, 0.3, form=PairLinear.form, output=tmp_path / "pairs")
    assert equal(dict(loaded.state_dict()), weights(tmp_path / "pairs"))
    assert {type(m) for m in loaded.modules() if isinstance(m, LowRankLinear)} == {PairLinear}
