"""Rows with images or videos as prompts: the conversation up to the answer, and the answer. No torch.

The controller sends the messages alone (parts without their media: pixels do not travel). Whoever needs
the media, the replica that generates and the policy rank that trains, reads the same row again and makes
the same of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hpc_rl.data.chat import (
    Conversation,
    Message,
    as_messages,
    conversation_of,
    row_has_media,
    text_of,
    with_media,
)
from hpc_rl.data.errors import DataError
from hpc_rl.recipe.schema import DatasetSpec

QUESTION = "qa_pairs"
_ASKED = (
    "\nAnswer with the option's letter from the given choices directly."
    "\nPlease answer the question in the following format: "
    "<think> your reasoning </think> <answer> your answer </answer>."
)


@dataclass(frozen=True)
class MediaRow:
    """`conversation` up to where the answer begins; `used` are the columns that it and the answer are of."""

    conversation: Conversation
    answer: str | None
    used: frozenset[str]


def conversation_row(row: dict[str, Any], spec: DatasetSpec, where: str) -> MediaRow:
    """A row of format llava or cosmos_reason1, or of format chat with media. Raises DataError.

    The answer is the column `spec.answer` where there is one, else the last message if it is the
    assistant's. A row of cosmos_reason1 with `qa_pairs` is a multiple-choice question instead.
    """
    media = frozenset((spec.images, "image", spec.videos, "video"))
    if spec.format == "cosmos_reason1" and row.get(QUESTION) is not None:
        text, answer = choice_question(row[QUESTION], f"{where}: column {QUESTION!r}")
        return MediaRow(with_media(as_messages(text, spec), row, spec, where), answer, media)
    conversation = conversation_of(row, spec, where)
    column = spec.messages if spec.format == "chat" else "conversations"
    used, answer = media | {column, spec.answer}, None
    if conversation.messages[-1]["role"] == "assistant":
        answer = text_of(conversation.messages[-1]["content"])
        conversation = _up_to(conversation, len(conversation.messages) - 1)
    if not conversation.messages:
        raise DataError(f"{where}: column {column!r} has no message before the answer")
    if row.get(spec.answer) is not None:
        answer = str(row[spec.answer])
    return MediaRow(conversation, answer, used)


def has_parts(row: dict[str, Any], spec: DatasetSpec) -> bool:
    """Whether a row of any format has images or videos, in columns or (format chat) in its messages."""
    if row_has_media(row, spec):
        return True
    messages = row.get(spec.messages) if spec.format == "chat" else None
    if not isinstance(messages, list):
        return False
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    return any(isinstance(content, list) and _media_in(content) for content in contents)


def has_media(content: str | list[Message]) -> bool:
    """Whether the content of a prompt has a place for an image or a video."""
    return isinstance(content, list) and any(
        isinstance(message["content"], list) and _media_in(message["content"]) for message in content
    )


def choice_question(pairs: Any, where: str) -> tuple[str, str]:
    """`(question with its choices and the form of the answer, the right letter)` of `{question, index2ans,
    answer}`, in the words that cosmos-rl's `cosmos_grpo.py` asks Cosmos-Reason1. Raises DataError."""
    if not isinstance(pairs, dict) or not isinstance(pairs.get("index2ans"), dict):
        raise DataError(f"{where} must have question, index2ans (letter: choice) and answer")
    choices = {letter: text for letter, text in pairs["index2ans"].items() if text is not None}
    question, answer = pairs.get("question"), pairs.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str) or not choices:
        raise DataError(f"{where} must have a question, at least one choice in index2ans, and an answer")
    listed = "\n".join(f"({letter}) {text}" for letter, text in choices.items())
    return f"{question}\n{listed}{_ASKED}", answer


def _media_in(parts: list[Any]) -> bool:
    kinds = ("image", "video", "image_url")
    return any(isinstance(part, dict) and part.get("type") in kinds for part in parts)


def _up_to(conversation: Conversation, count: int) -> Conversation:
    """The first `count` messages with the media that are in them."""
    messages = conversation.messages[:count]
    parts = [part["type"] for m in messages if isinstance(m["content"], list) for part in m["content"]]
    images, videos = conversation.images[: parts.count("image")], conversation.videos[: parts.count("video")]
    return replace(conversation, messages=messages, images=images, videos=videos)
