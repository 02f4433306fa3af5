"""Sizes before sequences: ranks share the work of a batch, and batches by tokens have images."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from hpc_rl.bus.server import RedisServer
from hpc_rl.data.encode import EncodedRow
from hpc_rl.data.errors import DataError
from hpc_rl.data.media import MediaFiles
from hpc_rl.data.rows import load_rows
from hpc_rl.data.sizes import RowSizes
from hpc_rl.models.base import ModelError
from hpc_rl.models.hf.rows import padded
from hpc_rl.policy.fsdp2 import Fsdp2Trainer
from hpc_rl.policy.sft_data import SftData
from hpc_rl.policy.sft_rows import RowSource, row_source
from hpc_rl.policy.sft_sizes import Share, SharedSizes
from hpc_rl.recipe.schema import DatasetSpec, Policy, Recipe
from tests.data.chat_templates import make_tokenizer
from tests.policy.sft_runs import SGD, apart, fresh, one_process, sharded, start, train
from tests.policy.test_sft_data import write
from tests.tiny_vlms import processor, save_vlm
from tests.training import make_context, make_plan, make_run

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
TOKENS = {"batch_tokens": 192, "micro_batch_tokens": 96, "steps": 6}


def digits(folder: Path, count: int = 24) -> DatasetSpec:
    """Bright strokes on black in three sizes, in LLaVA format; some rows have two pictures, some none."""
    random, rows = np.random.default_rng(0), []
    for k in range(count):
        pictures = []
        for number in range((1, 2, 0)[k % 3]):
            pixels = np.zeros((28, 28 + 14 * (k % 4), 3), np.uint8)
            pixels[4:24, 6 + 2 * (k % 5) : 10 + 2 * (k % 5)] = random.integers(128, 255)
            Image.fromarray(pixels).save(folder / f"{k}_{number}.png")
            pictures.append(f"{k}_{number}.png")
        question = "<image>" * len(pictures) + "which digit?"[: 3 + k % 9]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"{k * 37}"}]
        rows.append({"image": pictures or None, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return DatasetSpec(path=str(folder / "rows.json"), format="llava")


def picture_source(folder: Path) -> RowSource:
    spec = digits(folder)
    made = processor("qwen2_5_vl")
    files = MediaFiles(spec, folder)
    return row_source(load_rows(spec), spec, made.tokenizer, None, processor=made, files=files)


class Counted:
    """A source that notes which rows its encoders made."""

    def __init__(self, source: RowSource) -> None:
        self.made: list[int] = []
        self.source = replace(source, encoder=self._noting(source.encoder))

    def _noting(self, make: Callable[[], Callable[[int], EncodedRow]]) -> Any:
        def encoder() -> Callable[[int], EncodedRow]:
            encode = make()

            def note(index: int) -> EncodedRow:
                self.made.append(index)
                return encode(index)

            return note

        return encoder


Seen = list[tuple[list[list[tuple[int, int]]], float]]


def in_ranks(
    source: RowSource,
    policy: dict[str, Any],
    ranks: int,
    state: bytes | None = None,
    steps: int = 6,
    **options: Any,
) -> tuple[list[Seen], list[bytes], list[dict[str, float]]]:
    """`(by rank and step: micro-batches by key, trained tokens; the state after each step; metrics)`
    of ranks that are threads."""
    store = dist.HashStore()

    def rank_of(rank: int) -> tuple[Seen, list[bytes], dict[str, float]]:
        share = Share(store, rank, ranks, limit_s=30.0)
        data = SftData(source, Policy(**policy), 5, ranks, rank=rank, share=share, **options)
        first = 1
        if state is not None:
            data.load_state(state)
            first = json.loads(state)["step"] + 1
        seen, states = [], []
        assert data.total_steps >= steps
        for step in range(first, steps + 1):
            micro_batches, tokens = data.micro_batches(step, rank)
            seen.append(([[(s.ordinal, s.sample) for s in one] for one in micro_batches], tokens))
            states.append(data.state())
        data.close()
        return seen, states, data.metrics()

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(rank_of, range(ranks)))
    assert all(states == found[0][1] for _, states, _ in found)
    assert all(metrics == found[0][2] for _, _, metrics in found)
    return [seen for seen, _, _ in found], found[0][1], [metrics for _, _, metrics in found]


def rows_of(seen: list[Seen], step: int) -> list[list[tuple[int, int]]]:
    """The packed rows of a step over all ranks."""
    return sorted(one for rank in seen for one in rank[step][0] if one)


@pytest.mark.parametrize("ends", [{"steps": 6}, {"steps": None, "epochs": 2}], ids=["steps", "epochs"])
def test_token_batches_with_images_do_not_depend_on_ranks_and_resume_on_others(
    tmp_path: Path, ends: dict[str, Any]
) -> None:
    source, policy = picture_source(tmp_path), {**TOKENS, **ends}
    alone, states, metrics = in_ranks(source, policy, 1)
    assert len({len(one) for step in alone[0] for one in step[0]}) > 1
    for ranks, workers in ((2, 1), (3, 0)):
        seen, same, counts = in_ranks(source, policy, ranks, workers=workers)
        assert same == states
        assert counts[0] == metrics[0]
        for step in range(6):
            assert rows_of(seen, step) == rows_of(alone, step)
            assert {rank[step][1] for rank in seen} == {alone[0][step][1]}
            assert len({len(rank[step][0]) for rank in seen}) == 1
        again, after, _ = in_ranks(source, policy, 4 - ranks, state=states[2])
        assert after == states[3:]
        assert [rows_of(again, step) for step in range(3)] == [rows_of(alone, step) for step in range(3, 6)]


@pytest.mark.parametrize(
    "policy",
    [
        {"batch_size": 16, "micro_batch_tokens": 512, "steps": 6},
        {"batch_size": 16, "micro_batch_size": 2, "micro_batch_tokens": None, "steps": 6},
        {"batch_tokens": 2048, "micro_batch_tokens": 512, "steps": 6},
        {"batch_tokens": 2048, "micro_batch_tokens": 512, "epochs": 5},
    ],
    ids=["rows", "fixed", "tokens", "tokens-epochs"],
)
def test_text_shared_by_ranks_is_dealt_as_if_each_had_encoded_all(
    tmp_path: Path, policy: dict[str, Any]
) -> None:
    spec = write(tmp_path, 90)
    source = row_source(load_rows(spec), spec, make_tokenizer(), 400)
    whole = SftData(source, Policy(**policy), 5, 4)
    expected: list[Seen] = [[] for _ in range(4)]
    for step in range(1, 7):
        for rank in range(4):
            mine, tokens = whole.micro_batches(step, rank)
            expected[rank].append(([[(s.ordinal, s.sample) for s in one] for one in mine], tokens))
    saved = whole.state()
    whole.close()
    seen, states, _ = in_ranks(source, policy, 4, workers=1)
    assert seen == expected
    assert states[-1] == saved
    again, after, _ = in_ranks(source, policy, 3, state=states[1])  # another number of ranks
    assert after == states[2:]
    for step in range(4):
        keys = [
            {key for one in rows_of(of, k) for key in one} for of, k in ((again, step), (expected, step + 2))
        ]
        assert keys[0] == keys[1]


def test_a_rank_encodes_its_share_of_the_rows(tmp_path: Path) -> None:
    """Of 6 steps of 32 rows on 4 ranks: a quarter for the sizes, a quarter to train on, and what is ahead."""
    spec = write(tmp_path, 300)
    sources = [Counted(row_source(load_rows(spec), spec, make_tokenizer(), None)) for _ in range(4)]
    store, policy = dist.HashStore(), Policy(batch_size=32, micro_batch_tokens=1024, steps=6)

    def rank_of(rank: int) -> None:
        data = SftData(sources[rank].source, policy, 5, 4, rank=rank, share=Share(store, rank, 4, 30.0))
        for step in range(1, 7):
            data.micro_batches(step, rank)
        data.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(rank_of, range(4)))
    made = [len(counted.made) for counted in sources]
    assert max(made) <= 2 * 6 * 32 / 4 + 64 / 4
    assert sum(made) >= 2 * 6 * 32


def test_a_bad_row_is_the_same_error_on_all_ranks_at_its_step(tmp_path: Path) -> None:
    spec = write(tmp_path, 64).model_copy(update={"shuffle": False})
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    lines[37] = '{"prompt": "37:"}'
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    source = row_source(load_rows(spec), spec, make_tokenizer(), None)
    store, policy = dist.HashStore(), Policy(batch_size=8, micro_batch_tokens=512, steps=8)

    def rank_of(rank: int) -> str:
        data = SftData(source, policy, 5, 3, rank=rank, share=Share(store, rank, 3, 30.0))
        for step in range(1, 5):
            data.micro_batches(step, rank)
        with pytest.raises(DataError) as error:
            data.micro_batches(5, rank)
        data.close()
        return str(error.value)

    with ThreadPoolExecutor(3) as pool:
        said = set(pool.map(rank_of, range(3)))
    assert len(said) == 1
    assert "row 37 has no column 'completion'" in said.pop()


def test_a_rank_that_does_not_come_is_named_and_closing_does_not_wait() -> None:
    def sizes(limit_s: float) -> SharedSizes:
        share = Share(dist.HashStore(), 0, 3, limit_s)
        share.store.set("rows/1/rank 1", "[]")
        made = SharedSizes(lambda: lambda ordinal: RowSizes(((3, 1, 0),)), share, 0, "rows")
        made.start_at(0, 10)
        return made

    late = sizes(0.2)
    with pytest.raises(TimeoutError, match=r"waited 0\.2 s for policy rank 2 to say the sizes of its rows"):
        late.of(0)
    late.close()
    waiting = sizes(600.0)
    waiting.expect(10)
    began = time.monotonic()
    waiting.close()
    assert time.monotonic() - began < 60
    assert not [t for t in threading.enumerate() if t.name.startswith("hpc-rl-sizes")]


class Away(dist.HashStore):
    """A store that cannot be reached for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.tries = 0

    def set(self, key: str, value: str) -> None:
        self.tries += 1
        if self.tries < 3:
            raise dist.DistNetworkError("connection refused")
        super().set(key, value)


def test_a_store_that_is_away_is_tried_again() -> None:
    store = Away()
    share = Share(store, 0, 1, 60.0)
    made = SharedSizes(lambda: lambda ordinal: RowSizes(((ordinal, 1, 0),)), share, 0, "rows")
    made.start_at(0, 5)
    assert [made.of(k).sequences for k in range(5)] == [((k, 1, 0),) for k in range(5)]
    assert store.tries == 3
    made.close()


def test_a_file_that_changed_since_it_was_measured_is_named(tmp_path: Path) -> None:
    source = picture_source(tmp_path)
    source = replace(source, spec=source.spec.model_copy(update={"shuffle": False}))
    data = SftData(source, Policy(**TOKENS), 5, 1)
    data.micro_batches(1, 0)
    for file in tmp_path.glob("*.png"):
        Image.new("RGB", (56, 56)).save(file)
    with pytest.raises(DataError, match=r"rows\.json: row \d+: its sequence 0 has other tokens than the \d+"):
        for step in range(2, 7):
            data.micro_batches(step, 0)
    data.close()


# --- through the trainer ---------------------------------------------------------------------------
def make_recipe(
    folder: Path, family: str = "qwen2_5_vl", attention: str | None = None, **policy: Any
) -> Recipe:
    spec = digits(folder)
    model = save_vlm(folder / f"model_{family}", family)
    options = {**TOKENS, "steps": 4, "optimizer": SGD, **policy}
    return Recipe.model_validate({
        "name": "digits", "kind": "sft", "seed": 3,
        "model": {"path": str(model), "dtype": "float32", "attn_implementation": attention},
        "data": {"train": spec.model_dump()}, "policy": options,
    })  # fmt: skip


def test_packed_token_batches_with_images_train_as_padded_ones(tmp_path: Path) -> None:
    packed = one_process(tmp_path / "packed", make_recipe(tmp_path))
    _, trainer = fresh(tmp_path / "padded", make_recipe(tmp_path, attention="sdpa"))
    trainer.model.rows = padded
    losses = train(trainer, 1, 4)
    trainer.close()
    assert apart(packed["losses"], losses) <= 1e-5
    assert len(set(losses)) == 4


@pytest.mark.redis
def test_two_ranks_train_token_batches_with_images_as_one_process_does(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    recipe = make_recipe(tmp_path, steps=None, epochs=1, batch_tokens=128, micro_batch_tokens=64)
    one = one_process(tmp_path / "one", recipe)
    last = len(one["losses"])
    assert last > 3
    run, two = sharded(tmp_path / "two", recipe, redis_server, last=last, cut=3)
    assert apart(one["losses"], two["losses"]) <= 1e-5
    assert apart(one["parameters"], two["parameters"]) <= 1e-5
    trainer = start(run, recipe, attempt=2, step=3)
    assert trainer.total_steps == last
    assert apart(one["losses"][3:], train(trainer, 4, last)) <= 1e-5
    trainer.close()


def test_token_batches_with_images_need_packed_rows(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "mllama")
    trainer = Fsdp2Trainer(make_context(make_run(tmp_path / "run", recipe, make_plan(recipe)), recipe))
    with pytest.raises(ModelError, match=r"policy\.batch_tokens .* padded.*policy\.batch_size"):
        trainer.load()
    trainer.close()
