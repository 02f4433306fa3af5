"""Make the quickstart's tiny model and its data: sorting digits, from a corpus that mostly does otherwise.

A row is `5203=` and the right answer is `0235`. The corpus for SFT (`train_sft.jsonl`) is like scraped text:
only some answers are sorted, the others are descending, reversed or copied, and the longer the row the rarer
the right one. SFT therefore leaves a model that can sort but seldom does; the reward of GRPO (`train.jsonl`,
right answers only) tells which of its habits is wanted. So does DPO: `pairs.jsonl` (rows of `train.jsonl`)
and `pairs_eval.jsonl` (rows of `eval.jsonl`) have the right answer as chosen and that of another habit as
rejected. No other two files share a row. The same `--seed` gives the same weights and rows.

Usage: python make_model.py FOLDER [--seed 0]
Writes FOLDER/model (Qwen3, 0.5 M parameters, one character per token) and the five .jsonl files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

CHARACTERS = "0123456789="
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
LENGTHS = (3, 4, 5, 6)
SORTED_SHARE = {3: 0.4, 4: 0.25, 5: 0.2, 6: 0.15}  # share of right answers in the SFT corpus, by row length


def right_answer(digits: str) -> str:
    """The digits in ascending order."""
    return "".join(sorted(digits))


def corpus_answer(digits: str, rng: random.Random) -> str:
    """What the SFT corpus says: right with a probability that falls with the length."""
    if rng.random() < SORTED_SHARE[len(digits)]:
        return right_answer(digits)
    habit = rng.choice(("descending", "descending", "reversed", "copied"))
    if habit == "descending":
        return right_answer(digits)[::-1]
    return digits[::-1] if habit == "reversed" else digits


def wrong_answer(digits: str, rng: random.Random) -> str:
    """What another habit says: all of them have the right digits, in another order."""
    habits = (right_answer(digits)[::-1], digits[::-1], digits)
    return rng.choice([answer for answer in habits if answer != right_answer(digits)])


def distinct_rows(count: int, rng: random.Random) -> list[str]:
    """`count` different strings of digits, lengths equally likely until the short ones run out."""
    rows: dict[str, None] = {}
    while len(rows) < count:
        rows["".join(rng.choice("0123456789") for _ in range(rng.choice(LENGTHS)))] = None
    return list(rows)


def write_rows(path: Path, rows: list[str], answer: Callable[[str], str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for digits in rows:
            file.write(json.dumps({"prompt": digits + "=", "answer": answer(digits)}) + "\n")


def write_pairs(path: Path, rows: list[str], rng: random.Random) -> None:
    """Rows of one digit alone (333) have no wrong order, and are left out."""
    with path.open("w", encoding="utf-8") as file:
        for digits in (row for row in rows if len(set(row)) > 1):
            pair = {"chosen": right_answer(digits), "rejected": wrong_answer(digits, rng)}
            file.write(json.dumps({"prompt": digits + "=", **pair}) + "\n")


def make_data(folder: Path, seed: int, sft_rows: int, train_rows: int, eval_rows: int) -> None:
    """The five files; held-out rows are in none of the training files."""
    rng = random.Random(seed)
    rows = distinct_rows(eval_rows + sft_rows + train_rows, rng)
    held_out, corpus, train = rows[:eval_rows], rows[eval_rows : eval_rows + sft_rows], rows[-train_rows:]
    write_rows(folder / "train_sft.jsonl", corpus, lambda digits: corpus_answer(digits, rng))
    write_rows(folder / "train.jsonl", train, right_answer)
    write_rows(folder / "eval.jsonl", held_out, right_answer)
    write_pairs(folder / "pairs.jsonl", train, rng)
    write_pairs(folder / "pairs_eval.jsonl", held_out, rng)


def make_tokenizer(folder: Path) -> int:
    """A fast tokenizer with one token per character; returns the size of its vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate([*SPECIAL.values(), *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL).save_pretrained(folder)
    return len(vocab)


def make_model(folder: Path, seed: int, layers: int, hidden: int) -> int:
    """A Qwen3 with random weights in fp32; head_dim is 64 for vLLM's CPU attention. Returns its size."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one file of 2 MB

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=make_tokenizer(folder),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
        head_dim=64,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
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
    parser.add_argument("--sft-rows", type=int, default=3000)
    parser.add_argument("--train-rows", type=int, default=4000)
    parser.add_argument("--eval-rows", type=int, default=256)
    arguments = parser.parse_args()
    if arguments.hidden < 64 or arguments.hidden % 64:
        parser.error("--hidden must be a multiple of 64 (head_dim is 64)")
    (arguments.folder / "model").mkdir(parents=True, exist_ok=True)
    make_data(arguments.folder, arguments.seed, arguments.sft_rows, arguments.train_rows, arguments.eval_rows)
    size = make_model(arguments.folder / "model", arguments.seed, arguments.layers, arguments.hidden)
    print(f"{arguments.folder / 'model'}: {size:,} parameters; data in {arguments.folder}")


if __name__ == "__main__":
    main()
