"""Prompts as vLLM takes them. With media it gets the ids that the chat template writes, one placeholder per
medium, and the pictures and frames themselves; it expands the placeholders by the model's own processor.

Frames are sampled already (`data/video.py`), and vLLM is told so: sampled again, engine and learner would
see other frames. That both have the same tokens is checked with every answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpc_rl.data.errors import DataError
from hpc_rl.data.prompt_media import PromptMedia
from hpc_rl.data.video import Video
from hpc_rl.rollout.engine import PromptError


def text_prompt(token_ids: Sequence[int]) -> dict[str, Any]:
    return {"prompt_token_ids": list(token_ids)}


def media_prompt(token_ids: Sequence[int], media: PromptMedia) -> dict[str, Any]:
    """A prompt with media in vLLM's form. Raises PromptError if `token_ids` are not a continuation of it."""
    try:
        short = media.short(list(token_ids))
    except DataError as error:
        raise PromptError(str(error)) from error
    data: dict[str, Any] = {}
    if media.images:
        data["image"] = list(media.images)
    if media.videos:
        data["video"] = [(video.frames, video_metadata(video)) for video in media.videos]
    prompt: dict[str, Any] = {"prompt_token_ids": short, "multi_modal_data": data}
    if media.videos:
        prompt["mm_processor_kwargs"] = {"do_sample_frames": False}
    return prompt


def video_metadata(video: Video) -> dict[str, Any]:
    """What the processors are told of a clip: as in `data/multimodal.py`, by vLLM's way of a mapping."""
    height, width = video.frames.shape[1:3]
    return {
        "total_num_frames": video.total,
        "fps": video.fps,
        "width": width,
        "height": height,
        "duration": video.duration,
        "video_backend": "pyav",
        "frames_indices": list(video.indices),
        "do_sample_frames": False,
    }


def check_expanded(ours: Sequence[int], theirs: Sequence[int] | None) -> None:
    """Raises PromptError unless vLLM made the same tokens of the media: the learner would train on others
    than were sampled from."""
    if theirs is None or list(theirs) == list(ours):
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    where = f"from token {at} on" if at is not None else "in length"
    raise PromptError(
        f"vLLM makes {len(theirs)} tokens of this prompt with its images or videos, the model's processor "
        f"{len(ours)} (they differ {where}): leave mm_processor_kwargs out of rollout.engine_options.extra, "
        "and give engine and policy the same model folder"
    )
