"""How many tokens a row becomes, without decoding its media.

Rows go the whole way of `encode.py`, but pictures and clips are stand-ins of the same size: their sizes are
in the files' headers, and the text that a processor puts in for one depends on its size alone. A processor
is asked once per size, with a black picture; the run compares with the encoded row in the end.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hpc_rl.data.encode import EncodedRow
from hpc_rl.data.errors import DataError
from hpc_rl.data.multimodal import Multimodal
from hpc_rl.data.video import Video

Size = tuple[int, int, int]
_KEPT = 1024  # expansions: some kB each


@dataclass(frozen=True)
class RowSizes:
    """`sequences`: tokens, trained tokens and kinds of media of each. The rest counts as in `EncodedRow`.

    `error` is what the row is refused for; whoever comes to the row raises it.
    """

    sequences: tuple[Size, ...] = ()
    repaired: int = 0
    truncated: int = 0
    dropped: int = 0
    error: str = ""

    @classmethod
    def of(cls, row: EncodedRow) -> RowSizes:
        sizes = tuple(
            (len(one.token_ids), sum(one.loss_mask), row.kinds if one.media is not None else 0)
            for one in row.sequences
        )
        return cls(sizes, row.repaired, row.truncated, row.dropped)


@dataclass(frozen=True)
class _Sized:
    """A picture of which only the size is known."""

    width: int
    height: int


class Measured(Multimodal):
    """`Multimodal` that reads no more of media than their sizes: tokens and masks without pixels."""

    _expansions: OrderedDict[Any, str] | None = None

    def _image(self, source: Any, where: str) -> Any:
        return _Sized(*self._files.image_size(source, where))

    def _video(self, source: Any, where: str) -> Video:
        return self._files.video(source, where, blank=True)

    def _frame(self, frame: Any) -> Any:
        return _Sized(frame.shape[1], frame.shape[0])

    def _call(self, text: str, images: list[Any], videos: list[Video], special: bool, where: str) -> Any:
        """What the processor would give, without media."""
        parts = [self._expansion(image, where) for image in images]
        clips = [self._expansion(video, where) for video in videos]
        (text,), places = self._processor.get_text_with_replacements([text], parts, clips)
        found = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        return {
            "input_ids": np.asarray([found["input_ids"]]),
            "offset_mapping": np.asarray([found["offset_mapping"]]),
            "text_replacement_offsets": places,
        }

    def _expansion(self, medium: _Sized | Video, where: str) -> str:
        """The text that the processor puts in for one medium of this size."""
        from PIL import Image

        known = self._expansions = self._expansions if self._expansions is not None else OrderedDict()
        if isinstance(medium, _Sized):
            key: Any = medium
        else:
            key = (medium.frames.shape, tuple(medium.indices), medium.fps, medium.total)
        if key in known:
            known.move_to_end(key)
            return known[key]
        if isinstance(medium, _Sized):
            token, images = self._processor.image_token, [Image.new("RGB", (medium.width, medium.height))]
            output = super()._call(token, images, [], False, where)
        else:
            token = self._processor.video_token
            frames = np.zeros(medium.frames.shape, np.uint8)  # torch takes no stand-in without memory
            output = super()._call(token, [], [replace(medium, frames=frames)], False, where)
        places = (output.get("text_replacement_offsets") or [[]])[0]
        if len(places) != 1:
            raise DataError(
                f"{where}: {type(self._processor).__name__} does not say how it expands media into tokens, "
                "and policy.batch_tokens packs by their number: use policy.batch_size"
            )
        known[key] = str(places[0]["replacement"])
        if len(known) > _KEPT:
            known.popitem(last=False)
        return known[key]
