"""Which text of a conversation is learned: renderings of the chat template with the spans of the answers.

Where the rendering of the first messages is the beginning of the whole one, the spans of all answers lie
in one text. Templates that rewrite history (drop the thoughts of earlier turns, close the last turn with
another token) have no such text: what inference sees before answer 2 is not what a rendering of the whole
chat has there. Such a chat takes the template's own `{% generation %}` spans if it has them, else it is
forked into as many sequences as it needs, each answer trained behind the context that inference would see.
No torch and no tokenizer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import takewhile

from hpc_rl.data.chat import Conversation, Message, explain_refusal, text_of
from hpc_rl.data.errors import DataError
from hpc_rl.data.templates import ChatTemplate, Span, TemplateRefused

_QUESTION: Message = {"role": "user", "content": "?"}
_LAST_TAG = re.compile(r"(<[^<>]+>)\s*\Z")
_PROBE = "\ue0f2"  # private use: no text of a data set has it, and no template tests for it
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Rendering:
    """One sequence: its text, the spans to learn (in order), and how far into the chat it goes.

    `ending` is given where the template could not render the answer behind its own prompt: the token
    that ends this text ends the answer, which has none in `text`. `marked`: the spans are those of the
    template's `{% generation %}` blocks, which may leave out the token that ends a turn.
    """

    text: str
    spans: list[Span]
    messages: int
    ending: str | None = None
    marked: bool = False


def renderings(
    template: ChatTemplate, conversation: Conversation, train_on: str, where: str, first: int = 0
) -> list[Rendering]:
    """The sequences of a conversation, first turns first; only answers from message `first` on are learned.
    Raises DataError naming the message."""
    messages, tools = conversation.messages, conversation.tools
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] != len(messages) - 1:
        raise DataError(f"{where}: the messages must end with an assistant message to learn")
    wanted = [n for n in answers if n >= first] if train_on == "assistant" else answers[-1:]
    try:
        lost = None
        try:
            found = _cover(template, messages, tools, wanted)
        except _Lost as error:
            lost, found = error, []
        if len(found) != 1 or found[0].ending is not None:
            text, spans = template.marked(messages, tools)
            if spans:
                if len(spans) != len(answers) and train_on != "assistant":
                    spans = spans[-1:]
                elif len(spans) == len(answers):
                    spans = [span for span, number in zip(spans, answers, strict=True) if number in wanted]
                return [Rendering(text, spans, len(messages), marked=True)]
        if lost is not None:
            raise DataError(f"{where}: {lost}") from lost
    except TemplateRefused as error:
        why = explain_refusal(messages)
        raise DataError(f"{where}: {why + ': ' if why else ''}{error}") from error
    return found


def _cover(
    template: ChatTemplate, messages: list[Message], tools: list[object] | None, wanted: list[int]
) -> list[Rendering]:
    """As few renderings as hold every wanted answer as inference would see it; the last answer first."""
    before = {number: _prompt(template, messages, tools, number) for number in wanted}
    after = {number: _turn(template, messages[: number + 1], tools) for number in wanted}
    left, found = list(wanted), []
    while left:
        last = left[-1]
        text = after[last]
        held = [n for n in left if text.startswith(after[n]) and after[n].startswith(before[n])]
        if last in held:
            spans = [(len(before[n]), len(after[n])) for n in held]
            found.append(Rendering(text, spans, last + 1))
        else:
            held = [last]
            found.append(_behind_its_prompt(template, messages[: last + 1], tools, before[last], text))
        left = [n for n in left if n not in held]
    return found[::-1]


def _turn(template: ChatTemplate, messages: list[Message], tools: list[object] | None) -> str:
    """The rendering up to the end of an answer.

    Some templates (Phi-3) close every rendering with EOS, after the token that ends the turn: that is not
    of the turn, and no history has it there.
    """
    text = template.render(messages, tools=tools)
    if not template.eos or not text.endswith(template.eos):
        return text
    open_text, answer = text.removesuffix(template.eos), text_of(messages[-1]["content"]).rstrip()
    if answer and open_text.rstrip().endswith(answer[-20:]):
        return text  # it is EOS that ends the turn
    later = template.render([*messages, _QUESTION], generate=True, tools=tools)
    return open_text if later.startswith(open_text) and not later.startswith(text) else text


def _prompt(template: ChatTemplate, messages: list[Message], tools: list[object] | None, number: int) -> str:
    """What inference is given before answer `number`.

    An answer that begins the chat has nothing that a template must render: it is what the answer's
    rendering has in common with another answer's (a default system text, the assistant's marker).
    """
    if number:
        return template.render(messages[:number], generate=True, tools=tools)
    probe = {"role": "assistant", "content": _like(messages[0]["content"], _PROBE)}
    texts = [template.render([message], tools=tools) for message in (messages[0], probe)]
    common = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False)))
    question = template.prepared([_QUESTION])
    asked = template.render(question, tools=tools)
    marker = template.render(question, generate=True, tools=tools).removeprefix(asked)
    at = common.rfind(marker) if marker else -1
    return common[: at + len(marker)] if at >= 0 else common


class _Lost(ValueError):
    """An answer that cannot be put behind its prompt without losing a part of it."""


def _behind_its_prompt(
    template: ChatTemplate, messages: list[Message], tools: list[object] | None, prompt: str, whole: str
) -> Rendering:
    """The prompt as inference has it, then the answer as the row has it.

    For templates whose prompt opens what their history leaves out (`<think>` after the assistant's
    marker). An answer that begins with the tag that the prompt ends with does not repeat it; thoughts in a
    field of their own come first, and the tag is closed behind them; tool calls follow as the template
    writes them. Raises _Lost.
    """
    answer = text_of(messages[-1]["content"])
    opened = prompt.removeprefix(template.render(messages[:-1], tools=tools))
    tag = _LAST_TAG.search(opened)
    if tag is not None and answer.lstrip().startswith(tag[1]):
        answer = answer.lstrip().removeprefix(tag[1]).lstrip("\n")
    name = f"message {len(messages) - 1} (assistant)"
    field = next((key for key in _THOUGHTS if messages[-1].get(key)), None)
    if field is not None:
        if tag is None or not re.fullmatch(r"<\w+>", tag[1]):
            raise _Lost(
                f"{name} has a {field!r} that the chat template leaves out; write it into the content"
            )
        closing = tag[1].replace("<", "</")
        if closing not in answer:
            answer = f"{str(messages[-1][field]).strip()}\n{closing}\n\n{answer.lstrip()}"
    calls = _calls(template, messages, tools) if messages[-1].get("tool_calls") else ""
    if (prompt + answer).endswith("\n"):
        calls = calls.lstrip("\n")
    text = prompt + answer + calls
    return Rendering(text, [(len(prompt), len(text))], len(messages), ending=whole)


def _calls(template: ChatTemplate, messages: list[Message], tools: list[object] | None) -> str:
    """The tool calls of the last message as the template writes them behind a content."""
    probe = {**messages[-1], "content": _like(messages[-1]["content"], _PROBE)}
    silent = {name: value for name, value in probe.items() if name != "tool_calls"}
    lost = (
        f"message {len(messages) - 1} (assistant) has tool calls that the chat template does not write "
        "behind a content; write them into the content"
    )
    try:
        texts = [template.render([*messages[:-1], last], tools=tools) for last in (probe, silent)]
    except TemplateRefused as error:
        raise _Lost(f"{lost} ({error})") from error
    (_, found, tail), (_, _, end) = (text.rpartition(_PROBE) for text in texts)
    if not found or tail == end or not tail.endswith(end):
        raise _Lost(lost)
    return tail.removesuffix(end)


def _like(content: str | list[Message], text: str) -> str | list[Message]:
    """The text in the form (text or parts) that the content has."""
    return text if isinstance(content, str) else [{"type": "text", "text": text}]
