"""SFT on video clips (Cosmos-Reason1 rows): the loss is that of plain Transformers, and it falls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from transformers.video_utils import VideoMetadata

from hpc_rl.bus.server import RedisServer
from hpc_rl.data.video import read_video
from hpc_rl.recipe.schema import Recipe
from tests.policy.sft_runs import SGD, apart, fresh, one_process, sharded, start, train
from tests.tiny_vlms import picture, processor, save_vlm

pytestmark = [pytest.mark.torch, pytest.mark.redis]
torch.set_num_threads(1)
FPS, FRAMES = 2.0, 4
# Clip (None: the row has no clip), question and answer. Row 3 has one sampled frame only.
ROWS = [
    ("a", "where to?", "left"),
    ("b", "and now?", "straight on"),
    (None, "who?", "you"),
    ("c", "what is it?", "a dot"),
    ("picture", "what colour?", "grey"),
    ("d", "next?", "right"),
]


def write_clip(path: Path, seed: int, frames: int) -> None:
    """A square that moves over noise, 10 frames a second."""
    import av

    noise = np.random.default_rng(seed).integers(0, 200, (36, 48, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 36, "yuv420p"
        for k in range(frames):
            shown = noise.copy()
            shown[8:16, k : k + 8] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode(None))


def make_recipe(folder: Path, family: str, **policy: Any) -> Recipe:
    """The rows name a folder that is not there: clips are found by their names."""
    model = save_vlm(folder / "model", family)
    made = processor(family)
    per_frame = 28 * 28 * (FRAMES if family == "qwen3_vl" else 1)  # Qwen3-VL counts the whole clip
    made.video_processor.size = {"shortest_edge": 14 * 14, "longest_edge": per_frame}
    made.save_pretrained(model)
    (folder / "media" / "clips").mkdir(parents=True)
    for number, (name, frames) in enumerate((("a", 20), ("b", 12), ("c", 3), ("d", 9))):
        write_clip(folder / "media" / "clips" / f"{name}.mp4", number, frames)
    picture(7).save(folder / "media" / "picture.png")
    rows = []
    for name, question, answer in ROWS:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        kind = (
            {}
            if name is None
            else {"image": "picture.png"}
            if name == "picture"
            else {"video": f"x/{name}.mp4"}
        )
        rows.append({**kind, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    train = {
        "path": str(folder / "rows.json"), "format": "cosmos_reason1", "shuffle": False,
        "media_path": str(folder / "media"), "fps": FPS, "max_frames": FRAMES,
    }  # fmt: skip
    options = {"batch_size": 6, "micro_batch_tokens": 160, "steps": 4, "optimizer": SGD, **policy}
    return Recipe.model_validate({
        "name": "tiny-video", "kind": "sft", "seed": 3, "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": train, "eval": train}, "policy": options,
    })  # fmt: skip


def published_positions(inputs: Any, merge: int, tokens_per_second: int) -> torch.Tensor:
    """[3, 1, T] of a row with one clip, as Qwen2.5-VL was published (transformers 4.49, and vLLM): the text
    behind the clip begins after the largest of its positions."""
    (types,) = inputs["mm_token_type_ids"].tolist()
    before, after = types.index(2), types[::-1].index(2)
    ((frames, height, width),) = inputs["video_grid_thw"].tolist()
    seconds = float(torch.as_tensor(inputs["second_per_grid_ts"])[0])
    height, width = height // merge, width // merge
    place = [(p, p, p) for p in range(before)]
    for t in range(frames):
        moment = before + int(t * seconds * tokens_per_second)
        place += [(moment, before + h, before + w) for h in range(height) for w in range(width)]
    begin = max(max(p) for p in place) + 1
    place += [(p, p, p) for p in range(begin, begin + after)]
    return torch.tensor(place).T[:, None]


def plain_loss(recipe: Recipe) -> float:
    """Transformers alone: each row by itself through the processor and the model, the loss on its answer."""
    folder = Path(recipe.model.path)
    made = T.AutoProcessor.from_pretrained(folder)
    model = T.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    media = Path(recipe.data.train.media_path or "")
    total, tokens = 0.0, 0
    for name, question, answer in ROWS:
        extra: dict[str, Any] = {}
        kind = "image" if name == "picture" else "video"
        if kind == "image":
            extra["images"] = [picture(7)]
        elif name is not None:
            clip = read_video(media / "clips" / f"{name}.mp4", FPS, FRAMES, None, "clip")
            frames = clip.frames if len(clip.frames) > 1 else np.repeat(clip.frames, 2, 0)
            places = clip.indices if len(clip.frames) > 1 else clip.indices * 2
            extra |= {"videos": [frames], "do_sample_frames": False, "video_metadata": [VideoMetadata(
                total_num_frames=clip.total, fps=clip.fps, frames_indices=places,
                duration=clip.total / clip.fps)]}  # fmt: skip
        parts = ([] if name is None else [{"type": kind}]) + [{"type": "text", "text": question}]
        text = made.apply_chat_template(
            [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        )
        inputs = made(text=[text], return_tensors="pt", add_special_tokens=False, **extra)
        if "second_per_grid_ts" in inputs:
            vision = model.config.vision_config
            extra = {"position_ids": published_positions(
                inputs, vision.spatial_merge_size, vision.tokens_per_second)}  # fmt: skip
        else:
            extra = {}
        learned = len(answer) + 1  # one token per character, and the end of the turn
        with torch.no_grad():
            logits = model(**inputs, **extra).logits[0, -learned - 1 : -1]
        targets = inputs["input_ids"][0, -learned:]
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        tokens += learned
    return total / tokens


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_clips_train_as_plain_transformers_would(family: str, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, family)
    _, trainer = fresh(tmp_path / "run", recipe)
    assert trainer.sft is not None
    micro_batches, _ = trainer.sft.micro_batches(1, 0)
    assert any(sum(bool(s.media) for s in samples) > 1 for samples in micro_batches)  # packed with each other
    losses = train(trainer, 1, 4)
    trainer.close()
    assert abs(losses[0] - plain_loss(recipe)) <= 1e-5
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("qwen2_5_vl", {"batch_size": 6}),  # one rank has an image and clips, the other clips alone
        ("qwen3_vl", {"batch_tokens": 160, "micro_batch_tokens": 80}),  # sizes of clips before their frames
    ],
    ids=["rows", "tokens"],
)
def test_two_ranks_train_on_clips_as_one_process_does(
    family: str, policy: dict[str, Any], tmp_path: Path, redis_server: RedisServer
) -> None:
    """The vision tower runs once for images and once for clips: on every rank, whatever its rows have."""
    recipe = make_recipe(tmp_path, family, steps=3, **policy)
    one = one_process(tmp_path / "one", recipe)
    run, two = sharded(tmp_path / "two", recipe, redis_server, last=3, cut=2)
    assert apart(one["losses"], two["losses"]) <= 1e-5
    assert apart(one["evals"], two["evals"]) <= 1e-5
    assert apart(one["parameters"], two["parameters"]) <= 1e-5
    trainer = start(run, recipe, attempt=2, step=2)
    assert apart(one["losses"][2:], train(trainer, 3, 3)) <= 1e-5
    trainer.close()
