"""Conversations: read from rows, put in the model's chat template, and written by the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from architectures import build
from transformers import AutoTokenizer

import rankwise as package
from rankwise import RankwiseError
from rankwise.calibration.chat import in_template, opening
from rankwise.calibration.text import read_documents
from rankwise.calibration.tokens import windows_of

Run = Callable[..., Any]
TEMPLATE = """{{ bos_token }}{% for message in messages %}{% if message.role not in ["system", "user", "assistant"] %}
{{ raise_exception("no such role") }}{% endif %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"""
QUESTION, ANSWER = "Who met the budget?", "The low rank matrix."
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
SHAREGPT = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
WRITTEN = f"<s><user>{QUESTION}</s><assistant>{ANSWER}</s>"


@pytest.fixture(scope="module")
def instruct(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template; its tokenizer itself begins every text with <s>, as the template does."""
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path_factory.mktemp("models") / "instruct"
    tokenizer = AutoTokenizer.from_pretrained(llama)
    begins = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = begins
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    build("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "chats.jsonl"
    rows = [{"messages": MESSAGES}, {"conversations": SHAREGPT}, {"messages": None}, {"messages": []}] * 20
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"messages": MESSAGES}, "text"),
        ({"messages": [{**message, "tool_calls": None} for message in MESSAGES]}, "text"),
        ({"conversations": SHAREGPT}, "text"),
        ({"conversations": MESSAGES}, "text"),
        ({"dialogue": SHAREGPT, "text": "another"}, "dialogue"),
    ],
)
def test_both_spellings_are_the_same_conversation(row: dict[str, Any], column: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert read_documents(str(tmp_path / "rows.jsonl"), column) == [MESSAGES]


def test_a_text_beside_messages_is_taken(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "Once", "messages": MESSAGES}))
    assert read_documents(str(tmp_path / "rows.jsonl")) == ["Once"]


def test_no_special_token_is_added_twice(instruct: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    assert tokenizer(QUESTION)["input_ids"][0] == 1
    expected = tokenizer(WRITTEN, add_special_tokens=False)["input_ids"]
    assert expected.count(1) == 1
    assert windows_of(tokenizer, [MESSAGES], len(expected)).tolist() == [expected]


def test_templates_are_told_the_same_day_every_day(instruct: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}: {{ messages[0].content }}"
    assert in_template(tokenizer, MESSAGES) == f"01 January 2025: {QUESTION}"


def test_the_report_says_that_the_template_was_used(
    rankwise: Run, instruct: Path, chats: Path, story: Path, tmp_path: Path
) -> None:
    size = ["--samples", 12, "--length", 32]
    compress = ["compress", instruct, "--allocation", "uniform", *size]
    told = rankwise(*compress, "--calibration", chats, "-o", tmp_path / "chat")
    assert told.code == 0, told.err
    assert "the calibration text holds 40 conversations, in the model's chat template" in told.out
    assert json.loads((tmp_path / "chat" / "report.json").read_text())["conversations"] == 40
    plain = rankwise(*compress, "--calibration", story, "-o", tmp_path / "plain")
    assert plain.code == 0, plain.err
    assert "conversations" not in plain.out
    evaluate = ["evaluate", tmp_path / "chat", "--reference", instruct, *size, "--cache", tmp_path / "cache"]
    told = rankwise(*evaluate, "--text", chats, "--text", story)
    assert told.code == 0, told.err
    assert "it holds 40 conversations, in the model's chat template" in told.out
    report = json.loads(rankwise(*evaluate, "--text", chats, "--text", story, "--json").out)
    assert [row["conversations"] for row in report["texts"].values()] == [40, 0]
    artifact = tmp_path / "artifact"
    assert rankwise("decompose", instruct, "--calibration", chats, "-o", artifact, *size).code == 0
    quick = rankwise("compress", artifact, "-o", tmp_path / "quick", "--json")
    assert json.loads(quick.out)["conversations"] == 40


def test_conversations_in_memory(instruct: Path) -> None:
    model, tokenizer = build("llama"), AutoTokenizer.from_pretrained(instruct)
    result = package.compress(
        model, 0.3, calibration=[MESSAGES, SHAREGPT] * 9, tokenizer=tokenizer, samples=12, length=32, allocation="uniform"
    )
    assert result.report["conversations"] == 18


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"speaker": "me"}]},
            "line 1: message 1 has neither role and content nor from and value",
        ),
        ({"messages": ["Hello"]}, "message 1 has neither role"),
        (
            {"messages": [{"role": "cook", "content": "Soup?"}]},
            "chat template does not accept the conversation .*no such role",
        ),
    ],
)
def test_what_is_no_conversation(row: dict[str, Any], message: str, instruct: Path, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps(row))
    with pytest.raises(RankwiseError, match=message):
        package.compress(instruct, 0.3, calibration=tmp_path / "chats.jsonl", length=16)


def test_a_model_without_a_template_says_what_to_do(rankwise: Run, llama: Path, chats: Path, tmp_path: Path) -> None:
    finished = rankwise("compress", llama, "--calibration", chats, "-o", tmp_path / "out")
    assert finished.code == 2
    assert finished.err.count("\n") == 1
    assert "no chat template: use the model that was made for chat" in finished.err


def test_an_instruct_model_writes_dialogues_and_other_text(instruct: Path, llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    begun = tokenizer("<s><user>", add_special_tokens=False)["input_ids"]
    assert opening(tokenizer, 32) == begun
    options: dict[str, Any] = {"samples": 12, "length": 32}
    package.decompose(instruct, tmp_path / "instruct", **options)
    package.decompose(llama, tmp_path / "base", **options)
    for name, dialogues in (("instruct", 6), ("base", 0)):
        windows = package.decomposing.Artifact.at(tmp_path / name).windows()
        assert windows.shape == (12, 32)
        assert (windows[:, 0] == 1).all()
        assert len(windows[:, len(begun)].unique()) > 3
        assert (windows[:, : len(begun)] == windows.new_tensor(begun)).all(1).sum() == dialogues
    report = package.compress(tmp_path / "instruct", 0.3).report
    assert report["conversations"] == 6


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no') }}",
        "{{ messages[0].content | upper | reverse }}",
        "{{ messages[0].content }}" + "{{ 1/0 }}",
    ],
)
def test_where_the_template_cannot_be_split_the_model_begins_as_ever(template: str | None, instruct: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    tokenizer.chat_template = template
    assert opening(tokenizer, 1000) == []
    assert opening(None, 1000) == []


def test_a_beginning_longer_than_half_a_window_is_none(instruct: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    size = len(opening(tokenizer, 1000))
    assert opening(tokenizer, 2 * size)
    assert opening(tokenizer, 2 * size - 1) == []
