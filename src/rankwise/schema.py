"""What a report holds, as Python types it: report.json has the same, and `python -m rankwise.schema` prints its JSON
Schema."""

from __future__ import annotations

import json
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic wants this one where Python is older than 3.12

VERSION = 1  # raised where a field gets another meaning, or goes

Scope = dict[str, dict[str, int]]


class Costs(TypedDict):
    """What compression costs, on the same tokens of the text."""

    kl: Annotated[float, Field(description="KL(original || compressed), nats per token")]
    agreement: Annotated[float | None, Field(description="fraction of tokens with the same most likely token")]
    flips: Annotated[float | None, Field(description="fraction of tokens with another most likely token")]
    perplexity: Annotated[
        float | None,
        Field(
            description="perplexity of the compressed model; null if infinite or undefined",
        ),
    ]
    reference_perplexity: Annotated[float | None, Field(description="perplexity of the original")]
    perplexity_ratio: Annotated[float | None, Field(description="perplexity divided by reference_perplexity")]
    tokens: Annotated[int, Field(description="number of predicted tokens")]
    windows: Annotated[int, Field(description="number of windows")]
    intervals: Annotated[
        dict[str, list[float | None] | None],
        Field(
            description="95 % interval [low, high] of each figure, over windows",
        ),
    ]


class Sizes(TypedDict):
    """How large the original and the compressed model are."""

    parameters: Annotated[
        Scope,
        Field(
            description="by scope, how many the original and the compressed model have",
        ),
    ]
    bytes: Annotated[Scope, Field(description="by scope, the bytes of these parameters")]
    achieved_rate: Annotated[dict[str, float], Field(description="fraction of parameters removed, by scope")]


class Report(Sizes, Costs):
    """`compress` and `refine` return this; its costs are measured on a tenth of the calibration text."""

    version: Annotated[int, Field(description="version of this schema")]
    base_model: Annotated[str, Field(description="folder, name or class of the original")]
    rate: Annotated[
        float,
        Field(
            description="fraction of the scope's parameters to remove; achieved, if another target was given",
        ),
    ]
    scope: Annotated[
        str,
        Field(
            description="what the rate counts: linear (the matrices that may be compressed) or model (all)",
        ),
    ]
    ranks: Annotated[dict[str, int | None], Field(description="matrix -> rank, null for dense")]
    bits: Annotated[dict[str, int], Field(description="matrix -> bits per number, if written in few bits")]
    shapes: Annotated[dict[str, list[int]], Field(description="matrix -> [out_features, in_features] in the original")]
    narrowed: NotRequired[
        Annotated[
            dict[str, list[int]],
            Field(
                description="matrix of an MLP that lost neurons -> its shape now",
            ),
        ]
    ]
    neurons: NotRequired[
        Annotated[
            dict[str, list[int]],
            Field(
                description="last matrix of an MLP that lost neurons -> [neurons now, neurons before]",
            ),
        ]
    ]
    left_dense: Annotated[dict[str, str], Field(description="matrix that may not be compressed -> why")]
    conversations: Annotated[
        int,
        Field(
            description="conversations in the calibration text, put in the chat template",
        ),
    ]
    notes: Annotated[list[str], Field(description="remarks for the reader")]
    history: Annotated[list[dict[str, Any]], Field(description="the steps of choosing and training, each with its KL")]
    effort: Annotated[
        dict[str, float],
        Field(
            description="cost of choosing: seconds, tokens run forward and backward",
        ),
    ]
    seconds: Annotated[dict[str, float], Field(description="seconds that each stage took")]
    peak_memory_bytes: Annotated[
        dict[str, int],
        Field(
            description="peak memory of the host, and of the GPU if one was used",
        ),
    ]
    recipe: Annotated[dict[str, Any], Field(description="the options in recipe.yaml")]
    versions: Annotated[dict[str, str], Field(description="versions of rankwise, torch and transformers")]
    costs: NotRequired[
        Annotated[
            dict[str, Any],
            Field(
                description="number of tokens, and by matrix the KL when only that matrix is compressed",
            ),
        ]
    ]
    samples: NotRequired[
        Annotated[
            list[dict[str, Any]],
            Field(
                description="prompts and both models' continuations",
            ),
        ]
    ]
    predicted_speedup: NotRequired[
        Annotated[
            float,
            Field(
                description="speed-up of decoding, predicted from this machine's latencies",
            ),
        ]
    ]
    before_refinement: NotRequired[Annotated[Costs, Field(description="the costs before a refinement")]]
    refined_on: NotRequired[Annotated[str, Field(description="the text that `refine` trained on")]]


def schema() -> dict[str, Any]:
    """The JSON Schema of report.json."""
    return TypeAdapter(Report).json_schema()


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
