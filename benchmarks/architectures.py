"""Every model type that transformers knows, tiny and random: what works, what streams, what is refused.

    python benchmarks/architectures.py [TYPE ...] [--seconds 150]

A case is a model type and an auto class. Each is tried in a process of its own, so that a crash or a run
that does not end is a row of the table. The stages of a case:

build      the tiny config, the model, a forward pass, its folder loaded again; rankwise has no part in this
float32    `compress` of the folder with uniform ranks; loaded, the result answers bit for bit as in memory
generate   five tokens from a cache, the same as in memory
densify    a plain folder with the parameters of the original and the outputs of the compressed one
optimize   `optimize` of the loaded result leaves its outputs as they are
bfloat16   as float32, in bfloat16 and with the default allocation, which trains; few and short steps
stream     `compress` with `memory`: the ranks and the outputs of float32

A case works where nothing up to bfloat16 fails. Needs tiny.py in the folder beside the repository
(--configs). What is found is kept in results/architectures.json, where a stopped run goes on, and printed
to architectures.md; the cases of a TYPE that is named are tried anew.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import rankwise

HERE = Path(__file__).parent
CAUSAL = "AutoModelForCausalLM"
OTHERS = {
    "AutoModelForMaskedLM": (
        "bert roberta deberta deberta-v2 modernbert distilbert albert electra xlm-roberta mpnet longformer "
        "mobilebert big_bird nomic_bert eurobert convbert fnet"
    ),
    "AutoModelForSequenceClassification": "bert roberta deberta-v2 modernbert distilbert llama qwen3 gpt2",
    "AutoModelForTokenClassification": "bert deberta-v2",
    "AutoModelForQuestionAnswering": "bert",
    "AutoModelForSeq2SeqLM": (
        "t5 mt5 umt5 bart mbart pegasus marian m2m_100 blenderbot led longt5 switch_transformers nllb-moe "
        "t5gemma t5gemma2 prophetnet"
    ),
    "AutoModelForSpeechSeq2Seq": "whisper moonshine",
    "AutoModelForCTC": "wav2vec2",
    "AutoModelForImageClassification": "vit dinov2",
    "AutoModel": (
        "bert mpnet xlm-roberta qwen3 gemma3_text modernbert nomic_bert jina_embeddings_v3 gte vit clip "
        "siglip clip_text_model dinov2 t5"
    ),
    "AutoModelForImageTextToText": (
        "llava llava_next llava_onevision gemma3 qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 "
        "qwen3_5_moe paligemma idefics3 smolvlm internvl mistral3 gemma4 llama4 mllama glm4v glm4v_moe "
        "aya_vision deepseek_vl lfm2_vl ovis2 kimi_k25 aria cohere_compass exaone4_5 gemma4_unified glm46v "
        "granite_docling idefics2 inkling_mm_model kosmos-2.5 lfm3_vl lighton_ocr minicpmv4_6 minimax_m3_vl "
        "mistral4 mistral_large4 qianfan_ocr qwen3_omni_moe_thinker qwen4_exp unlimited_ocr video_llava "
        "paddleocr_vl glm_ocr qwen2_5_omni_thinker step3p7 hunyuan_vl"
    ),
    "AutoModelForMultimodalLM": "qwen2_audio voxtral",
}
MOST_USED = (  # for text
    "llama mistral qwen2 qwen3 qwen3_moe gemma2 gemma3_text phi3 gpt2 gpt_neox opt bloom falcon mixtral "
    "deepseek_v2 deepseek_v3 olmo2 cohere2 granite glm4 smollm3 mamba mamba2 rwkv jamba gpt_oss "
    "llama4_text nemotron starcoder2 stablelm"
)
RATE, TOKENS = 0.3, (20, 200)  # tokens that no config gives a meaning
UNIFORM: dict[str, Any] = {"allocation": "uniform"}
LEARNED: dict[str, Any] = {"options": {"rounds": 1, "value_steps": 2}, "effort": "quick"}
ROUNDING = 0.02  # how far outputs may be apart that are not bit for bit the same, in units of their spread
WORKS, SKIPPED, REFUSED, FAILS = "works", "does not apply", "refused", "fails"

ENDS = "ends.json"

Outputs = dict[str, Tensor]
Ends = dict[str, str]  # of a case: how each stage ended


@dataclass
class Case:
    """A tiny model in a folder, and what its stages hand on."""

    kind: str
    auto: str
    folder: Path
    inputs: dict[str, Tensor] = field(default_factory=dict)
    calibration: Any = None
    model: Any = None
    result: Any = None
    outputs: Outputs = field(default_factory=dict)

    def load(self, name: str) -> Any:
        """The model in a folder of this case, of which every weight was read."""
        options = {"dtype": "auto", "output_loading_info": True}
        model, said = getattr(transformers, self.auto).from_pretrained(self.folder / name, **options)
        assert not any(said.values()), f"loading says {said}"
        return aligned(model.eval())


def aligned(model: Any) -> Any:
    """The model, its weights in memory of their own and without gradients: products are rounded by these."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.requires_grad_(False)


def inputs_of(model: Any, seed: int) -> dict[str, Tensor]:
    """Two sequences, pictures or sounds, as the model asks for."""
    generator = torch.Generator().manual_seed(seed)
    names = {model.main_input_name}
    if isinstance(model, transformers.CLIPModel | transformers.SiglipModel):
        names = {"input_ids", "pixel_values"}
    if model.config.is_encoder_decoder:
        names.add("decoder_input_ids")
    words = torch.randint(*TOKENS, (2, 32), generator=generator)
    sizes = {"pixel_values": (3, 32, 32), "input_values": (2000,), "input_features": (16, 256)}
    floats = {name: torch.randn(2, *sizes[name], generator=generator) for name in names & sizes.keys()}
    return dict.fromkeys(names - sizes.keys(), words) | floats


def in_bfloat16(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, pictures and sounds cast."""
    return {n: tensor.bfloat16() if tensor.is_floating_point() else tensor for n, tensor in inputs.items()}


@torch.no_grad()
def outputs_of(model: Any, inputs: dict[str, Tensor]) -> Outputs:
    """What the model answers, its cache apart. Raises `AssertionError` where it is not finite."""
    answers = model(**inputs).items()
    found = {name: a for name, a in answers if isinstance(a, Tensor) and a.is_floating_point()}
    assert found, "there are no outputs"
    assert all(a.isfinite().all() for a in found.values()), "the outputs are not finite"
    return found


def distance(ours: Outputs, theirs: Outputs) -> float:
    """How far apart the first outputs are at most, in units of their spread."""
    name = next((name for name in ("logits", "last_hidden_state") if name in ours), next(iter(ours)))
    a, b = ours[name].float(), theirs[name].float()
    return float((a - b).abs().max() / a.std().clamp(min=1e-9))


def require_same(ours: Outputs, theirs: Outputs) -> None:
    """Raises `AssertionError` where outputs are not the same, bit for bit."""
    for name, value in ours.items():
        apart = distance({name: value}, theirs)
        assert torch.equal(value, theirs[name]), f"loaded, its {name} are {apart:.2g} from those in memory"


def require_close(ours: Outputs, theirs: Outputs) -> None:
    """Raises `AssertionError` where outputs differ by more than rounding."""
    apart = distance(ours, theirs)
    assert apart < ROUNDING, f"the outputs are {apart:.2g} apart"


def build(case: Case) -> None:
    from tiny import tiny_model

    case.model = tiny_model(case.auto, case.kind)
    case.inputs = inputs_of(case.model, 0)
    outputs_of(case.model, case.inputs)
    case.calibration = [inputs_of(case.model, seed) for seed in range(10, 16)]
    if case.inputs.keys() <= {"input_ids", "decoder_input_ids"}:
        case.calibration = torch.cat([next(iter(batch.values())) for batch in case.calibration])
    case.model.save_pretrained(case.folder / "dense")
    case.load("dense")


def float32(case: Case) -> None:
    case.result = compressed(case, "dense", "out", case.calibration, **UNIFORM)
    case.outputs = outputs_of(aligned(case.result.model), case.inputs)
    require_same(case.outputs, outputs_of(case.load("out"), case.inputs))


def compressed(case: Case, model: str, output: str, calibration: Any, **options: Any) -> rankwise.Compressed:
    """The result of compressing the folder `model` of the case to its folder `output`."""
    options |= {"calibration": calibration, "output": case.folder / output}
    return rankwise.compress(case.folder / model, RATE, **options)


def generate(case: Case) -> str | None:
    prompt = {name: tensor for name, tensor in case.inputs.items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    if not case.model.can_generate():
        return "it writes no text"
    try:
        case.load("dense").generate(**prompt, **options)
    except Exception as error:
        return f"the original does not: {line_of(error)}"
    written = case.result.model.generate(**prompt, **options)
    again = case.load("out").generate(**prompt, **options)
    assert torch.equal(again, written), "loaded, it writes other tokens than in memory"
    return None


def densify(case: Case) -> None:
    rankwise.densify(case.folder / "out", case.folder / "plain")
    plain, dense = case.load("plain"), case.load("dense")
    ours, theirs = ({n: p.shape for n, p in model.named_parameters()}.items() for model in (plain, dense))
    assert ours == theirs, f"the parameters differ: {sorted(ours ^ theirs)[:3]}"
    require_close(case.outputs, outputs_of(plain, case.inputs))


def optimize(case: Case) -> None:
    require_close(case.outputs, outputs_of(rankwise.optimize(case.load("out")), case.inputs))


def bfloat16(case: Case) -> str | None:
    case.load("dense").to(torch.bfloat16).save_pretrained(case.folder / "half")
    inputs, given = in_bfloat16(case.inputs), case.calibration
    try:
        outputs_of(case.load("half"), inputs)
    except Exception as error:
        return f"the original does not run: {line_of(error)}"
    given = given if isinstance(given, Tensor) else list(map(in_bfloat16, given))
    result = compressed(case, "half", "half-out", given, **LEARNED)
    require_same(outputs_of(aligned(result.model), inputs), outputs_of(case.load("half-out"), inputs))
    return None


def stream(case: Case) -> None:
    options = UNIFORM | {"memory": "2GB", "effort": "quick"}
    streamed = compressed(case, "dense", "streamed", case.calibration, **options)
    answers = outputs_of(case.load("streamed"), case.inputs)
    ranks = case.result.ranks if case.result else {}
    if streamed.ranks.keys() == ranks.keys():  # what is outside of blocks stays dense
        assert streamed.ranks == ranks, "the ranks are others than in memory"
        require_close(case.outputs, answers)


STAGES: dict[str, Callable[[Case], str | None]] = {
    stage.__name__: stage for stage in (build, float32, generate, densify, optimize, bfloat16, stream)
}
OF_FLOAT32 = ("generate", "densify", "optimize")


def line_of(error: BaseException) -> str:
    """What was said, in one line without the names of folders that are gone."""
    text = re.sub(r"/\S*?/(dense|half|out|plain)\b", r"\1", " ".join(str(error).split()))[:250]
    said = isinstance(error, rankwise.RankwiseError | AssertionError)
    return text if said else f"{type(error).__name__}: {text}"


def verdict(stage: Callable[[Case], str | None], case: Case) -> str:
    """How the stage ended, and why where it does not work."""
    try:
        skipped = stage(case)
        return WORKS if skipped is None else f"{SKIPPED}: {skipped}"
    except rankwise.RankwiseError as error:
        return f"{REFUSED}: {line_of(error)}"
    except Exception as error:
        traceback.print_exc()
        return f"{FAILS}: {line_of(error)}"


def examine(case: Case, seconds: int) -> None:
    """Run the stages that can be run, and keep in the case's folder how each ended."""
    torch.set_num_threads(1)  # once in every process, or threads that load weights do it at the same time
    file, ends = case.folder / ENDS, Ends()
    for name, stage in STAGES.items():
        if name != "build" and ends.get("float32" if name in OF_FLOAT32 else "build") != WORKS:
            continue
        ends[name] = f"{FAILS}: its process crashed, or took more than {seconds} s"
        file.write_text(json.dumps(ends))
        ends[name] = verdict(stage, case)
        file.write_text(json.dumps(ends))


def tried(kind: str, auto: str, seconds: int) -> Ends:
    """How each stage of a case ended, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        case = Case(kind, auto, Path(folder))
        process = multiprocessing.get_context("fork").Process(target=examine, args=(case, seconds))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        ends: Ends = json.loads((case.folder / ENDS).read_text())
        return ends


def cases() -> dict[str, tuple[str, str]]:
    """Every case by its name: its model type, and its auto class."""
    causal = {kind: (kind, CAUSAL) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    others = [(kind, auto) for auto, kinds in OTHERS.items() for kind in kinds.split()]
    return causal | {f"{kind} ({auto})": (kind, auto) for kind, auto in others}


def works(ends: Ends) -> bool:
    return not any(end.startswith((REFUSED, FAILS)) for name, end in ends.items() if name != "stream")


def remark_of(ends: Ends) -> str:
    """What does not work, and why."""
    said = [f"{name} {end}" for name, end in ends.items() if end != WORKS and "writes no text" not in end]
    return "; ".join(said).replace("|", "/")


def row_of(name: str, ends: Ends) -> str:
    answers = ("yes" if yes else "no" for yes in (works(ends), ends["stream"] == WORKS))
    return f"| {name} | {' | '.join(answers)} | {remark_of(ends)} |"


def page_of(found: dict[str, Ends]) -> str:
    """The totals and the table, as Markdown."""
    built = {name: ends for name, ends in found.items() if ends["build"] == WORKS}
    whole = [name for name, ends in built.items() if works(ends)]
    failing = [name for name, ends in built.items() if FAILS in remark_of(ends | {"stream": WORKS})]
    streaming = [name for name, ends in built.items() if ends["stream"] == WORKS]
    unclear = [name for name, ends in built.items() if ends["stream"].startswith(FAILS)]
    popular = MOST_USED.split()
    absent = [name for name in popular if name not in streaming]
    rows = "\n".join(row_of(name, ends) for name, ends in sorted(built.items()))
    others = "".join(f"\n- {name}: {remark_of(ends)}" for name, ends in found.items() if name not in built)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return f"""Tiny random models of every type that transformers knows for causal text, and of others
({versions}): compressed by path in float32 with uniform ranks and in bfloat16
with the default allocation, saved, loaded again bit for bit, generated with, densified, optimized, and
compressed block by block (`memory`).

| | |
|---|---|
| models that transformers builds, runs and loads | {len(built)} |
| work whole | {len(whole)} |
| do not: refused in a line | {len(built) - len(whole) - len(failing)} |
| do not: fail | {len(failing)} |
| stream | {len(streaming)} |
| do not: refused in a line | {len(built) - len(streaming) - len(unclear)} |
| do not: fail | {len(unclear)} |
| of the {len(popular)} most used, stream | {len(popular) - len(absent)} |

The most used are {", ".join(popular)}.

| type | works | streams | what does not, and why |
|---|---|---|---|
{rows}

Not built:
{others}
"""


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types, by default all")
    parser.add_argument("--seconds", type=int, default=150, help="after which a case is ended")
    parser.add_argument("--configs", type=Path, default=HERE.parent.parent / "shared" / "architectures")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "architectures.json")
    args = parser.parse_args()
    sys.path.append(str(args.configs))
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:  # once, so that every process has imported what it needs
        examine(Case("llama", CAUSAL, Path(folder)), args.seconds)
    found: dict[str, Ends] = json.loads(args.results.read_text()) if args.results.exists() else {}
    for name, (kind, auto) in cases().items():
        if kind not in args.types if args.types else name in found:
            continue
        since = time.perf_counter()
        found[name] = tried(kind, auto, args.seconds)
        args.results.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name:48} {time.perf_counter() - since:5.1f} s  {remark_of(found[name])}", flush=True)
    args.results.with_suffix(".md").write_text(page_of(found))


if __name__ == "__main__":
    main()
