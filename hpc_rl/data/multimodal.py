"""Conversations with images and videos through a Hugging Face processor: ids, media, and where text went.

A processor replaces each placeholder of the text by as many tokens as its picture has. It says where it
did so, and its tokenizer says which part of the expanded text each token stands for; spans to be learned
move along. Tokens of media are never learned.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np

from hpc_rl.data.chat import Conversation, Message
from hpc_rl.data.encode import IMAGE, VIDEO, Encoded
from hpc_rl.data.errors import DataError
from hpc_rl.data.media import MediaFiles
from hpc_rl.data.templates import ChatTemplate, Span
from hpc_rl.data.tokens import Control, Tokens, regions_of, tokenise
from hpc_rl.data.turns import Rendering
from hpc_rl.data.video import Video

_NOT_MEDIA = ("input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets")
BLANK_SIZE = 56


class Multimodal:
    """A `MediaEncoder` (data/encode.py) for one processor and one data set."""

    def __init__(self, processor: Any, files: MediaFiles, today: datetime | None = None) -> None:
        self._processor, self._files = processor, files
        self._tokenizer = processor.tokenizer
        if not self._tokenizer.is_fast:
            raise DataError(f"{type(processor).__name__} has no fast tokenizer: the loss mask needs offsets")
        template = ChatTemplate.of_tokenizer(self._tokenizer, processor=processor, today=today)
        if template is None:
            raise DataError("images and videos need a processor with a chat template")
        self.template: ChatTemplate = template
        self._control = Control(self._tokenizer)
        self._takes_videos = "video_processor" in processor.get_attributes()
        self._placeholders = frozenset(
            self._tokenizer.convert_tokens_to_ids(list(processor.all_special_multimodal_tokens))
        )

    def open(self, conversation: Conversation, where: str) -> Conversation:
        """The conversation with its media read. Videos become images where the processor takes none."""
        images = [self._image(source, where) for source in conversation.images]
        videos = [self._video(source, where) for source in conversation.videos]
        if self._takes_videos or not videos:
            return replace(conversation, images=images, videos=[_two_frames(video) for video in videos])
        return _as_images(replace(conversation, images=images, videos=videos), self._frame)

    def _image(self, source: Any, where: str) -> Any:
        return self._files.image(source, where)

    def _video(self, source: Any, where: str) -> Video:
        return self._files.video(source, where)

    def _frame(self, frame: Any) -> Any:
        """A frame of a video, as an image."""
        from PIL import Image

        return Image.fromarray(frame)

    def encode(
        self, rendering: Rendering, conversation: Conversation, where: str
    ) -> tuple[str, list[Span], Tokens, dict[str, Any] | None, list[int]]:
        """See `MediaEncoder`. Raises DataError where the processor refuses."""
        import torch

        text, bos = rendering.text, self._tokenizer.bos_token
        special = bos is not None and not text.startswith(bos)
        parts = [part["type"] for m in conversation.messages[: rendering.messages] for part in _parts(m)]
        images = conversation.images[: parts.count("image")]
        videos = conversation.videos[: parts.count("video")]
        if not images and not videos:
            tokens = tokenise(self._tokenizer, text, self._control, rendering.spans, special)
            self.refuse_placeholders(tokens.ids, where)
            return text, rendering.spans, tokens, None, []
        output = self._call(text, images, videos, special, where)
        text, spans, media_spans = _expanded(text, rendering.spans, output)
        ids = output["input_ids"][0].tolist()
        tokens = Tokens(ids, *regions_of(output["offset_mapping"][0].tolist(), len(text)))
        self._check(tokens, text, where)
        of_media = np.zeros(len(ids), bool)
        for start, end in media_spans:
            of_media |= (tokens.starts >= start) & (tokens.ends <= end)
        if media_spans:  # else the processor reports none, and its placeholders stand for themselves
            self.refuse_placeholders([token for token, m in zip(ids, of_media, strict=True) if not m], where)
        never = [t for t, token in enumerate(ids) if of_media[t] or token in self._placeholders]
        media = {name: torch.as_tensor(value) for name, value in output.items() if name not in _NOT_MEDIA}
        return text, spans, tokens, media, never

    def refuse_placeholders(self, ids: list[int], where: str) -> None:
        """See `MediaEncoder`."""
        found = next((token for token in ids if token in self._placeholders), None)
        if found is not None:
            token = self._tokenizer.convert_ids_to_tokens(found)
            raise DataError(
                f"{where}: its text holds {token}, the model's place for an image or video, without one: "
                "write it differently, or give the medium"
            )

    def blank(self, kind: int = IMAGE) -> Encoded:
        """A short sequence with one small blank image (or, for VIDEO, clip), of which nothing is learned.

        It stands in where a forward has no such medium: the collectives of a sharded vision tower pair up
        between ranks only if every rank runs it, and it runs once for images and once for videos.
        """
        from PIL import Image

        name = "image" if kind == IMAGE else "video"
        messages: list[Message] = [
            {"role": "user", "content": [{"type": name}, {"type": "text", "text": "."}]},
            {"role": "assistant", "content": "."},
        ]
        messages = self.template.prepared(messages)
        rendering = Rendering(self.template.render(messages), [], len(messages))
        conversation = Conversation(messages)
        if kind == IMAGE:
            conversation.images = [Image.new("RGB", (BLANK_SIZE, BLANK_SIZE), (255, 255, 255))]
        else:
            frames = np.full((2, BLANK_SIZE, BLANK_SIZE, 3), 255, np.uint8)
            conversation.videos = [Video(frames, [0.0, 1.0], [0, 1], 2, 1.0)]
        _, _, tokens, media, _ = self.encode(rendering, conversation, f"the blank {name}")
        return Encoded(tokens.ids, [0] * len(tokens.ids), media)

    def _call(self, text: str, images: list[Any], videos: list[Video], special: bool, where: str) -> Any:
        options: dict[str, Any] = {"add_special_tokens": special, "return_tensors": "pt"}
        options |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        if images:
            options["images"] = [images]
        if videos:
            options |= {"videos": [video.frames for video in videos], "do_sample_frames": False}
            options["video_metadata"] = [_metadata(video) for video in videos]
        try:
            return self._processor(text=[text], **options)
        except (ValueError, TypeError, IndexError, KeyError, StopIteration) as error:
            name = type(self._processor).__name__
            found = [f"{len(some)} {what}" for some, what in ((images, "images"), (videos, "videos")) if some]
            raise DataError(f"{where}: {name} refuses its {' and '.join(found)}: {error}") from error

    def _check(self, tokens: Tokens, text: str, where: str) -> None:
        """Control tokens stand where the expanded text has them; else no mask could be trusted."""
        for t in self._control.places(tokens.ids).tolist():
            start, end = int(tokens.starts[t]), int(tokens.ends[t])
            if start < end and text[start:end] != self._tokenizer.convert_ids_to_tokens(tokens.ids[t]):
                name = type(self._processor).__name__
                raise DataError(f"{where}: {name} does not say how it expands images into tokens")


def kinds_of(media: dict[str, Any] | None) -> int:
    """Which kinds of media a sequence has, by the names of its tensors."""
    clips = [name for name in media or {} if "video" in name]
    images = [name for name in media or {} if "video" not in name and ("pixel" in name or "image" in name)]
    return IMAGE * bool(images) + VIDEO * bool(clips)


def _parts(message: Message) -> list[dict[str, Any]]:
    return message["content"] if isinstance(message["content"], list) else []


def _two_frames(video: Video) -> Video:
    """A clip too short for a second frame has its only one twice: processors pair frames (Qwen3-VL's
    refuses less than a pair, others repeat the last one themselves)."""
    if len(video.frames) > 1:
        return video
    return replace(
        video, frames=np.repeat(video.frames, 2, 0), seconds=video.seconds * 2, indices=video.indices * 2
    )


def _as_images(conversation: Conversation, image_of: Callable[[Any], Any]) -> Conversation:
    """Each video as its frames."""
    images, videos = iter(conversation.images), iter(conversation.videos)
    found: list[Any] = []
    messages = []
    for message in conversation.messages:
        parts: list[dict[str, Any]] = []
        for part in _parts(message):
            if part["type"] == "image":
                found.append(next(images))
            if part["type"] == "video":
                frames = next(videos).frames
                found += [image_of(frame) for frame in frames]
                parts += [{"type": "image"} for _ in frames]
            else:
                parts.append(part)
        messages.append({**message, "content": parts} if parts else message)
    return replace(conversation, messages=messages, images=found, videos=[])


def _metadata(video: Video) -> Any:
    from transformers.video_utils import VideoMetadata

    height, width = video.frames.shape[1:3]
    return VideoMetadata(
        total_num_frames=video.total,
        fps=video.fps,
        width=width,
        height=height,
        duration=video.duration,
        video_backend="pyav",
        frames_indices=list(video.indices),
    )


def _expanded(text: str, spans: list[Span], output: Any) -> tuple[str, list[Span], list[Span]]:
    """`(the text as the processor's tokenizer saw it, the spans in it, the spans of media)`."""
    places = (output.get("text_replacement_offsets") or [[]])[0]
    pieces, reached, media = [], 0, []
    ends, gained = [0], [0]
    for place in places:
        start, end = place["span"]
        pieces += [text[reached:start], place["replacement"]]
        reached = end
        media.append(tuple(place["new_span"]))
        ends.append(end)
        gained.append(place["new_span"][1] - end)
    whole = "".join([*pieces, text[reached:]])

    def moved(place: int) -> int:
        return place + gained[bisect_right(ends, place) - 1]

    return whole, [(moved(start), moved(end)) for start, end in spans], media
