"""Whatever fails or is interrupted, a model in memory is left as it was: its mixtures stacked, its parameters the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, build

import rankwise
from rankwise import RankwiseError

WINDOWS = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(1))
STAGES = ["starting.read_data", "stages.collect", "stages.decompose_in"]
CASES = [("compress", stage) for stage in [*STAGES, "stages.allocate", "stages.compare"]]
CASES += [("decompose", stage) for stage in [*STAGES, "stages.Student.fisher"]]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, RankwiseError])
@pytest.mark.parametrize(("work", "where"), CASES)
def test_a_model_in_memory_is_left_as_it_was(
    work: str, where: str, failure: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise failure("no more")

    monkeypatch.setattr(f"rankwise.{where}", fails)
    model = build("mixtral")
    before = {name: (parameter.clone(), parameter.requires_grad) for name, parameter in model.named_parameters()}
    options = {"rate": 0.3, "allocation": "uniform"} if work == "compress" else {}
    with pytest.raises(failure, match="no more"):
        getattr(rankwise, work)(model, output=tmp_path / "out", calibration=WINDOWS, **options)
    assert [name for name, _ in model.named_parameters()] == list(before)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
