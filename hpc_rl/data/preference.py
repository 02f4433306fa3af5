"""A row as a preference pair: a prompt with the answer that was chosen and the one that was rejected.

The columns `chosen` and `rejected` hold the answers behind a prompt column (or `template`), or whole chats or
texts that begin alike: what they have in common is the prompt. No torch and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from hpc_rl.data.chat import Conversation, Message, as_messages, conversation_of, repair
from hpc_rl.data.errors import DataError
from hpc_rl.data.prompts import prompt_of
from hpc_rl.data.rows import Rows
from hpc_rl.data.templates import ChatTemplate
from hpc_rl.data.turns import renderings
from hpc_rl.recipe.schema import DatasetSpec


@dataclass(frozen=True)
class TextPair:
    """All text. `whole`: cut out of texts that hold prompt and answer, so no chat template is put around."""

    prompt: str
    chosen: str
    rejected: str
    whole: bool = False


@dataclass(frozen=True)
class ChatPair:
    """Chats whose first `prompt` messages are the same; what follows is answered differently."""

    chosen: Conversation
    rejected: Conversation
    prompt: int

    @property
    def sides(self) -> tuple[Conversation, Conversation]:
        return self.chosen, self.rejected


def pair_of(
    row: dict[str, Any], spec: DatasetSpec, where: str = "", *, wrap: bool = False
) -> ChatPair | TextPair:
    """The pair of a row; with `wrap`, texts behind a prompt become chats too, if `spec.chat` is not false.

    Raises DataError, starting with `where`.
    """
    where = where or spec.path
    given = [_answer(row, column, spec, where) for column in (spec.chosen, spec.rejected)]
    chosen, rejected = given
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(
            f"{where}: {spec.chosen!r} and {spec.rejected!r} must both be text, or both be messages"
        )
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _of_texts(row, chosen, rejected, spec, where, wrap)
    assert isinstance(chosen, Conversation)
    assert isinstance(rejected, Conversation)
    return _of_chats(row, chosen, rejected, spec, where)


def check_pairs(
    rows: Rows,
    spec: DatasetSpec,
    *,
    max_rows: int | None = None,
    template: ChatTemplate | None = None,
    seen: Callable[[Conversation, str], None] | None = None,
) -> int:
    """As `prompts.check_rows`, for rows that are pairs."""
    count = len(rows) if max_rows is None else min(max_rows, len(rows))
    for index in range(count):
        check_pair_row(rows[index], spec, rows.where(index), template, seen)
    return count


def check_pair_row(
    row: dict[str, Any],
    spec: DatasetSpec,
    where: str,
    template: ChatTemplate | None = None,
    seen: Callable[[Conversation, str], None] | None = None,
) -> None:
    """Make of a row what training would, as far as text goes. Raises DataError."""
    pair = pair_of(row, spec, where, wrap=template is not None)
    if isinstance(pair, TextPair):
        return
    for conversation in pair.sides:
        if seen is not None:
            seen(conversation, where)
        if template is not None:
            prepared = replace(conversation, messages=template.prepared(conversation.messages))
            one_rendering(template, prepared, pair.prompt, where)


def one_rendering(template: ChatTemplate, conversation: Conversation, prompt: int, where: str) -> Any:
    """The rendering that learns the answers behind the first `prompt` messages. Raises DataError."""
    answers = [message for message in conversation.messages[prompt:] if message["role"] == "assistant"]
    train_on = "last" if len(answers) == 1 else "assistant"
    found = renderings(template, conversation, train_on, where, first=prompt)
    if len(found) != 1:
        raise DataError(
            f"{where}: {len(found)} answers follow what chosen and rejected have in common, and "
            f"{template.name} writes earlier answers otherwise than the last: keep the chats alike up to it"
        )
    return found[0]


# --- texts ---------------------------------------------------------------------------------------------
def _of_texts(
    row: dict[str, Any], chosen: str, rejected: str, spec: DatasetSpec, where: str, wrap: bool
) -> ChatPair | TextPair:
    if spec.template is None and spec.prompt not in row:
        if spec.chat or spec.system is not None:
            raise DataError(
                f"{where} has no column {spec.prompt!r}, and whole texts in {spec.chosen!r} are not put into "
                "a chat: give a prompt column, or leave out chat and system"
            )
        end = common_prefix(chosen, rejected)
        if end == 0:
            raise DataError(
                f"{where} has no column {spec.prompt!r}, and {spec.chosen!r} and {spec.rejected!r} do not "
                f"begin alike; its columns are {', '.join(map(repr, row))}"
            )
        return TextPair(chosen[:end], chosen[end:], rejected[end:], whole=True)
    prompt = _prompt(row, spec, where)
    if isinstance(prompt, str) and (spec.chat is False or not wrap):
        return TextPair(prompt, chosen, rejected)
    messages = as_messages(prompt, spec) if isinstance(prompt, str) else prompt
    sides = [Conversation([{"role": "assistant", "content": text}]) for text in (chosen, rejected)]
    return _joined(messages, sides[0], sides[1], spec)


def common_prefix(one: str, other: str) -> int:
    """How long the common beginning of two texts is, without a blank at its end (it belongs to a word)."""
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return length - 1 if one[:length].endswith(" ") else length


# --- chats ---------------------------------------------------------------------------------------------
def _of_chats(
    row: dict[str, Any], chosen: Conversation, rejected: Conversation, spec: DatasetSpec, where: str
) -> ChatPair:
    for column, side in ((spec.chosen, chosen), (spec.rejected, rejected)):
        if side.messages[-1]["role"] != "assistant":
            raise DataError(
                f"{where}: the messages of {column!r} must end with an assistant message to learn"
            )
    behind = [side.messages[0]["role"] == "assistant" for side in (chosen, rejected)]
    if all(behind) and (spec.prompt in row or spec.template is not None):
        prompt = _prompt(row, spec, where)
        messages = as_messages(prompt, spec) if isinstance(prompt, str) else prompt
        return _joined(messages, chosen, rejected, spec)
    count = _common_messages(chosen.messages, rejected.messages)
    for column, side in ((spec.chosen, chosen), (spec.rejected, rejected)):
        role = side.messages[count]["role"]
        if count == 0 and role == "assistant":
            columns = ", ".join(map(repr, row))
            raise DataError(
                f"{where} has no column {spec.prompt!r}, and {column!r} begins with the answer; its columns "
                f"are {columns}"
            )
        if role != "assistant":
            raise DataError(
                f"{where}: {spec.chosen!r} and {spec.rejected!r} are whole chats and must be alike up to an "
                f"answer; message {count} of {column!r}, where they part, has role {role}"
            )
    common = chosen.messages[:count]
    if spec.system is not None and common[0]["role"] != "system":
        common = [{"role": "system", "content": spec.system}, *common]
    sides = (replace(side, messages=side.messages[count:]) for side in (chosen, rejected))
    return _joined(common, *sides, spec)


def _common_messages(one: list[Message], other: list[Message]) -> int:
    """How many messages the chats have in common; the last one of each is an answer to be compared."""
    pairs = zip(one[:-1], other[:-1], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _joined(
    prompt: list[Message], chosen: Conversation, rejected: Conversation, spec: DatasetSpec
) -> ChatPair:
    """Chats of the prompt, which is repaired as the recipe says, and each side's messages."""
    begin = Conversation(prompt)
    repair(begin, spec)
    sides = (
        replace(side, messages=[*begin.messages, *side.messages], repaired=begin.repaired)
        for side in (chosen, rejected)
    )
    return ChatPair(*sides, len(begin.messages))


# --- columns ---------------------------------------------------------------------------------------------
def _answer(row: dict[str, Any], column: str, spec: DatasetSpec, where: str) -> str | Conversation:
    if column not in row:
        raise DataError(f"{where} has no column {column!r}; its columns are {', '.join(map(repr, row))}")
    if isinstance(row[column], str):
        return str(row[column])
    if not isinstance(row[column], list):
        kind = type(row[column]).__name__
        raise DataError(f"{where}: column {column!r} must be text or a list of messages, this is {kind}")
    return _chat(row, column, spec, where)


def _prompt(row: dict[str, Any], spec: DatasetSpec, where: str) -> str | list[Message]:
    if spec.template is None and isinstance(row.get(spec.prompt), list):
        messages = _chat(row, spec.prompt, spec, where).messages
        if spec.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": spec.system}, *messages]
        return messages
    plain = spec.model_copy(
        update={"format": "prompt_answer", "answer": spec.chosen, "chat": None, "system": None}
    )
    content, _, _ = prompt_of({**row, spec.chosen: ""}, plain, where)
    assert isinstance(content, str)
    return content


def _chat(row: dict[str, Any], column: str, spec: DatasetSpec, where: str) -> Conversation:
    """The messages of a column as they are in the row, in the one form that chats have."""
    plain = spec.model_copy(update={"format": "chat", "messages": column, "system": None, "repair": []})
    kept = {key: row[key] for key in (column, "tools") if key in row}
    conversation = conversation_of(kept, plain, f"{where}: {column!r}")
    if conversation.has_media:
        raise DataError(f"{where}: {column!r} has images or videos; preference pairs are text alone")
    return conversation
