"""The original and the compressed model, measured together; what was measured once is read from a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise import __version__
from rankwise.calibration.batches import batches_of
from rankwise.calibration.signal import frozen, signal_of
from rankwise.evaluation.compare import compare
from rankwise.evaluation.generation import generations
from rankwise.evaluation.hidden import WINDOWS as HIDDEN_WINDOWS
from rankwise.evaluation.hidden import hidden_measures
from rankwise.evaluation.tasks import Tasks, answer, tokens_of
from rankwise.run_folder import RunFolder, digest, fingerprint
from rankwise.schema import Costs


class Pair:
    """The original and the compressed model, measured together; what was measured once is read from `folder`."""

    def __init__(
        self, dense: PreTrainedModel, compressed: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: RunFolder
    ) -> None:
        self.models = {"reference": dense, "compressed": compressed}
        self.tokenizer, self.folder = tokenizer, folder
        versions = (__version__, torch.__version__, transformers.__version__)
        self.identities = {kind: digest(fingerprint(model), *versions) for kind, model in self.models.items()}

    def _cached(self, stage: str, compute: Callable[[], Any], *parts: Any) -> Any:
        return self.folder.cached_values(stage, digest(*self.identities.values(), *parts), compute)

    def compare(self, windows: Tensor) -> dict[str, Any]:
        """The `Comparison` on windows [windows, length] of tokens, as plain values."""
        dense, compressed = self.models.values()

        def compute() -> Costs:
            with frozen(dense), frozen(compressed):
                return compare(
                    lambda batch: signal_of(dense, batch),
                    lambda batch: signal_of(compressed, batch),
                    batches_of(dense, windows),
                    dense.can_generate(),
                ).to_dict()

        return self._cached("comparison", compute, windows)

    def hidden_measures(self, windows: Tensor) -> dict[str, Any]:
        """See `hidden_measures`."""
        batches = batches_of(self.models["reference"], windows[:HIDDEN_WINDOWS])
        return self._cached("hidden", lambda: hidden_measures(self.models, batches), windows[:HIDDEN_WINDOWS])

    def generations(self, prompts: Sequence[Tensor]) -> dict[str, Any]:
        """See `generations`."""
        return self._cached(
            "generations", lambda: generations(self.models, self.tokenizer, prompts), tokens_of(self.tokenizer), *prompts
        )

    def tasks(self, tasks: Tasks) -> dict[str, Any]:
        """See `answer`; each model's answers are kept on their own, so that another compressed model needs only its own."""
        return answer(tasks, self.models, self.identities, self.tokenizer, self.folder)
