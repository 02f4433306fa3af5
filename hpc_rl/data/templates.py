"""Chat templates without transformers: what `check` renders before the queue and training renders in the job.

The environment is the one that transformers gives to templates (sandboxed Jinja with `raise_exception`,
`strftime_now`, `tojson` without HTML escapes, loop controls and `{% generation %}` blocks); a test holds
the two renderings equal. No torch: importing transformers' own renderer imports it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hpc_rl.data.errors import DataError

Message = dict[str, Any]
Span = tuple[int, int]

# Private-use characters: no text of a data set has them, and no template tests for them.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_PROBE = "probe"


class TemplateRefused(DataError):
    """The template raised: the roles, their order or a content are not what it takes."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: the block itself, between two marks."""

    tags = {"generation"}
    before, after = "", ""

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Any) -> str:
        return f"{self.before}{caller()}{self.after}"


class _Marked(_Generation):
    before, after = _OPEN, _CLOSE


class ChatTemplate:
    """One model's template. `variables` are the special tokens it may name (`bos_token`, ...).

    `today` fixes `strftime_now`, which some templates put into their system text: a run that is resumed
    tomorrow must see the same rows as today.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        variables: Mapping[str, Any] | None = None,
        name: str = "chat template",
        today: datetime | None = None,
    ) -> None:
        self.name = name
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        if "default" not in self._sources:
            raise DataError(f"{name} has no template called default; it has {', '.join(self._sources)}")
        self._variables = dict(variables or {})
        self._parts: dict[str, bool] = {}
        self._plain = {key: self._compile(text, _Generation, today) for key, text in self._sources.items()}
        self._marked = {
            key: self._compile(text, _Marked, today)
            for key, text in self._sources.items()
            if "endgeneration" in text
        }

    @classmethod
    def of_tokenizer(cls, tokenizer: Any, *, processor: Any = None, today: datetime | None = None):  # type: ignore[no-untyped-def]
        """The template of a processor (else of its tokenizer); None if there is none."""
        source = processor.chat_template if processor is not None else None
        source = source or tokenizer.chat_template
        if not source:
            return None
        name = f"the chat template of {tokenizer.name_or_path}" if tokenizer.name_or_path else "chat template"
        return cls(source, tokenizer.special_tokens_map, name, today)

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate | None:
        """The template in a model's folder, or None. Raises DataError for files that are no JSON."""
        config = _json(folder / "tokenizer_config.json")
        variables = {**_json(folder / "special_tokens_map.json"), **config}
        tokens = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in variables.items()
            if key.endswith("_token") and isinstance(value, (str, dict))
        }
        source = _source(folder, config)
        return cls(source, tokens, f"the chat template of {folder}") if source else None

    def render(
        self, messages: Sequence[Message], *, generate: bool = False, tools: list[Any] | None = None
    ) -> str:
        """The text of a chat; with `generate`, up to where the assistant begins. Raises TemplateRefused."""
        return self._render(self._plain[self._which(tools)], messages, generate, tools)

    def marked(self, messages: Sequence[Message], tools: list[Any] | None = None) -> tuple[str, list[Span]]:
        """The text of a chat and the spans of its `{% generation %}` blocks (none: the template has none)."""
        template = self._marked.get(self._which(tools))
        if template is None:
            return self.render(messages, tools=tools), []
        text, spans, start = "", [], 0
        for piece in self._render(template, messages, False, tools).split(_OPEN):
            block, closed, rest = piece.partition(_CLOSE)
            if closed:
                spans.append((start, start + len(block)))
            text += block + rest
            start = len(text)
        return text, spans

    def prepared(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with text contents as this template takes them.

        Some templates of vision-language models look for parts only, and print nothing for a string.
        """
        return [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message["content"], str)
            and message["content"]
            and self._wants_parts(message["role"])
            else message
            for message in messages
        ]

    def _wants_parts(self, role: str) -> bool:
        if role not in self._parts:
            self._parts[role] = not self._prints(role, _PROBE) and self._prints(
                role, [{"type": "text", "text": _PROBE}]
            )
        return self._parts[role]

    def _prints(self, role: str, content: Any) -> bool:
        """Whether the text of a message of this role is in the rendering, and nothing of its quotes."""
        question = [] if role == "user" else self.prepared([{"role": "user", "content": "?"}])
        message = {"role": role, "content": content}
        try:
            text = self.render([message, *question] if role == "system" else [*question, message])
        except TemplateRefused:
            return False
        return _PROBE in text and "'type'" not in text

    @property
    def eos(self) -> str:
        """The end-of-sequence token by its name in the template; empty if the tokenizer has none."""
        return str(self._variables.get("eos_token") or "")

    def _which(self, tools: list[Any] | None) -> str:
        return "tool_use" if tools and "tool_use" in self._sources else "default"

    def _render(
        self, template: Any, messages: Sequence[Message], generate: bool, tools: list[Any] | None
    ) -> str:
        try:
            text: str = template.render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=generate,
                **self._variables,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise TemplateRefused(f"{self.name} refuses the roles {roles}: {error}") from error
        return text

    def _compile(self, source: str, generation: type[Extension], today: datetime | None) -> Any:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: (today or datetime.now()).strftime(form)
        try:
            return environment.from_string(source)
        except TemplateError as error:
            raise DataError(f"{self.name} is not a Jinja template: {error}") from error


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _source(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """Where transformers looks, in its order: .jinja files, the processor's JSON, the tokenizer's."""
    if (file := folder / "chat_template.jinja").is_file():
        sources = {"default": file.read_text(encoding="utf-8")}
        for other in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            sources[other.stem] = other.read_text(encoding="utf-8")
        return sources
    found = _json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(found, list):  # [{"name": ..., "template": ...}]
        return {entry["name"]: entry["template"] for entry in found}
    return found


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}
