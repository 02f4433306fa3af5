"""Chat templates in the shape of well-known families' (own words, no more than what makes each awkward),
and a byte-level BPE tokenizer that knows their control tokens."""

# ruff: noqa: E501
from __future__ import annotations

import functools
from typing import Any

# Alternation is demanded, there is no system role, no generation prompt, and answers begin with a blank.
MISTRAL = """{{ bos_token }}{% for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}{% endif %}
{%- if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"""

# No system role; the assistant is called model; a line break follows the end of a turn.
GEMMA = """{{ bos_token }}{% for m in messages %}
{%- if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

LLAMA3 = """{{ bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

PHI4 = """{% for m in messages %}
{{- '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

# Thoughts before the last question are dropped; after it an empty thought is put in where there is none.
_THINKING = """{%- if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m['role'] == 'assistant' %}
{%- set parts = m['content'].split('</think>') %}
{%- set answer = parts[-1].lstrip('\n') %}
{%- set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}
{%- set thoughts = '<think>\n' + thought + '\n</think>\n\n' if loop.index0 > ns.last else '' %}
{{- '<|im_start|>assistant\n' }}OPEN{{ thoughts + answer }}
{%- for call in m.get('tool_calls', []) %}{{ '<tool_call>' + call.function.arguments | tojson + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>' }}CLOSE{{ '\n' }}
{%- else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
QWEN3 = _THINKING.replace("OPEN", "").replace("CLOSE", "")
# The same with marks, as training variants of templates have them.
QWEN3_MARKED = _THINKING.replace("OPEN", "{% generation %}").replace("CLOSE", "{% endgeneration %}")

# The last turn ends with another token than those before, whose analysis is dropped.
HARMONY = """{% for m in messages %}{% if m['role'] == 'assistant' %}
{%- if loop.last and m.get('thinking') %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m['thinking'] + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}{{ '<|return|>' if loop.last else '<|end|>' }}
{%- else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# The prompt opens a thought, and no rendering of an answer has one.
R1 = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}
{{- '<|assistant|>' + m['content'].split('</think>')[-1] + eos_token }}
{%- else %}{{ '<|user|>' + m['content'] }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"""

# The prompt opens a thought, history drops it, and tool calls follow the answer (QwQ).
QWQ = """{% for m in messages %}{% if m['role'] == 'assistant' %}
{{- '<|im_start|>assistant' }}{% set text = m['content'].split('</think>')[-1].lstrip('\n') %}{{ '\n' + text if text }}
{%- for call in m.get('tool_calls', []) %}{{ '\n<tool_call>' + call.function.arguments | tojson + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"""

# Every rendering is closed with EOS, after the token that ends the turn.
PHI3 = """{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

# Parts only: a string has no attributes (LLaVA-NeXT).
PARTS = """{% for m in messages %}{{ '<|' + m['role'] + '|>' }}
{%- for part in m['content'] %}{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}{{ '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

# Nothing ends a turn but a line break.
PLAIN = """{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""

ALL = {
    "mistral": MISTRAL, "gemma": GEMMA, "llama3": LLAMA3, "phi4": PHI4, "qwen3": QWEN3,
    "qwen3_marked": QWEN3_MARKED, "harmony": HARMONY, "r1": R1, "plain": PLAIN,
    "phi3": PHI3, "qwq": QWQ,
}  # fmt: skip
CONTROL = (
    "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|start|>", "<|channel|>", "<|message|>",
    "<|end|>", "<|return|>", "<|user|>", "<|assistant|>",
)  # fmt: skip


# How Llama 3 and Qwen cut text before BPE: line breaks stay together, whatever follows.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@functools.cache
def _core(adds_bos: bool, gpt2: bool) -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if gpt2
        else [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(
        ["the answer is four, and the question was what two and two are\n\n"] * 8, trainer
    )
    steps: list[Any] = [processors.ByteLevel(trim_offsets=True)]
    if adds_bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]))
    core.post_processor = processors.Sequence(steps)
    return str(core.to_str())


def make_tokenizer(template: str | None = None, adds_bos: bool = True, gpt2: bool = False) -> Any:
    """A fresh tokenizer: byte-level BPE with offsets trimmed, as Llama 3's; BOS in front of plain text.

    `gpt2` cuts as GPT-2 does: of several line breaks before a word the last stands alone.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_core(adds_bos, gpt2)),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False,
        additional_special_tokens=list(CONTROL),
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer
