"""A data set of prompts with a picture, with two, with a clip and with none, for tiny models."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import transformers as T

from hpc_rl.data.prompt_media import Maker, MediaPrompts, PromptMedia
from hpc_rl.recipe.schema import DatasetSpec
from hpc_rl.types import Sampling, TrainSample, VersionSpan
from tests.tiny_vlms import picture, processor, save_vlm

FPS, FRAMES = 2.0, 4
PICTURES, CLIP, TEXT, TWO = 0, 1, 2, 3
TODAY = datetime(2026, 1, 2)
SAMPLING = Sampling(temperature=0.7, top_p=1.0, max_tokens=10, seed=3)


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


def write_rows(folder: Path, *, clips: bool = True) -> Path:
    """`rows.json` in the order of PICTURES, CLIP, TEXT, TWO (format llava); without `clips` a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (width, height) in enumerate(((28, 28), (42, 28), (28, 42))):
        picture(seed, width, height).save(folder / f"{seed}.png")
    if clips:
        write_clip(folder / "clip.mp4", 5, 20)
    clip = {"video": "clip.mp4"} if clips else {"image": "2.png"}
    asked: list[tuple[dict[str, Any], str, str]] = [
        ({"image": "0.png"}, "<image>\nwhat is it?", "a dot"),
        (clip, "what moves?", "a square"),
        ({}, "no picture here, what now?", "nothing"),
        ({"images": ["1.png", "2.png"]}, "<image> and <image>: which is wider?", "the first"),
    ]
    rows = [
        {**media, "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}], "level": n}
        for n, (media, q, a) in enumerate(asked)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def spec_of(rows: Path, **options: Any) -> DatasetSpec:
    return DatasetSpec(path=str(rows), format="llava", fps=FPS, max_frames=FRAMES, shuffle=False, **options)


def save_model(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A tiny model whose processor makes few tokens of a clip."""
    save_vlm(folder, family, seed, **changes)
    made = processor(family)
    if "video_processor" in made.get_attributes():
        per_frame = 28 * 28 * (FRAMES if family == "qwen3_vl" else 1)  # Qwen3-VL counts the whole clip
        made.video_processor.size = {"shortest_edge": 14 * 14, "longest_edge": per_frame}
        # As published; vLLM normalises frames by the numbers for pictures.
        made.image_processor.image_mean = list(made.video_processor.image_mean)
        made.image_processor.image_std = list(made.video_processor.image_std)
        made.save_pretrained(folder)
    return folder


def name_as_on_the_hub(folder: Path) -> Path:
    """Qwen's own names for the tokens of media, which vLLM has in its code."""
    names = {"<vision>": "<|vision_start|>", "</vision>": "<|vision_end|>"}
    names |= {"<image>": "<|image_pad|>", "<video>": "<|video_pad|>"}
    for file in (*folder.glob("*.json"), *folder.glob("*.jinja")):
        text = file.read_text()
        for ours, theirs in names.items():
            text = text.replace(ours, theirs)
        file.write_text(text)
    return folder


def prompts(model: Path, rows: Path) -> Maker:
    return MediaPrompts(spec_of(rows), rows.parent, T.AutoProcessor.from_pretrained(model), TODAY).maker()


def train_sample(media: PromptMedia | None, prompt_ids: list[int], sample: Any, row: int) -> TrainSample:
    """What the learner gets of an answer."""
    before, after = len(prompt_ids), len(sample.token_ids)
    return TrainSample(
        row, 0, prompt_ids + sample.token_ids, [0] * before + [1] * after,
        [0.0] * before + sample.log_probs, [0.0] * before + [1.0] * after,
        spans=[VersionSpan(s.version, before + s.start, before + s.end) for s in sample.spans],
        row=-1 if media is None else row, media=None if media is None else media.tensors,
    )  # fmt: skip
