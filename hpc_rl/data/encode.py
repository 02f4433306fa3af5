"""From text and chat messages to token ids, the same for sampling and for training. No torch.

The tokenizer is a transformers one, made by whoever has it. Chat templates bring their own special
tokens, so their text is tokenised without adding any (else it would begin with two BOS).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Protocol

from hpc_rl.data.chat import CHAT_FORMATS, Conversation, as_messages, conversation_of, wrap
from hpc_rl.data.errors import DataError
from hpc_rl.data.prompts import Content, completion_of
from hpc_rl.data.templates import ChatTemplate
from hpc_rl.data.tokens import Control, Tokens, last_control, learn_endings, mask_of, one_bos, tokenise
from hpc_rl.data.turns import Rendering, renderings
from hpc_rl.recipe.schema import DatasetSpec

MEDIA_FORMATS = ("llava", "cosmos_reason1")
IMAGE, VIDEO = 1, 2  # kinds of media, to be added up


@dataclass
class Encoded:
    """`loss_mask[t]` is 1 where token t is learned; `media` goes by the names of the model's forward. Of a
    preference pair the rejected sequence begins at `split`."""

    token_ids: list[int]
    loss_mask: list[int]
    media: dict[str, Any] | None = None
    split: int = 0


@dataclass
class EncodedRow:
    """What a row became; `dropped` and `truncated` count sequences. `kinds` of media are in it."""

    sequences: list[Encoded] = field(default_factory=list)
    repaired: int = 0
    truncated: int = 0
    dropped: int = 0
    kinds: int = 0


class MediaEncoder(Protocol):
    """A processor for images and videos (`data/multimodal.py`)."""

    template: ChatTemplate

    def open(self, conversation: Conversation, where: str) -> Conversation:
        """The conversation with its media read, and what the processor lacks replaced by what it has."""
        ...

    def encode(
        self, rendering: Rendering, conversation: Conversation, where: str
    ) -> tuple[str, list[tuple[int, int]], Tokens, dict[str, Any] | None, list[int]]:
        """`(expanded text, spans in it, tokens, media, positions that are never learned)`."""
        ...

    def refuse_placeholders(self, ids: list[int], where: str) -> None:
        """Raises DataError if a token that stands for a medium is in ids that are text alone."""
        ...


class Encoder:
    """Rows of one data set to sequences for SFT. One per thread: tokenizers are not thread-safe."""

    def __init__(
        self,
        tokenizer: Any,
        spec: DatasetSpec,
        max_length: int | None = None,
        media: MediaEncoder | None = None,
        today: datetime | None = None,
    ) -> None:
        self._tokenizer, self._spec, self._max_length, self._media = tokenizer, spec, max_length, media
        self.template = media.template if media else ChatTemplate.of_tokenizer(tokenizer, today=today)
        self._control = Control(tokenizer)
        if self.template is None and (spec.format in CHAT_FORMATS or spec.chat or spec.system is not None):
            raise DataError(
                f"{spec.path}: chat messages (or `system`, or `chat: true`) need a tokenizer with a chat "
                "template; use `template` for plain prompts"
            )

    def __call__(self, row: dict[str, Any], where: str = "") -> EncodedRow:
        """The sequences of a row. Raises DataError, starting with `where`."""
        where = where or self._spec.path
        conversation = self._conversation(row, where)
        if conversation is None:
            content, completion = completion_of(row, self._spec, where)
            assert isinstance(content, str)
            return self._fitted([self.plain(content, completion, where)], 0, where)
        if conversation.has_media and self._media is None:
            raise DataError(f"{where} has images or videos, and the model has no processor for them")
        assert self.template is not None
        if self._media is not None:
            conversation = self._media.open(conversation, where)
        messages = self.template.prepared(conversation.messages)
        conversation = replace(conversation, messages=messages)
        found = renderings(self.template, conversation, self._spec.train_on, where)
        sequences = [self.sequence(rendering, conversation, where) for rendering in found]
        row = self._fitted(sequences, int(conversation.repaired), where)
        row.kinds = IMAGE * bool(conversation.images) + VIDEO * bool(conversation.videos)
        return row

    def _conversation(self, row: dict[str, Any], where: str) -> Conversation | None:
        """None for plain text and for prompts that no template wraps."""
        spec = self._spec
        if spec.format in CHAT_FORMATS:
            return conversation_of(row, spec, where)
        content, completion = completion_of(row, spec, where)
        if completion is None or (isinstance(content, str) and (spec.chat is False or not self.template)):
            return None
        return wrap(content, completion, row, spec)

    def sequence(self, rendering: Rendering, conversation: Conversation, where: str) -> Encoded:
        """The tokens of a rendering, and which of them are learned."""
        media: dict[str, Any] | None = None
        never: list[int] = []
        text, spans = rendering.text, rendering.spans
        if self._media is not None:
            text, spans, tokens, media, never = self._media.encode(rendering, conversation, where)
        else:
            tokens = tokenise(self._tokenizer, text, self._control, spans)
        length = len(tokens.ids)
        tokens = one_bos(tokens, self._tokenizer.bos_token_id)
        mask = mask_of(tokens, text, spans, self._control)
        if rendering.marked:
            learn_endings(tokens, text, mask, self._control)
        for position in never:
            mask[position - (length - len(tokens.ids))] = 0
        end = self._end(rendering, tokens, text, mask)
        return Encoded(tokens.ids + end, mask + [1] * len(end), media)

    def _end(self, rendering: Rendering, tokens: Tokens, text: str, mask: list[int]) -> list[int]:
        """The token that ends the last answer, where the rendering has none: a model must learn to stop."""
        eos = self._tokenizer.eos_token_id
        if rendering.ending is not None:
            whole = tokenise(self._tokenizer, rendering.ending, self._control)
            ending = last_control(whole, rendering.ending, self._control)
            return [token for token in [eos if ending is None else ending] if token is not None]
        last = next((t for t in range(len(mask) - 1, -1, -1) if mask[t]), None)
        if last is None or tokens.ids[last] in self._control or eos is None:
            return []
        return [eos] if not text[tokens.ends[last] :].strip() else []

    def plain(self, content: str, completion: str | None, where: str) -> Encoded:
        """Without a template: the prompt as the sampler would be asked it, then the completion (None: all of
        the text is learned)."""
        found = self._plain(content, completion)
        if self._media is not None:
            self._media.refuse_placeholders(found.token_ids, where)
        return found

    def _plain(self, content: str, completion: str | None) -> Encoded:
        eos = self._tokenizer.eos_token_id
        end = [eos] if eos is not None else []
        if completion is None:
            ids = _open_prompt(self._tokenizer, list(self._tokenizer(content).input_ids))
            ids = ids if ids[-1:] == end else ids + end
            return Encoded(ids, [0] + [1] * (len(ids) - 1))
        prompt = _open_prompt(self._tokenizer, list(self._tokenizer(content).input_ids))
        ids = _open_prompt(self._tokenizer, list(self._tokenizer(content + completion).input_ids))
        if ids[: len(prompt)] != prompt:  # a token over the boundary, which no sampler would see
            ids = prompt + _ids(self._tokenizer, completion)
        ids = ids if ids[-1:] == end else ids + end
        return Encoded(ids, [0] * len(prompt) + [1] * (len(ids) - len(prompt)))

    def _fitted(self, sequences: list[Encoded], repaired: int, where: str) -> EncodedRow:
        """Within `max_length`, as `overlong` says; sequences of which nothing is learned are dropped."""
        row = EncodedRow(repaired=repaired)
        for one in sequences:
            length = len(one.token_ids)
            if self._max_length is not None and length > self._max_length:
                if self._spec.overlong == "error":
                    raise DataError(f"{where} has {length} tokens, more than policy.max_length")
                # A cut through an image would leave the model tokens without their picture.
                if self._spec.overlong == "drop" or one.media is not None:
                    row.dropped += 1
                    continue
                one = Encoded(one.token_ids[: self._max_length], one.loss_mask[: self._max_length])
                row.truncated += 1
            one.loss_mask[:1] = [0] * len(one.loss_mask[:1])  # nothing predicts the first token
            if any(one.loss_mask):
                row.sequences.append(one)
            else:
                row.dropped += 1
        return row


# --- prompts -------------------------------------------------------------------------------------------
def encode_prompt(
    tokenizer: Any, content: Content, spec: DatasetSpec, tools: list[Any] | None = None
) -> list[int]:
    """Token ids of a prompt, up to and with the marker of the answer's beginning. The chat template is given
    `tools` (JSON schemas).

    Messages go through the chat template; a string does so as one user message unless `spec.chat` is
    false or the tokenizer has no template. Raises DataError when a template is needed and missing, or
    refuses the roles.
    """
    messages = _messages(tokenizer, content, spec)
    if messages is None:
        return _open_prompt(tokenizer, list(tokenizer(content).input_ids))
    return _open_prompt(tokenizer, _ids(tokenizer, _apply(tokenizer, messages, spec, tools)))


def _open_prompt(tokenizer: Any, ids: list[int]) -> list[int]:
    """One BOS at most, and no end of sequence where the tokenizer closes every text it gets."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    closed = len(ids) > 1 and eos is not None and eos != bos and ids[-1] == eos
    if closed and tokenizer("a").input_ids[-1] == eos:
        ids = ids[:-1]
    return ids


def _messages(tokenizer: Any, content: Content, spec: DatasetSpec) -> list[dict[str, Any]] | None:
    if isinstance(content, list):
        if not tokenizer.chat_template:
            raise DataError(
                f"{spec.path}: chat messages (or `system`, or `chat: true`) need a tokenizer with a chat "
                "template; use `template` for plain prompts"
            )
        return content
    if spec.chat is False or not tokenizer.chat_template:
        return None
    return as_messages(content, spec)


def _apply(tokenizer: Any, messages: list[dict[str, Any]], spec: DatasetSpec, tools: list[Any] | None) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tools, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        roles = ", ".join(str(m["role"]) for m in messages)
        raise DataError(f"{spec.path}: the chat template refuses the roles {roles}: {error}") from error


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
