"""Make a tiny model that may call a calculator, and its data: products that it cannot work out itself.

A row is `37*48=` and the right answer is `1776`. The conversations for SFT (`train_sft.jsonl`) mostly answer
by a guess (`about 2000`); a share of them calls the calculator and says what it gave. SFT therefore leaves a
model that knows both and mostly guesses. The reward of GRPO (`train.jsonl`) is 1 for the right answer alone,
so what is to be learned is to call the tool. No row is in two of the files. The same `--seed` gives the same
bytes. All products have four digits: copying a text of fixed length is quickly learnt.

Usage: python make_model.py FOLDER [--seed 0]
Writes FOLDER/model (Qwen3, 0.5 M parameters; a token per character, but for words of the chat and the call)
and the three .jsonl files.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

CALL = '{"name": "calculator", "arguments": {"expression": "'
WORDS = (CALL, '"}}', "about ", "system", "user", "assistant", "tool", "calculator")
CHARACTERS = "0123456789*="
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<|im_end|>"}
ADDED = ("<|im_start|>", "<tool_call>", "</tool_call>")
TEMPLATE = """{%- macro said(role, text) %}{{ '<|im_start|>' + role + text + '<|im_end|>' }}{% endmacro %}
{%- if tools %}{{ said('system', tools | map(attribute='function.name') | join) }}{% endif %}
{%- for message in messages %}{{ said(message.role, message.content) }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"""
TOOLS = [{"type": "function", "function": {"name": "calculator", "description": "", "parameters": {}}}]


def rows(rng: random.Random) -> list[str]:
    """All products of two numbers of which every product has four digits, in a random order."""
    found = [f"{a}*{b}" for a in range(32, 100) for b in range(32, 100)]
    rng.shuffle(found)
    return found


def value(expression: str) -> int:
    left, _, right = expression.partition("*")
    return int(left) * int(right)


def guess(number: int) -> str:
    """To one digit, as people say it without a calculator."""
    return f"about {round(number, -3)}"


def conversation(expression: str, tool: bool) -> dict[str, object]:
    messages = [{"role": "user", "content": f"{expression}="}]
    if tool:
        messages.append({"role": "assistant", "content": f'<tool_call>{CALL}{expression}"}}}}</tool_call>'})
        messages.append({"role": "tool", "content": str(value(expression))})
        messages.append({"role": "assistant", "content": str(value(expression))})
    else:
        messages.append({"role": "assistant", "content": guess(value(expression))})
    return {"messages": messages, "tools": TOOLS}


def make_data(folder: Path, seed: int, sft: int, train: int, held_out: int, share: float) -> None:
    rng = random.Random(seed)
    found = rows(rng)
    if sft + train + held_out > len(found):
        raise SystemExit(f"there are only {len(found)} rows")
    with (folder / "train_sft.jsonl").open("w", encoding="utf-8") as file:
        for expression in found[:sft]:
            file.write(json.dumps(conversation(expression, rng.random() < share)) + "\n")
    for name, part in (("train", found[sft : sft + train]), ("eval", found[-held_out:])):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for expression in part:
                file.write(json.dumps({"prompt": f"{expression}=", "answer": str(value(expression))}) + "\n")


def make_tokenizer(folder: Path) -> int:
    """Saves a fast tokenizer with the chat template; returns the size of its vocabulary."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL.values(), *ADDED, *WORDS, *CHARACTERS]
    core = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>")
    )
    pieces = "|".join(map(re.escape, WORDS))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{pieces}|[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_tokens([AddedToken(name, special=False, normalized=False) for name in ADDED[1:]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, **SPECIAL, additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokens)


def make_model(folder: Path, seed: int, layers: int, hidden: int) -> int:
    """A Qwen3 with random weights in fp32; head_dim is 64 for vLLM's CPU attention. Returns its size."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=make_tokenizer(folder),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
        head_dim=64,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    model = Qwen3ForCausalLM(config).to(torch.float32)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128, help="a multiple of 64")
    parser.add_argument("--sft-rows", type=int, default=2500)
    parser.add_argument("--train-rows", type=int, default=2000)
    parser.add_argument("--eval-rows", type=int, default=64)
    parser.add_argument("--tool-share", type=float, default=0.3, help="of the SFT rows that call the tool")
    arguments = parser.parse_args()
    (arguments.folder / "model").mkdir(parents=True, exist_ok=True)
    counts = (arguments.sft_rows, arguments.train_rows, arguments.eval_rows)
    make_data(arguments.folder, arguments.seed, *counts, arguments.tool_share)
    size = make_model(arguments.folder / "model", arguments.seed, arguments.layers, arguments.hidden)
    print(f"{arguments.folder / 'model'}: {size:,} parameters; data in {arguments.folder}")


if __name__ == "__main__":
    main()
