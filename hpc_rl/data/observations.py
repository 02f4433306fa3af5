"""How a chat template writes what an environment says between two turns: the new text alone.

What a policy wrote is never rendered or tokenised again: templates drop past thoughts and reorder the keys
of calls, and tokenizers cut a text otherwise than it was sampled. So the messages are rendered behind a turn
with a known text, and what stands behind that text is what comes next, whatever the policy really wrote. That
is probed first: the rendering may not depend on the turns before. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hpc_rl.data.errors import DataError
from hpc_rl.data.templates import ChatTemplate, Message, TemplateRefused

_WRITTEN, _SEEN = "a-turn-that-was-written", "what-was-seen"
_QUESTION: Message = {"role": "user", "content": "a-question"}
_INSTRUCTIONS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{schemas}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""  # noqa: E501 -- Hermes' and Qwen's words, which models know


class Observations:
    """The template's way with `tools` (JSON schemas) and observations. Raises DataError where there is none.

    A template without a role `tool` is shown the results of tools as a user's message, in
    `<tool_response>` tags; one that does not list `tools` gets them as Hermes' instructions.
    """

    def __init__(self, template: ChatTemplate, tools: Sequence[dict[str, Any]] = ()) -> None:
        self._template, self._tools = template, list(tools) or None
        self._role = self._tool_role() if tools else "user"
        self._lists = self._lists_tools()
        self.closes = self._closes()
        if not tools:
            self._require(self._why_not("user"))

    def prompt(self, messages: Sequence[Message]) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """The messages of a prompt, and the tools that its rendering is to be given."""
        if self._lists or self._tools is None:
            return list(messages), self._tools
        first, *rest = messages
        told = _INSTRUCTIONS.format(schemas="\n".join(json.dumps(schema) for schema in self._tools))
        text = (
            f"{first['content']}\n\n{told}" if first["role"] == "system" else f"{told}\n\n{first['content']}"
        )
        return [{**first, "content": text}, *rest], None

    def text(self, messages: Sequence[Message]) -> str:
        """From where the policy's words ended to where it goes on: the end of its turn, the messages, and the
        beginning of the next turn."""
        return self._behind(self._as_shown(messages, self._role), 1)

    def _tool_role(self) -> str:
        problems = {role: self._why_not(role) for role in ("tool", "user")}
        for role, problem in problems.items():
            if problem is None:
                return role
        self._require(f"as a tool's message: {problems['tool']}; as a user's: {problems['user']}")
        raise AssertionError

    def _require(self, problem: str | None) -> None:
        if problem is not None:
            raise DataError(
                f"{self._template.name} cannot show an observation behind a turn ({problem}); take a model "
                "with another template, or set model.tokenizer to a folder whose template can"
            )

    def _why_not(self, role: str) -> str | None:
        messages = self._as_shown([{"role": "tool" if self._tools else "user", "content": _SEEN}], role)
        try:
            once, twice = self._behind(messages, 1), self._behind(messages, 2)
        except TemplateRefused as error:
            return str(error)
        except DataError as error:
            return str(error)
        if once.count(_SEEN) != 1:
            return f"it prints the message {once.count(_SEEN)} times"
        if once != twice:
            return "what it prints depends on the turns before"
        return None

    def _closes(self) -> bool:
        """Whether the template ends a turn by a text of its own. In GLM's the next role does that."""
        written = {"role": "assistant", "content": _WRITTEN}
        try:
            text = self._template.render(self._template.prepared([_QUESTION, written]), tools=self._tools)
        except TemplateRefused:
            return False
        return bool(text.partition(_WRITTEN)[2].strip())

    def _lists_tools(self) -> bool:
        if self._tools is None:
            return False
        try:
            text = self._render([_QUESTION])
        except TemplateRefused:
            return False
        return all(schema["function"]["name"] in text for schema in self._tools)

    def _behind(self, messages: list[Message], turns: int) -> str:
        history = [_QUESTION]
        for number in range(turns):
            written = _WRITTEN if number == turns - 1 else "an-earlier-turn"
            history += [{"role": "assistant", "content": written}, *messages]
        _, found, behind = self._render(history).partition(_WRITTEN)
        if not found or _WRITTEN in behind:
            raise DataError("it does not print the assistant's turn once")
        return behind

    def _render(self, messages: Sequence[Message]) -> str:
        return self._template.render(self._template.prepared(messages), generate=True, tools=self._tools)

    @staticmethod
    def _as_shown(messages: Sequence[Message], role: str) -> list[Message]:
        """With `role` user, results of tools in a row are one message: roles may have to alternate."""
        if role == "tool":
            return list(messages)
        shown: list[Message] = []
        for message in messages:
            if message["role"] != "tool":
                shown.append(message)
                continue
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if shown and shown[-1]["role"] == "user":
                text = f"{shown.pop()['content']}\n{text}"
            shown.append({"role": "user", "content": text})
        return shown
