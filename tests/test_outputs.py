"""Models that answer with something else than one token out of a vocabulary, and inputs that are no windows of text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from architectures import SMALL, VOCABULARY
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence
from transformers import BatchEncoding

import rankwise
from rankwise import RankwiseError, compress
from rankwise.calibration.outputs import Kind
from rankwise.calibration.signal import Signal, divergence, frozen, sampled_loss, signal_of, values_of, with_draws
from rankwise.calibration.tokens import Batch, window_length

WINDOWS = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(0))
FAST: dict[str, Any] = {"allocation": "uniform", "decomposition": "whitened"}
KRONECKER: dict[str, Any] = {"allocation": "uniform", "decomposition": "kronecker"}
LEARNED: dict[str, Any] = {"allocation": "llrc", "options": {"points": 0, "rounds": 1, "value_steps": 1}}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def varied(cls: Any, config: Any) -> Any:
    """Random weights that make a difference, the same at each call."""
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def bert(kind: str, **changes: Any) -> Any:
    return varied(getattr(t, f"BertFor{kind}"), t.BertConfig(**SMALL | {"num_hidden_layers": 1} | changes))


def clip() -> Any:
    text = SMALL | {"num_hidden_layers": 1, "projection_dim": 24}
    return varied(t.CLIPModel, t.CLIPConfig(text_config=text, vision_config=VISION | {"projection_dim": 24}, projection_dim=24))


# What is compared, as torch's own distributions say it: of the logits or whatever the model answers with.
OUTPUTS: dict[str, tuple[Callable[[], Any], Kind, Callable[[Any], Tensor]]] = {
    "regression": (lambda: bert("SequenceClassification", num_labels=1), "gaussian", lambda o: o.logits),
    "regression of several": (
        lambda: bert("SequenceClassification", num_labels=3, problem_type="regression"),
        "gaussian",
        lambda o: o.logits,
    ),
    "one value of each token": (lambda: bert("TokenClassification", num_labels=1), "gaussian", lambda o: o.logits.flatten(0, 1)),
    "several labels at once": (
        lambda: bert("SequenceClassification", num_labels=5, problem_type="multi_label_classification"),
        "bernoulli",
        lambda o: o.logits,
    ),
    "replaced tokens": (
        lambda: varied(t.ElectraForPreTraining, t.ElectraConfig(**SMALL, embedding_size=48)),
        "bernoulli",
        lambda o: o.logits.flatten()[:, None],
    ),
    "classes": (lambda: bert("SequenceClassification", num_labels=4), "categorical", lambda o: o.logits),
    "places of an answer": (
        lambda: bert("QuestionAnswering"),
        "categorical",
        lambda o: torch.stack((o.start_logits, o.end_logits), 1).flatten(0, 1),
    ),
    "tokens and more": (lambda: bert("PreTraining"), "categorical", lambda o: o.prediction_logits.flatten(0, 1)),
    "embeddings": (clip, "features", lambda o: torch.cat((o.text_embeds, o.image_embeds))),
}


def batch_for(name: str) -> Batch:
    pictures = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"input_ids": WINDOWS[:4]} | ({"pixel_values": pictures} if name == "embeddings" else {})


def total_kl(kind: Kind, p: Tensor, q: Tensor) -> float:
    if kind == "categorical":
        return kl_divergence(Categorical(logits=p), Categorical(logits=q)).sum().item()
    if kind == "bernoulli":
        return kl_divergence(Bernoulli(logits=p), Bernoulli(logits=q)).sum().item()
    scale = 1.0 if kind == "gaussian" else p.var(dim=0).mean().sqrt().item()
    return kl_divergence(Normal(p, scale), Normal(q, scale)).sum().item()


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_models_answer_is_read_as_what_it_is(name: str) -> None:
    make, kind, rows = OUTPUTS[name]
    model, other, batch = make(), make(), batch_for(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
        outputs = [rows(m(**batch)) for m in (model, other)]
        signals = [signal_of(m, batch) for m in (model, other)]
    assert signals[0].kind == kind
    assert len(signals[0]) == len(outputs[0])
    assert divergence(signals[0], signals[0]).item() == pytest.approx(0, abs=1e-6)
    assert divergence(*signals).item() == pytest.approx(total_kl(kind, *outputs), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["regression", "several labels at once", "replaced tokens"])
def test_ranks_are_learned_of_what_models_answer(name: str) -> None:
    make, _, rows = OUTPUTS[name]
    with torch.no_grad():
        expected = rows(make()(input_ids=WINDOWS))
    errors = []
    for options in (FAST, LEARNED):
        result = compress(make(), 0.2, calibration=WINDOWS, **options)
        assert result.report["agreement"] is None
        with torch.no_grad():
            errors.append((rows(result.model(input_ids=WINDOWS)) - expected).square().mean().item())
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("name", ["places of an answer", "embeddings"])
def test_models_without_logits_are_compressed(name: str) -> None:
    batches = [{n: tensor.roll(i, dims=-1) for n, tensor in batch_for(name).items()} for i in range(3)]
    report = compress(OUTPUTS[name][0](), 0.2, calibration=batches, **FAST).report
    assert report["kl"] > 0
    assert len(report["ranks"]) >= 6
    assert (report["agreement"] is None) == (name == "embeddings")


def test_sampled_yes_and_no_are_independent_of_each_other() -> None:
    count, p = 20_000, torch.tensor([0.9, 0.5, 0.5])
    logits = p.logit().expand(count, 3).clone().requires_grad_()
    (batch,) = with_draws([{"input_ids": torch.zeros(1, count, dtype=torch.long)}], seed=0)
    sampled_loss(Signal(logits, "bernoulli"), batch).backward()
    assert logits.grad is not None
    labels = logits.detach().sigmoid() - logits.grad  # the gradient of each is p - label
    torch.testing.assert_close(labels, labels.round(), atol=1e-5, rtol=0)
    torch.testing.assert_close(labels.mean(0), p, atol=0.015, rtol=0)
    covariance = labels.T.cov()
    torch.testing.assert_close(covariance, (p * (1 - p)).diag(), atol=0.01, rtol=0)


def test_a_model_of_classes_predicts_no_text() -> None:
    """Its classes are not the tokens that the text would be its loss of."""
    with pytest.raises(RankwiseError, match="predicts no tokens of a text"):
        compress(bert("TokenClassification", num_labels=3), 0.2, calibration=WINDOWS, allocation="zero-sum")


def llama_classifier(**changes: Any) -> Any:
    return varied(t.LlamaForSequenceClassification, t.LlamaConfig(**SMALL | {"num_labels": 3, "pad_token_id": None} | changes))


def test_without_a_padding_token_sequences_are_read_together() -> None:
    model = llama_classifier()
    with frozen(model), torch.no_grad():
        together, _ = values_of(model, {"input_ids": WINDOWS})
        alone = torch.cat([values_of(model, {"input_ids": window[None]})[0] for window in WINDOWS])
    torch.testing.assert_close(together, alone)
    result = compress(model, 0.2, calibration=WINDOWS, **FAST)
    assert result.model.config.pad_token_id is None
    padded = {"input_ids": WINDOWS[:3], "attention_mask": torch.ones(3, 16).triu()}
    with pytest.raises(RankwiseError, match=r"does not run on .*: Cannot handle batch sizes > 1"):
        compress(llama_classifier(), 0.2, calibration=[padded] * 12, **FAST)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "positions after the padding": lambda: t.RobertaForMaskedLM(
        t.RobertaConfig(**SMALL | {"max_position_embeddings": 34, "pad_token_id": 1})
    ),
    "a text config": lambda: t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(text_config=SMALL | {"max_position_embeddings": 32, "head_dim": 12}, vision_config=VISION)
    ),
    "an encoder and a decoder": lambda: t.EncoderDecoderModel(
        t.EncoderDecoderConfig.from_encoder_decoder_configs(
            *(t.BertConfig(**SMALL | {"max_position_embeddings": length}) for length in (32, 40))
        )
    ),
    "another name": lambda: t.MptForCausalLM(
        t.MptConfig(vocab_size=VOCABULARY, d_model=48, n_layers=1, n_heads=4, max_seq_len=32)
    ),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_windows_are_as_long_as_the_models_context(name: str) -> None:
    model = CONTEXTS[name]()
    assert window_length(model) == 32
    with pytest.raises(RankwiseError, match="length=33: a window has from 2 to 32"):
        window_length(model, 33)
    with torch.no_grad():
        sides = ("input_ids", "decoder_input_ids") if model.config.is_encoder_decoder else ("input_ids",)
        model(**dict.fromkeys(sides, torch.full((1, 32), 5)))


def test_a_model_that_does_not_run_on_the_calibration_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.stages.collect_statistics", lambda *_: pytest.fail("the long work has begun"))
    model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=1, n_head=4, n_positions=32, bos_token_id=1))
    with pytest.raises(RankwiseError, match=r"GPT2LMHeadModel does not run on input_ids \[1, 40\], of the calibration: "):
        compress(model, 0.2, calibration=WINDOWS.repeat(1, 3)[:, :40], **FAST)
    with pytest.raises(RankwiseError, match=r"BertForMultipleChoice does not run on input_ids \[1, 16\]"):
        compress(bert("MultipleChoice"), 0.2, calibration=WINDOWS, **FAST)
    with pytest.raises(RankwiseError, match="ViTModel does not read text alone"):
        compress(t.ViTModel(t.ViTConfig(**VISION)), 0.2, calibration=WINDOWS, **FAST)


def test_a_first_token_that_the_model_does_not_have_is_not_taken() -> None:
    model = varied(t.GPT2LMHeadModel, t.GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=1, n_head=4, n_positions=32))
    assert model.generation_config.bos_token_id >= VOCABULARY
    report = compress(model, 0.2, samples=10, **FAST).report
    assert report["tokens"] / report["windows"] == 31


def gemma3n() -> Any:
    config = t.Gemma3nTextConfig(
        **SMALL | {"num_key_value_heads": 2, "head_dim": 12, "layer_types": ["sliding_attention", "full_attention"]},
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0, 0.0],
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
    )
    return varied(t.Gemma3nForCausalLM, config)


def longformer() -> Any:
    config = t.LongformerConfig(**SMALL | {"max_position_embeddings": 34}, attention_window=8)
    return varied(t.LongformerForMaskedLM, config)


@pytest.mark.parametrize(("make", "first"), [(gemma3n, "q_proj"), (longformer, "query")])
def test_what_is_changed_in_place_has_gradients_too(make: Callable[[], Any], first: str) -> None:
    report = compress(make(), 0.2, calibration=WINDOWS, **KRONECKER).report
    assert any(name.endswith(first) for name in report["ranks"])


def reformer() -> Any:
    axial = {"axial_pos_shape": [4, 16], "axial_pos_embds_dim": [16, 32], "attn_layers": ["local"], "local_attn_chunk_length": 8}
    small = {"vocab_size": VOCABULARY, "hidden_size": 48, "attention_head_size": 12, "feed_forward_size": 64}
    config = t.ReformerConfig(**small, **axial, num_attention_heads=4, is_decoder=True, pad_token_id=0)
    return varied(t.ReformerModelWithLMHead, config)


def test_reversible_blocks_are_refused_where_gradients_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compress(reformer(), 0.2, calibration=WINDOWS, **FAST).report["kl"] > 0
    monkeypatch.setattr("rankwise.starting.own_windows", lambda *_: pytest.fail("the long work has begun"))
    for options in (LEARNED, LEARNED | {"decomposition": "whitened"}, KRONECKER):
        with pytest.raises(RankwiseError, match="ReformerModelWithLMHead has a backward pass of its own"):
            compress(reformer(), 0.2, samples=8, length=16, **options)


def qwen_vl(version: int) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    text = SMALL | {"num_hidden_layers": 1, "num_key_value_heads": 2, "rope_parameters": rope}
    vision: dict[str, Any] = {"depth": 1, "hidden_size": 48, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2}
    tokens = {"image_token_id": 90, "vision_start_token_id": 91, "vision_end_token_id": 92, "video_token_id": 93}
    if version == 2:
        return varied(
            t.Qwen2VLForConditionalGeneration,
            t.Qwen2VLConfig(text_config=text, vision_config=vision | {"embed_dim": 48}, **tokens),
        )
    vision |= {"intermediate_size": 64, "out_hidden_size": 48, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = t.Qwen3VLConfig(text_config=text | {"head_dim": 12}, vision_config=vision, **tokens)
    return varied(t.Qwen3VLForConditionalGeneration, config)


def pictures(sequences: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 80, (sequences, 16), generator=generator)
    ids[:, 4:8] = 90
    patches = torch.randn(16 * sequences, 384, generator=generator)
    grids = torch.tensor([[1, 4, 4]] * sequences)
    return {"pixel_values": patches, "input_ids": ids, "mm_token_type_ids": (ids == 90).long(), "image_grid_thw": grids}


@pytest.mark.parametrize(("version", "options"), [(2, FAST), (3, FAST), (3, LEARNED)])
def test_batches_of_packed_patches_are_never_cut(version: int, options: dict[str, Any]) -> None:
    model = qwen_vl(version)
    shapes = set[tuple[int, ...]]()
    visual = model.model.visual
    visual.register_forward_pre_hook(
        lambda _, inputs, named: shapes.add(tuple((*inputs, *named.values())[0].shape)), with_kwargs=True
    )
    report = compress(model, 0.2, calibration=[pictures(2, seed) for seed in range(4)], **options).report
    assert shapes == {(32, 384)}
    assert (report["windows"], report["tokens"]) == (2, 2 * 15)
    assert {name.split(".")[1] for name in report["ranks"]} == {"visual", "language_model"}


def same_ranks(*calibrations: Any) -> None:
    results = [compress(llama(), 0.2, calibration=calibration, **FAST).report for calibration in calibrations]
    for report in results[1:]:
        assert (report["ranks"], report["kl"], report["tokens"]) == tuple(results[0][key] for key in ("ranks", "kl", "tokens"))


def llama(**changes: Any) -> Any:
    return varied(t.LlamaForCausalLM, t.LlamaConfig(**SMALL | {"num_hidden_layers": 1} | changes))


def test_batches_may_come_in_any_clothes() -> None:
    whole = {"input_ids": WINDOWS}
    rows = [{"input_ids": window} for window in WINDOWS.int()]
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=12)  # type: ignore[arg-type]
    same_ranks([whole], whole, BatchEncoding(whole), [BatchEncoding(whole)], loader, iter([whole]))


def test_windows_may_be_any_whole_numbers() -> None:
    same_ranks(WINDOWS, WINDOWS.int(), WINDOWS.to(torch.uint8))


def test_documents_may_come_from_anywhere(llama: Any, story: Any) -> None:
    text = story.read_text()
    documents = [text[i : i + 400] for i in range(0, 4000, 400)]
    asked = {"length": 16, "samples": 12, **FAST}
    listed, streamed = (compress(llama, 0.2, calibration=given, **asked).report for given in (documents, (d for d in documents)))
    assert listed["kl"] == streamed["kl"]


def test_what_is_no_batch_is_refused() -> None:
    for wrong in ([{"text": "Once"}], [{}], [{"input_ids": [1, 2, 3]}], [3], iter([])):
        with pytest.raises(RankwiseError, match="calibration"):
            compress(llama(), 0.2, calibration=wrong, **FAST)


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_gradients_are_there_whatever_the_caller_has_switched_off(switched_off: Callable[[], Any]) -> None:
    expected, model = compress(llama(), 0.2, calibration=WINDOWS, **KRONECKER).report["kl"], llama()
    with switched_off():
        assert compress(model, 0.2, calibration=WINDOWS, **KRONECKER).report["kl"] == expected


def on_meta() -> Any:
    model = llama()
    model.model.layers[0].mlp.to("meta")  # as what is offloaded to a disk is
    return model


def compiled_in_place() -> Any:
    model = llama()
    model.compile()
    return model


@torch.inference_mode()
def made_in_inference_mode() -> Any:
    return llama()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.compile(llama()), "OptimizedModule is not a transformers model.*_orig_mod"),
        (lambda: torch.nn.DataParallel(llama()), "DataParallel is not a transformers model"),
        (compiled_in_place, "the LlamaForCausalLM is compiled"),
        (on_meta, r"model.layers.0.mlp.gate_proj.weight is not in memory.*--memory"),
        (made_in_inference_mode, "takes no gradients"),
    ],
)
def test_what_is_no_model_in_memory_is_refused_by_name(make: Callable[[], Any], message: str, tmp_path: Any) -> None:
    model = make()
    for work in (lambda: compress(model, 0.2, calibration=WINDOWS), lambda: rankwise.decompose(model, tmp_path / "out")):
        with pytest.raises(RankwiseError, match=message):
            work()


def test_a_config_that_asks_for_tuples_is_the_same_model() -> None:
    asked: dict[str, Any] = {"samples": 10, "length": 16, **FAST}
    plain, tuples = compress(llama(), 0.2, **asked), compress(llama(return_dict=False), 0.2, **asked)
    assert plain.report["kl"] == tuples.report["kl"]
    assert tuples.model.config.return_dict is False


def test_a_rate_of_little_is_told(caplog: pytest.LogCaptureFixture) -> None:
    report = compress(llama(), 0.2, calibration=WINDOWS, include=("*q_proj",), **FAST).report
    share = report["parameters"]["linear"]["reference"] / report["parameters"]["model"]["reference"]
    (note,) = report["notes"]
    assert f"only {share:.0%} of the model's parameters" in note
    assert note in caplog.text
    assert compress(llama(), 0.2, calibration=WINDOWS, **FAST).report["notes"] == []


def test_why_a_matrix_stays_dense_is_said_rightly() -> None:
    config = t.MambaConfig(vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=1, state_size=8, time_step_rank=8)
    report = compress(varied(t.MambaForCausalLM, config), 0.2, calibration=WINDOWS, **FAST).report
    assert report["left_dense"]["backbone.layers.0.mixer.dt_proj"] == "the model does not call it, but may read its weight"
    pooled = varied(t.BertModel, t.BertConfig(**SMALL))
    report = compress(pooled, 0.2, calibration=WINDOWS, **KRONECKER).report
    assert report["left_dense"]["pooler.dense"] == "nothing that the model answers depends on it"
    options = KRONECKER | {"include": ("pooler*",)}
    with pytest.raises(RankwiseError, match="the calibration reaches none of the matrices"):
        compress(varied(t.BertModel, t.BertConfig(**SMALL)), 0.2, calibration=WINDOWS, **options)
