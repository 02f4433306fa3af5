"""A launch script as cosmos-rl's users write them, with nothing changed for hpc-rl."""

import argparse
import json
from pathlib import Path
from typing import Any

from cosmos_rl.dispatcher.algo.reward import gsm8k_reward_fn
from cosmos_rl.dispatcher.data.packer import DataPacker, DecoderOnlyLLMDataPacker
from cosmos_rl.launcher.worker_entry import main as launch_worker
from cosmos_rl.policy.config import Config
from cosmos_rl.utils.logging import logger


class Questions:
    def setup(self, config: Config, *args, **kwargs):
        self.name = config.train.train_policy.dataset.name
        self.rows = [json.loads(line) for line in Path(self.name).read_text().splitlines()]
        logger.info("%d rows", len(self.rows))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, idx: int):
        return [{"role": "user", "content": self.rows[idx]["question"]}]

    def get_reference_answer(self, idx: int) -> Any:
        return self.rows[idx]["answer"]


class Packer(DataPacker):
    """Makes a whole text of a conversation, and leaves the rest to a packer that it holds."""

    def __init__(self):
        self.inner = DecoderOnlyLLMDataPacker()

    def setup(self, config, tokenizer, *args, **kwargs):
        self.inner.setup(config, tokenizer)

    def get_rollout_input(self, item):
        return self.inner.get_rollout_input(item)[0]["content"]

    def get_policy_input(self, item, rollout_output, n_ignore_prefix_tokens=0):
        return self.inner.get_policy_input(item, rollout_output, n_ignore_prefix_tokens)


def digits_reward(to_be_evaluated: str, reference: Any = None, *args, **kwargs) -> float:
    return sum(c.isdigit() for c in to_be_evaluated) / max(len(to_be_evaluated), 1)


def length_reward(to_be_evaluated, reference, prompt=None, **kwargs):
    assert reference and prompt.startswith("sort"), (reference, prompt)
    return 0.01 * len(to_be_evaluated)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--debug", action="store_true")
    parser.parse_known_args()
    assert gsm8k_reward_fn("#### 4", "#### 4") == 1.0
    launch_worker(
        dataset=Questions,
        val_dataset=lambda config: _validation(config),
        data_packer=Packer(),
        reward_fns=[digits_reward, length_reward],
        val_reward_fns=[digits_reward],
    )


def _validation(config):
    found = Questions()
    found.setup(config)
    return found
