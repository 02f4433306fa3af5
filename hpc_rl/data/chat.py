"""A row as a conversation: messages with their media, whatever format the row is in. No torch.

One form comes out: messages with `role` and `content` (a string, or parts `{"type": "text", "text"}`,
`{"type": "image"}`, `{"type": "video"}`), and the media themselves in the order of their parts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from hpc_rl.data.errors import DataError
from hpc_rl.recipe.schema import DatasetSpec

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
}
_PLACEHOLDER = re.compile(r"\n?<(image|video)>\n?")
CHAT_FORMATS = ("chat", "llava", "cosmos_reason1")


@dataclass
class Conversation:
    """`images` and `videos` are what the row says of them (a path, bytes, a picture), not opened yet."""

    messages: list[Message]
    tools: list[Any] | None = None
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    repaired: bool = False

    @property
    def has_media(self) -> bool:
        return bool(self.images or self.videos)


def conversation_of(row: dict[str, Any], spec: DatasetSpec, where: str = "") -> Conversation:
    """The conversation of a row of format chat, llava or cosmos_reason1, repaired as `spec.repair` says.

    Raises DataError naming `where`, the message and its role.
    """
    where = where or spec.path
    column = spec.messages if spec.format == "chat" else "conversations"
    if column not in row:
        raise DataError(f"{where} has no column {column!r}; its columns are {', '.join(map(repr, row))}")
    found = row[column]
    if not isinstance(found, list) or not found:
        raise DataError(f"{where}: column {column!r} must be a list of messages")
    messages = [_message(message, number, where) for number, message in enumerate(found)]
    if spec.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": spec.system}, *messages]
    conversation = Conversation(messages, _tools(row, where))
    _attach_media(conversation, row, spec, where)
    repair(conversation, spec)
    return conversation


def wrap(
    prompt: str | list[Message], completion: str, row: dict[str, Any], spec: DatasetSpec
) -> Conversation:
    """A prompt and its completion as a conversation (a string is one user message)."""
    messages = prompt if isinstance(prompt, list) else as_messages(prompt, spec)
    conversation = Conversation([*messages, {"role": "assistant", "content": completion}])
    _attach_media(conversation, row, spec, spec.path)
    repair(conversation, spec)
    return conversation


def row_has_media(row: dict[str, Any], spec: DatasetSpec) -> bool:
    """Whether a column of the row holds images or videos."""
    return bool(_listed(row, spec.images, "image") or _listed(row, spec.videos, "video"))


def with_media(messages: list[Message], row: dict[str, Any], spec: DatasetSpec, where: str) -> Conversation:
    """Messages that are a prompt, with the media of the row's columns. Raises DataError."""
    conversation = Conversation([dict(message) for message in messages])
    _attach_media(conversation, row, spec, where)
    repair(conversation, spec)
    return conversation


def as_messages(text: str, spec: DatasetSpec) -> list[Message]:
    """A prompt text as chat messages, with the recipe's `system` text in front."""
    system = [{"role": "system", "content": spec.system}] if spec.system is not None else []
    return [*system, {"role": "user", "content": text}]


def text_of(content: str | list[dict[str, Any]]) -> str:
    """The text of a content without its media."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


# --- messages ------------------------------------------------------------------------------------------
def _message(raw: Any, number: int, where: str) -> Message:
    """`{role, content}` or `{from, value}`, without the empty fields that tables fill in."""
    if not isinstance(raw, dict):
        raise DataError(f"{where}: message {number} must be a mapping, this is {type(raw).__name__}")
    message = {key: _without_none(value) for key, value in raw.items() if value is not None}
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    if "content" not in message and message.get("tool_calls"):
        message["content"] = ""
    if "role" not in message or "content" not in message:
        raise DataError(f"{where}: message {number} must have `role` and `content` (or `from` and `value`)")
    role = message["role"] = _OTHER_NAMES.get(message["role"], message["role"])
    if role not in ROLES:
        allowed = ", ".join([*ROLES, *_OTHER_NAMES])
        raise DataError(f"{where}: message {number} has role {role!r}; use {allowed}")
    message["content"] = _content(message["content"], f"{where}: message {number} ({role})")
    if "tool_calls" in message:
        message["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    return message


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    if isinstance(content, (int, float)) and not isinstance(content, bool):
        return str(content)
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(
            f"{where} has a content of type {type(content).__name__}; use text or a list of parts"
        )
    parts = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else dict(part)
        if part.get("type") == "image_url":
            url = part["image_url"]
            part = {"type": "image", "image": url["url"] if isinstance(url, dict) else url}
        if part.get("type") not in ("text", "image", "video"):
            raise DataError(f"{where} has a part of type {part.get('type')!r}; use text, image or video")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise DataError(f"{where} has a part of type text without `text`")
        parts.append(part)
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _tool_call(call: Any) -> Any:
    """Templates print `arguments` as JSON themselves: text that is JSON would be quoted twice."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except ValueError:
            return call
        function = {**function, "arguments": arguments}
        return {**call, "function": function} if "function" in call else function
    return call


def _tools(row: dict[str, Any], where: str) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{where}: column 'tools' is not JSON: {error}") from error
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}: column 'tools' must be a list, this is {type(tools).__name__}")
    return [_without_none(tool) for tool in tools] if tools else None


def _without_none(value: Any) -> Any:
    """Arrow gives every struct all fields; a template takes a field that is there to be meant."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


# --- media ---------------------------------------------------------------------------------------------
def _attach_media(conversation: Conversation, row: dict[str, Any], spec: DatasetSpec, where: str) -> None:
    """Put the row's media beside its messages, so that parts and media agree in number and order."""
    given = {"image": _listed(row, spec.images, "image"), "video": _listed(row, spec.videos, "video")}
    has_parts = any(isinstance(message["content"], list) for message in conversation.messages)
    if any(given.values()) and not has_parts:
        _split_placeholders(conversation)
    inline: dict[str, list[Any]] = {"image": [], "video": []}
    for message in conversation.messages:
        if isinstance(message["content"], list):
            message["content"] = [_bare(part, inline) for part in message["content"]]
    for kind, media in given.items():
        parts = inline[kind]
        own = [source for source in parts if source is not None]
        if own and (media or len(own) < len(parts)):
            raise DataError(f"{where}: {kind}s are given in the messages and in a column as well")
        if media and not parts:
            _put_in_front(conversation, kind, len(media), where)
        elif not own and len(parts) != len(media):
            raise DataError(f"{where}: {len(parts)} {kind} placeholders for {len(media)} {kind}s")
        given[kind] = own or media
    conversation.images, conversation.videos = given["image"], given["video"]


def _listed(row: dict[str, Any], column: str, singular: str) -> list[Any]:
    found = row.get(column)
    if found is None:
        found = row.get(singular)
    if found is None or (isinstance(found, (str, list)) and not found):
        return []
    return list(found) if isinstance(found, list) else [found]


def _bare(part: dict[str, Any], inline: dict[str, list[Any]]) -> dict[str, Any]:
    """The part as a template wants it; where it names its medium, that is kept in `inline`."""
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    source = next((part[key] for key in (kind, "path", "url", "base64") if part.get(key) is not None), None)
    inline[kind].append(source)
    return {"type": kind}


def _split_placeholders(conversation: Conversation) -> None:
    """`<image>` and `<video>` in the text become parts; one line break beside each goes with it."""
    for message in conversation.messages:
        if not _PLACEHOLDER.search(message["content"]):
            continue
        pieces = _PLACEHOLDER.split(message["content"])
        parts: list[dict[str, Any]] = []
        for text, kind in zip(pieces[::2], [*pieces[1::2], None], strict=True):
            parts += [{"type": "text", "text": text}] if text else []
            parts += [{"type": kind}] if kind else []
        message["content"] = parts


def _put_in_front(conversation: Conversation, kind: str, count: int, where: str) -> None:
    """Without placeholders the media come before the text of the first user message."""
    for message in conversation.messages:
        if message["role"] == "user":
            content = message["content"]
            text = [{"type": "text", "text": content}] if isinstance(content, str) else content
            message["content"] = [{"type": kind} for _ in range(count)] + text
            return
    raise DataError(f"{where}: no user message to put the {kind} into")


# --- repair --------------------------------------------------------------------------------------------
def repair(conversation: Conversation, spec: DatasetSpec) -> None:
    """Do what `spec.repair` lists, in this order: drop_empty, move_system, merge_roles."""
    before = [(message["role"], message["content"]) for message in conversation.messages]
    messages = conversation.messages
    if "drop_empty" in spec.repair:
        messages = [m for m in messages if _is_something(m)]
    if "move_system" in spec.repair:
        messages = _move_system(messages)
    if "merge_roles" in spec.repair:
        messages = _merge_roles(messages)
    conversation.messages = messages
    conversation.repaired = [(m["role"], m["content"]) for m in messages] != before


def _is_something(message: Message) -> bool:
    content = message["content"]
    has_media = isinstance(content, list) and any(part["type"] != "text" for part in content)
    return has_media or bool(text_of(content).strip()) or bool(message.get("tool_calls"))


def _move_system(messages: list[Message]) -> list[Message]:
    system = [m for m in messages if m["role"] in ("system", "developer")]
    rest = [m for m in messages if m["role"] not in ("system", "developer")]
    for number, message in enumerate(rest):
        if system and message["role"] == "user":
            content = message["content"]
            for other in reversed(system):
                content = _joined(other["content"], content)
            return [*rest[:number], {**message, "content": content}, *rest[number + 1 :]]
    return messages


def _merge_roles(messages: list[Message]) -> list[Message]:
    """Neighbours of one role become one message. Tool answers and tool calls stay apart.

    So do messages that differ in another field (thoughts, a name): one of them would be lost.
    """
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        alike = last is not None and message["role"] != "tool" and _but_content(last) == _but_content(message)
        if last is None or not alike or last.get("tool_calls") or message.get("tool_calls"):
            merged.append(message)
        else:
            merged[-1] = {**last, "content": _joined(last["content"], message["content"])}
    return merged


def _but_content(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "content"}


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    parts: list[dict[str, Any]] = []
    for content in (first, second):
        parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
    return parts


def explain_refusal(messages: list[Message]) -> str:
    """Which message a template that wants user and assistant in turn stumbled over, and the repair."""
    previous = None
    for number, message in enumerate(messages):
        role = message["role"]
        if role in ("system", "developer") and number == 0:
            continue
        if role in ("system", "developer"):
            return f"message {number} has role {role} after the beginning; repair: [move_system] moves it"
        if role == previous and role != "tool":
            found = f"message {number} has role {role} as the one before"
            if _but_content(messages[number - 1]) == _but_content(message):
                return f"{found}; repair: [merge_roles] joins them"
            return f"{found}, and they differ in other fields than the content: join them in the data"
        if previous is None and role == "assistant":
            return f"message {number}, the first, has role assistant"
        previous = role
    if messages and messages[0]["role"] in ("system", "developer"):
        return f"message 0 has role {messages[0]['role']}; repair: [move_system] moves its text to the user's"
    return ""
