"""Conversations as a model reads them: through the chat template of its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankwise.errors import RankwiseError

Conversation = list[dict[str, Any]]  # messages, each with its role and content
ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT names them
# Templates that tell the date are told always the same one: what has the same words has the same tokens every day.
TODAY = "{% macro strftime_now(format) %}01 January 2025{% endmacro %}"
MARKER = "WORDS-OF-THE-USER"


def conversation(messages: Any, where: str) -> Conversation:
    """Messages with `role` and `content`, or ShareGPT's with `from` and `value`, as a chat template takes them.

    Raises `RankwiseError` for one that has neither; `where` says whose it is.
    """
    turns = []
    for number, message in enumerate(messages if isinstance(messages, list) else [messages], start=1):
        turn = {name: value for name, value in message.items() if value is not None} if isinstance(message, Mapping) else {}
        if "from" in turn and "value" in turn:
            turn = {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
        if "role" not in turn or not turn.keys() & {"content", "tool_calls"}:
            raise RankwiseError(f"{where}: message {number} has neither role and content nor from and value")
        turns.append({"content": "", **turn})
    return turns


def count_conversations(documents: Iterable[str | Conversation]) -> int:
    """How many of the documents are conversations."""
    return sum(not isinstance(document, str) for document in documents)


def in_template(tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> str:
    """The conversation as one text, with the template's own special tokens.

    Raises `RankwiseError` where there is no template, and where it refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RankwiseError(
            "the text holds conversations, but the model's tokenizer has no chat template: use "
            "the model that was made for chat, save a template with its tokenizer, or name a "
            "field of plain text with text_column",
        )
    try:
        template = TODAY + tokenizer.get_chat_template()
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
    except Exception as error:  # templates refuse in many ways, most of them by words of their own
        raise RankwiseError(
            f"the model's chat template does not accept the conversation {str(messages)[:80]!r}: {error}"
        ) from None


def opening(tokenizer: PreTrainedTokenizerBase | None, length: int) -> list[int]:
    """The tokens with which a conversation begins, up to the user's first word.

    Empty without a template, for one that does not repeat the user's words as they are, and where these tokens would take more
    than half of a window of `length`.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return []
    try:
        text, found, _ = in_template(tokenizer, [{"role": "user", "content": MARKER}]).partition(MARKER)
    except RankwiseError:
        return []
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"]) if found else []
    return ids if len(ids) <= length // 2 else []
