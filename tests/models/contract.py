"""What the families' contract test runs: sequences of a family, the reference, training in some ranks.

Tolerances, fixed before any result was seen. Logits and losses (mean over tokens): 1e-5, absolute. Gradients:
1e-5 of the tensor's largest gradient, plus 1e-7 for tensors that have none but for rounding (biases of keys).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as T
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from hpc_rl.algorithms.log_probs import token_log_probs
from hpc_rl.models.base import Media, ParallelSpec
from hpc_rl.models.hf.model import HfModel, build
from hpc_rl.policy.optimizer import clip_gradients, make_optimizer
from hpc_rl.recipe.schema import Model, Optimizer
from tests.families import FAMILIES
from tests.tiny_models import save_model
from tests.tiny_vlms import encode, picture, processor, save_vlm

CPU = torch.device("cpu")
ONE = ParallelSpec(CPU, torch.float32)
TP2 = ParallelSpec(CPU, torch.float32, tp=2)
TOLERANCE, FLOOR = 1e-5, 1e-7
STEPS = 5
OPTIMIZERS = {
    "sgd": Optimizer(name="sgd", lr=0.1, clip_norm=1.0),
    "adamw": Optimizer(name="adamw", lr=1e-3, clip_norm=1.0),
}


@dataclass
class Sequence:
    """Token ids, what the processor made of their images, and from where on tokens are trained."""

    ids: list[int]
    media: Media | None = None
    trained_from: int = 1


Row = list[Sequence]


def save(folder: Path, family: str, **changes: Any) -> Path:
    return (save_vlm if FAMILIES[family].vision else save_model)(folder, family, **changes)


def rows_of(family: str) -> list[Row]:
    """Four rows. Lengths are unequal and exceed the windows of 16; images are of several sizes, before and
    after text, one or two to a sequence; the last row has none."""
    if not FAMILIES[family].vision:
        lengths = [[7, 3, 40], [25, 18], [33], [1 + 4, 21, 9]]
        starts = iter(range(5, 90, 7))
        return [
            [Sequence([5 + (s + i) % 90 for i in range(n)]) for n in row for s in [next(starts)]]
            for row in lengths
        ]
    made = processor(family)

    def sequence(text: str, *images: Any) -> Sequence:
        ids, media = encode(made, family, text, *images)
        return Sequence(ids, media, trained_from=max(1, len(ids) - 12))

    long = "and now a longer story, longer than the window"
    return [
        [sequence("what is @? a seven, " + long, picture(1)), sequence("no picture here")],
        [sequence("two", ), sequence("@ and then @ make ten", picture(2), picture(3, 42, 28))],
        [sequence("@ is a four", picture(4, 28, 56)), sequence("@" + long, picture(5))],
        [sequence("a row without any picture"), sequence(long)],
    ]  # fmt: skip


def blank_of(family: str) -> Sequence:
    """A sequence with a small image of which nothing is trained."""
    ids, media = encode(processor(family), family, "@", picture(9))
    return Sequence(ids, media, trained_from=len(ids))


def build_model(folder: Path | str, parallel: ParallelSpec | None = None, **options: Any) -> HfModel:
    return build(
        Model(path=str(folder), dtype="float32", **options), parallel or ParallelSpec(CPU, torch.float32)
    )


def tensors(row: Row) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Media | None] | None]:
    """`(input_ids, position_ids, keep, targets, media)` of a row."""
    ids = torch.tensor([token for s in row for token in s.ids])
    positions = torch.cat([torch.arange(len(s.ids)) for s in row])
    keep, start = [], 0
    for s in row:
        keep += range(start + s.trained_from - 1, start + len(s.ids) - 1)
        start += len(s.ids)
    kept = torch.tensor(keep)
    media = [s.media for s in row]
    return ids, positions, kept, ids[kept + 1], media if any(media) else None


def loss_of(model: HfModel, row: Row, tokens: int) -> Tensor:
    """The row's share of the mean loss over `tokens` tokens."""
    ids, positions, keep, targets, media = tensors(row)
    return -token_log_probs(model.logits(ids, positions, keep, media), targets)[0].sum() / tokens


def tokens_of(rows: list[Row]) -> int:
    return sum(len(tensors(row)[2]) for row in rows)


def reference(folder: Path) -> Any:
    """Plain Transformers, its own default attention."""
    config = T.AutoConfig.from_pretrained(folder)
    cls = getattr(T, config.architectures[0])
    return cls.from_pretrained(folder, dtype=torch.float32)


def alone(model: Any, sequence: Sequence) -> Tensor:
    """Logits [L, V] of one sequence by plain Transformers."""
    return model(input_ids=torch.tensor([sequence.ids]), **(sequence.media or {})).logits[0]


def same_gradient(name: str, ours: Tensor | None, expected: Tensor | None) -> None:
    """A tensor without gradient has a gradient of zero."""
    if ours is None or expected is None:
        rest = ours if ours is not None else expected
        assert rest is None or float(rest.abs().max()) <= FLOOR, f"{name}: gradient on one side only"
        return
    limit = TOLERANCE * float(expected.abs().max()) + FLOOR
    off = float((ours - expected).abs().max())
    assert off <= limit, f"{name}: gradients differ by {off:.3g}, allowed {limit:.3g}"


@dataclass
class History:
    """Losses and norms of each step, and the gradients (before clipping) of the first."""

    losses: list[float]
    norms: list[float]
    first: dict[str, Tensor]


def train(model: HfModel, optimizer: str, rows: list[Row], tokens: int, parallel: ParallelSpec) -> History:
    """STEPS steps on `rows` (of this rank), gradients added up over them."""
    options = OPTIMIZERS[optimizer]
    torch_optimizer = make_optimizer(model.module, options)
    history = History([], [], {})
    for step in range(STEPS):
        total = torch.zeros(())
        for number, row in enumerate(rows):
            if model.sharded:
                model.module.set_requires_all_reduce(number == len(rows) - 1)
            loss = loss_of(model, row, tokens)
            (loss * (parallel.data_parallel if model.sharded else 1)).backward()
            total += loss.detach()
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= parallel.tp
        if step == 0:
            history.first = {
                name: full(p.grad) for name, p in model.module.named_parameters() if p.grad is not None
            }
        history.norms.append(float(clip_gradients(model.module.parameters(), options.clip_norm)))
        history.losses.append(float(total))
        torch_optimizer.step()
        torch_optimizer.zero_grad(set_to_none=True)
    return history


def train_and_compare(
    folder: str,
    spec: ParallelSpec,
    rank: int,
    rows: list[Row],
    blank: Sequence | None,
    expected: dict[str, Any],
) -> None:
    """Train on this rank's rows and compare with one process that had all of them. The file is in the
    shards bit by bit, and comes back from them."""
    in_file = load_file(Path(folder) / "model.safetensors")
    own = rows[rank // spec.tp :: spec.data_parallel]
    tokens = tokens_of(rows)
    for name, history in expected.items():
        model = build_model(folder, spec)
        sent = [pair for bucket in model.buckets(150_000) for pair in bucket]
        assert sorted(key for key, _ in sent) == sorted(in_file)
        assert all(torch.equal(tensor, in_file[key]) for key, tensor in sent)
        if model.needs_media:
            assert blank is not None
            own = [row if any(s.media for s in row) else [*row, blank] for row in own]
        ours = train(model, name, own, tokens, spec)
        for step, (a, b) in enumerate(zip(ours.losses, history["losses"], strict=True)):
            assert abs(a - b) <= TOLERANCE, f"{name} {spec}: loss of step {step} is {a}, not {b}"
        for parameter, gradient in ours.first.items():
            same_gradient(f"{name} {spec} {parameter}", gradient, history["first"].get(parameter))
        missing = history["first"].keys() - ours.first.keys()
        assert not missing, f"no gradients of {sorted(missing)}"
        for step, (a, b) in enumerate(zip(ours.norms, history["norms"], strict=True)):
            assert abs(a - b) <= TOLERANCE * max(1.0, b), (
                f"{name} {spec}: norm of step {step} is {a}, not {b}"
            )


def full(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


@contextmanager
def world(folder: Path, name: str, rank: int, size: int) -> Iterator[None]:
    """A default gloo group of `size` ranks for a while."""
    store, limit = dist.FileStore(str(folder / name), size), timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()
