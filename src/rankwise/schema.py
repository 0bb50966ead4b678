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
    perplexity: Annotated[float | None, Field(description="of the compressed model; null where it is infinite, or there is none")]
    reference_perplexity: Annotated[float | None, Field(description="of the original")]
    perplexity_ratio: Annotated[float | None, Field(description="the one by the other")]
    tokens: Annotated[int, Field(description="that were predicted")]
    windows: Annotated[int, Field(description="that they were in")]
    intervals: Annotated[
        dict[str, list[float | None] | None], Field(description="of each of these [low, high] at 95 %, over windows")
    ]


class Sizes(TypedDict):
    """How large the original and the compressed model are."""

    parameters: Annotated[Scope, Field(description="by scope, of the reference and of the compressed")]
    bytes: Annotated[Scope, Field(description="the same in bytes")]
    achieved_rate: Annotated[dict[str, float], Field(description="by scope")]


class Report(Sizes, Costs):
    """What `compress` and `refine` tell of a result. The costs are those on a tenth of the calibration text, kept for this."""

    version: Annotated[int, Field(description="of this schema")]
    base_model: Annotated[str, Field(description="folder, name or class of the original")]
    rate: Annotated[float, Field(description="the fraction of parameters removed, of the scope: asked for, or what it came to")]
    scope: Annotated[str, Field(description="linear, the matrices that may be compressed, or model, all parameters")]
    ranks: Annotated[dict[str, int | None], Field(description="matrix -> rank, null for dense")]
    bits: Annotated[dict[str, int], Field(description="matrix -> bits of a number, where they were chosen")]
    shapes: Annotated[dict[str, list[int]], Field(description="matrix -> [out_features, in_features] in the original")]
    narrowed: NotRequired[
        Annotated[dict[str, list[int]], Field(description="matrix of an MLP that lost neurons -> what is left of its shape")]
    ]
    neurons: NotRequired[
        Annotated[
            dict[str, list[int]], Field(description="the last matrix of an MLP that lost neurons -> how many it has, of how many")
        ]
    ]
    left_dense: Annotated[dict[str, str], Field(description="matrix that may not be compressed -> why")]
    conversations: Annotated[int, Field(description="in the calibration text, put in the chat template")]
    notes: Annotated[list[str], Field(description="what is worth a line")]
    history: Annotated[list[dict[str, Any]], Field(description="the steps of choosing and training, each with its KL")]
    effort: Annotated[dict[str, float], Field(description="of choosing: seconds, tokens forward and back")]
    seconds: Annotated[dict[str, float], Field(description="of each stage")]
    peak_memory_bytes: Annotated[dict[str, int], Field(description="of the host, and of the GPU where one was used")]
    recipe: Annotated[dict[str, Any], Field(description="as recipe.yaml has it")]
    versions: Annotated[dict[str, str], Field(description="of rankwise, torch and transformers")]
    costs: NotRequired[Annotated[dict[str, Any], Field(description="tokens, and by matrix the KL of it alone")]]
    samples: NotRequired[Annotated[list[dict[str, Any]], Field(description="prompts and how both models go on from them")]]
    predicted_speedup: NotRequired[Annotated[float, Field(description="of decoding, by this machine's latencies")]]
    before_refinement: NotRequired[Annotated[Costs, Field(description="the costs before a refinement")]]
    refined_on: NotRequired[Annotated[str, Field(description="the text of `refine`")]]


def schema() -> dict[str, Any]:
    """The JSON Schema of report.json."""
    return TypeAdapter(Report).json_schema()


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
