"""Frames of a video file through PyAV, sampled by time. No torch.

The sampling is a function of the file and the recipe alone: the frame shown at k / fps seconds for
k = 0, 1, ...; where that makes more than `max_frames`, as many at equal distances over the whole video.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc_rl.data.errors import DataError


@dataclass(frozen=True)
class Video:
    """`frames` [T, height, width, 3] (uint8) shown at `seconds`; they are frames `indices` of `total`."""

    frames: npt.NDArray[np.uint8]
    seconds: list[float]
    indices: list[int]
    total: int
    fps: float

    @property
    def duration(self) -> float:
        return self.total / self.fps


def read_video(
    path: Path, fps: float, max_frames: int, max_pixels: int | None, where: str, *, blank: bool = False
) -> Video:
    """Sampled frames of the first video stream, made no larger than `max_pixels`. Raises DataError.

    With `blank` they are black and take no memory: number, size and times alone, without decoding.
    """
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{where}: {path} has no video stream")
            width, height = container.streams.video[0].width, container.streams.video[0].height
            shown = _timestamps(container)
        if not shown:
            raise DataError(f"{where}: {path} has no frame")
        wanted = sample(shown, fps, max_frames)
        if blank:
            width, height = shrunk(width, height, None, max_pixels)
            frames = np.broadcast_to(np.uint8(0), (len(wanted), height, width, 3))
        else:
            with av.open(str(path)) as container:
                decoded = _decode(container, wanted, max_pixels)
            if len(decoded) < len(wanted):
                raise DataError(
                    f"{where}: video {path} is cut short: {len(decoded)} of {len(wanted)} frames decode"
                )
            frames = np.stack(decoded)
    except (FFmpegError, OSError) as error:
        raise DataError(f"{where}: video {path} cannot be read: {error}") from error
    length = max(shown[-1] - shown[0], 1e-9)
    native = (len(shown) - 1) / length if len(shown) > 1 else fps
    seconds = [shown[i] - shown[0] for i in wanted]
    return Video(frames, seconds, wanted, len(shown), native)


def sample(shown: list[float], fps: float, max_frames: int) -> list[int]:
    """Indices of the frames to take, given the times at which all are shown (ascending, in seconds)."""
    length = shown[-1] - shown[0]
    count = int(length * fps + 1e-6) + 1
    times = [k / fps for k in range(count)]
    if count > max_frames:
        times = [length * k / max(1, max_frames - 1) for k in range(max_frames)]
    places = np.searchsorted(np.asarray(shown) - shown[0], np.asarray(times) + 1e-6, side="right") - 1
    return sorted(set(np.maximum(places, 0).tolist()))


def _timestamps(container: Any) -> list[float]:
    """When each frame is shown, from the packets alone (nothing is decoded)."""
    stream = container.streams.video[0]
    found = [
        float(packet.pts * packet.time_base) for packet in container.demux(stream) if packet.pts is not None
    ]
    return sorted(found)


def _decode(container: Any, wanted: list[int], max_pixels: int | None) -> list[npt.NDArray[np.uint8]]:
    stream = container.streams.video[0]
    stream.thread_type = "NONE"  # the rows' threads are the parallelism
    frames, left = [], iter(wanted)
    following = next(left, None)
    for number, frame in enumerate(container.decode(stream)):
        if following is None:
            break
        if number == following:
            width, height = shrunk(frame.width, frame.height, None, max_pixels)
            frames.append(frame.to_ndarray(format="rgb24", width=width, height=height))
            following = next(left, None)
    return frames


def shrunk(width: int, height: int, min_pixels: int | None, max_pixels: int | None) -> tuple[int, int]:
    """The size with the same shape and an area within the limits."""
    area = width * height
    scale = 1.0
    if max_pixels is not None and area > max_pixels:
        scale = (max_pixels / area) ** 0.5
        return max(1, int(width * scale)), max(1, int(height * scale))
    if min_pixels is not None and area < min_pixels:
        scale = (min_pixels / area) ** 0.5
        return -int(-width * scale // 1), -int(-height * scale // 1)
    return width, height
