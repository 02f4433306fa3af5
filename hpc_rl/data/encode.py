"""From text and chat messages to token ids, the same for sampling and for training. No torch.

The tokenizer is a transformers one, made by whoever has it. Chat templates bring their own special
tokens, so their text is tokenised without adding any (else it would begin with two BOS).
"""

from __future__ import annotations

from typing import Any

from hpc_rl.data.errors import DataError
from hpc_rl.data.prompts import Content, as_messages, completion_of
from hpc_rl.recipe.schema import DatasetSpec


def encode_prompt(tokenizer: Any, content: Content, spec: DatasetSpec) -> list[int]:
    """Token ids of a prompt, up to and with the marker of the answer's beginning.

    Messages go through the chat template; a string does so as one user message unless `spec.chat` is
    false or the tokenizer has no template. Raises DataError when a template is needed and missing, or
    refuses the roles.
    """
    messages = _messages(tokenizer, content, spec)
    if messages is None:
        return _open_prompt(tokenizer, list(tokenizer(content).input_ids))
    return _open_prompt(tokenizer, _ids(tokenizer, _apply(tokenizer, messages, spec, generate=True)))


def encode_completion(
    tokenizer: Any, row: dict[str, Any], spec: DatasetSpec, where: str = ""
) -> tuple[list[int], list[int]]:
    """`(token_ids, loss_mask)` of one row for SFT: prompt + completion + end of sequence.

    The mask is 1 on the completion and what ends it, or for `format: text` on all but the first token.
    """
    content, completion = completion_of(row, spec, where)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if completion is None:
        assert isinstance(content, str)
        tokens = list(tokenizer(content).input_ids)
        tokens = tokens if tokens[-1:] == end else tokens + end
        return tokens, [0] + [1] * (len(tokens) - 1)
    prompt = encode_prompt(tokenizer, content, spec)
    messages = _messages(tokenizer, content, spec)
    answer = None
    if messages is not None:
        # The template says how a turn ends. What it adds after the prompt is the answer; a template
        # that rewrites the prompt when an answer follows (drops earlier thoughts) cannot say it.
        before = _apply(tokenizer, messages, spec, generate=True)
        whole = _apply(
            tokenizer, [*messages, {"role": "assistant", "content": completion}], spec, generate=False
        )
        if whole.startswith(before):
            answer = _ids(tokenizer, whole[len(before) :])
    if answer is None:
        answer = _ids(tokenizer, completion) + end
    return prompt + answer, [0] * len(prompt) + [1] * len(answer)


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


def _apply(tokenizer: Any, messages: list[dict[str, Any]], spec: DatasetSpec, generate: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))
    except TemplateError as error:
        roles = ", ".join(str(m["role"]) for m in messages)
        raise DataError(f"{spec.path}: the chat template refuses the roles {roles}: {error}") from error


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
