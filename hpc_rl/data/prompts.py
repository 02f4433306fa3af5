"""What a row means: the prompt, its verifiable answer, the completion to learn, the fields for rewards.

No torch and no tokenizer: text and chat messages only. `data/encode.py` turns them into token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hpc_rl.data.chat import (
    CHAT_FORMATS,
    ROLES,
    Conversation,
    as_messages,
    conversation_of,
    with_media,
    wrap,
)
from hpc_rl.data.errors import DataError
from hpc_rl.data.prompt_rows import MediaRow, conversation_row, has_parts
from hpc_rl.data.templates import ChatTemplate
from hpc_rl.data.turns import renderings
from hpc_rl.recipe.schema import DatasetSpec

if TYPE_CHECKING:
    from hpc_rl.data.rows import Rows

Message = dict[str, Any]
Content = str | list[Message]


def prompt_of(
    row: dict[str, Any], spec: DatasetSpec, where: str = ""
) -> tuple[Content, str | None, dict[str, Any]]:
    """`(content, answer, fields)` of one row for RL and evaluation.

    `content` is a list of chat messages when the row holds a chat, when `spec.chat` is true or a
    `system` text is given; otherwise a string, which whoever tokenises wraps as one user message
    if `spec.chat` is null and the tokenizer has a chat template. `answer` is the verifiable answer
    (the reference completion for `prompt_completion` and `chat`, the last answer of a conversation).
    `fields` are the other columns that can travel in a message; images and bytes are left out. Where a
    row has media, `content` has their places alone (`media_row` has them). Raises DataError, starting
    with `where`, if a column is missing or of the wrong kind.
    """
    where = where or spec.path
    found = media_row(row, spec, where)
    if found is not None:
        fields = {key: value for key, value in row.items() if key not in found.used and is_plain(value)}
        return found.conversation.messages, found.answer, fields
    return _text_prompt(row, spec, where)


def _text_prompt(
    row: dict[str, Any], spec: DatasetSpec, where: str
) -> tuple[Content, str | None, dict[str, Any]]:
    """`prompt_of` for a row without media."""
    if spec.format == "chat":
        messages, answer = _split_chat(row, spec, where)
        used = {spec.messages}
        content: Content = messages
        if spec.answer in row:
            answer = _as_text(row[spec.answer], spec.answer, where)
            used.add(spec.answer)
    elif spec.format == "text":
        content, answer, used = _prompt_text(row, spec, spec.text, where), None, {spec.text}
    else:
        column = spec.answer if spec.format == "prompt_answer" else spec.completion
        content = _prompt_text(row, spec, spec.prompt, where)
        answer = _as_text(_column(row, column, where), column, where)
        used = {spec.prompt, column}
    if isinstance(content, str) and (spec.system is not None or spec.chat):
        content = as_messages(content, spec)
    fields = {key: value for key, value in row.items() if key not in used and is_plain(value)}
    return content, answer, fields


def media_row(row: dict[str, Any], spec: DatasetSpec, where: str = "") -> MediaRow | None:
    """A row with images or videos, or of a format that may have some, as a prompt; None for other rows.

    Raises DataError.
    """
    where = where or spec.path
    if spec.format in ("llava", "cosmos_reason1"):
        return conversation_row(row, spec, where)
    if not has_parts(row, spec):
        return None
    if spec.format == "chat":
        return conversation_row(row, spec, where)
    used, answer = {spec.images, "image", spec.videos, "video"}, None
    if spec.format == "text":
        text = _prompt_text(row, spec, spec.text, where)
        used.add(spec.text)
    else:
        column = spec.answer if spec.format == "prompt_answer" else spec.completion
        text = _prompt_text(row, spec, spec.prompt, where)
        answer = _as_text(_column(row, column, where), column, where)
        used |= {spec.prompt, column}
    if spec.chat is False:
        raise DataError(f"{where} has images or videos, which only a chat template places: drop chat: false")
    return MediaRow(with_media(as_messages(text, spec), row, spec, where), answer, frozenset(used))


def completion_of(row: dict[str, Any], spec: DatasetSpec, where: str = "") -> tuple[Content, str | None]:
    """`(content, completion)` of one row for SFT: the loss is on the completion.

    For `text` the completion is None and the whole text is trained on. For `chat` the completion is
    the last assistant message; a chat that does not end with one is a DataError.
    """
    where = where or spec.path
    if spec.format == "text":
        return _prompt_text(row, spec, spec.text, where), None
    if spec.format == "chat":
        messages, answer = _split_chat(row, spec, where)
        if answer is None:
            raise DataError(f"{where}: column {spec.messages!r} must end with an assistant message to learn")
        return messages, answer
    content, answer, _ = _text_prompt(row, spec, where)
    return content, answer


def check_rows(
    rows: Rows,
    spec: DatasetSpec,
    *,
    sft: bool,
    max_rows: int | None = None,
    template: ChatTemplate | None = None,
    seen: Callable[[Conversation, str], None] | None = None,
    lacking: Callable[[str | None, dict[str, Any]], str | None] | None = None,
) -> int:
    """Read the first `max_rows` rows (null: all) as the run will; return how many were read.

    With the model's `template`, chats are rendered as well; `seen` is told of each. `lacking` says what the
    rewards miss in a row's answer and fields. Raises DataError naming file, row number and column or message
    and role for the first row that does not fit.
    """
    count = len(rows) if max_rows is None else min(max_rows, len(rows))
    for index in range(count):
        where = f"{rows.name}: row {index}"
        if sft:
            check_sft_row(rows[index], spec, where, template, seen)
        else:
            row = rows[index]
            _, answer, fields = prompt_of(row, spec, where)
            found = media_row(row, spec, where)
            if found is not None and seen is not None:
                seen(found.conversation, where)
            problem = lacking(answer, fields) if lacking is not None else None
            if problem is not None:
                raise DataError(f"{where}: {problem}")
    return count


def check_sft_row(
    row: dict[str, Any],
    spec: DatasetSpec,
    where: str,
    template: ChatTemplate | None = None,
    seen: Callable[[Conversation, str], None] | None = None,
) -> None:
    """Make of a row what training would, as far as text goes. Raises DataError."""
    if spec.format in CHAT_FORMATS:
        conversation = conversation_of(row, spec, where)
        if conversation.messages[-1]["role"] != "assistant":
            raise DataError(f"{where}: the messages must end with an assistant message to learn")
    else:
        content, completion = completion_of(row, spec, where)
        if completion is None or (isinstance(content, str) and (spec.chat is False or template is None)):
            return
        conversation = wrap(content, completion, row, spec)
    if seen is not None:
        seen(conversation, where)
    if template is not None:
        prepared = replace(conversation, messages=template.prepared(conversation.messages))
        renderings(template, prepared, spec.train_on, where)


def is_plain(value: Any) -> bool:
    """Whether `value` can travel in a message: text, numbers, and lists and string-keyed dicts of them."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, (str, int, float, bool))


def _column(row: dict[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise DataError(f"{where} has no column {column!r}; its columns are {', '.join(map(repr, row))}")
    return row[column]


def _as_text(value: Any, column: str, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{where}: column {column!r} must be text, this is {type(value).__name__}")


def _prompt_text(row: dict[str, Any], spec: DatasetSpec, column: str, where: str) -> str:
    if spec.template is None:
        return _as_text(_column(row, column, where), column, where)
    try:
        return spec.template.format(**row)
    except KeyError as error:
        columns = ", ".join(map(repr, row))
        raise DataError(f"{where}: template names column {error}; its columns are {columns}") from error
    except (IndexError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: template {spec.template!r} cannot be filled: {error}") from error


def _split_chat(row: dict[str, Any], spec: DatasetSpec, where: str) -> tuple[list[Message], str | None]:
    """The messages before the last assistant message, and that message's text (None if not last)."""
    messages = _column(row, spec.messages, where)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: column {spec.messages!r} must be a list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise DataError(f"{where}: message {number} must have `role` and `content`")
        if message["role"] not in ROLES:
            raise DataError(f"{where}: message {number} has role {message['role']!r}; use {', '.join(ROLES)}")
    answer = None
    if messages[-1]["role"] == "assistant":
        answer = _as_text(messages[-1]["content"], f"{spec.messages}[-1].content", where)
        messages = messages[:-1]
    if spec.system is not None and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": spec.system}, *messages]
    if not messages:
        raise DataError(f"{where}: column {spec.messages!r} has no message before the answer")
    return list(messages), answer
