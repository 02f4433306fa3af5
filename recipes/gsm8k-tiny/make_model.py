"""Make a tiny Qwen2 and a byte-level BPE tokenizer for GSM8K text: `gsm8k-grpo.yaml` on two CPU cores.

The tokenizer (512 tokens by default, digits one by one) is trained on the questions and answers of
DATA/train.jsonl. Its chat template keeps user and assistant turns and leaves the system text out, which a
model of this size has no room for. The weights are random; `sft.yaml` is the first stage.

Usage: python make_model.py FOLDER --data DATA [--seed 0]
Writes FOLDER/model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

PAD, EOS, USER, ASSISTANT = "<|pad|>", "<|eos|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + "{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}" + ASSISTANT + "{{ message['content'] }}" + EOS + "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def texts(path: Path) -> list[str]:
    """Question and answer of every row."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return [f"{row['question']}\n{row['answer']}" for row in rows]


def make_tokenizer(folder: Path, corpus: list[str], vocab_size: int) -> int:
    """Train the BPE and save it; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def make_model(folder: Path, vocab_size: int, seed: int, layers: int, hidden: int) -> int:
    """A Qwen2 with random weights in fp32 and tied embeddings; head_dim is 64. Returns its size."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = Qwen2ForCausalLM(config).to(torch.float32)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K's train.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128, help="a multiple of 64")
    arguments = parser.parse_args()
    if arguments.hidden < 64 or arguments.hidden % 64:
        parser.error("--hidden must be a multiple of 64 (head_dim is 64)")
    if not (arguments.data / "train.jsonl").is_file():
        parser.error(
            f"{arguments.data / 'train.jsonl'} does not exist: --data is a folder with GSM8K's files"
        )
    model = arguments.folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    vocab_size = make_tokenizer(model, texts(arguments.data / "train.jsonl"), arguments.vocab)
    size = make_model(model, vocab_size, arguments.seed, arguments.layers, arguments.hidden)
    print(f"{model}: {size:,} parameters, {vocab_size} tokens")


if __name__ == "__main__":
    main()
