"""Prompts with images and videos as token ids and tensors: the same for the replica and for the learner.

Pixels do not travel. A prompt names its row; the replica that generates reads the row's media, and so does
the policy rank that trains on the answers. Both make token ids of them here, so they can be compared.
"""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hpc_rl.data.chat import Message
from hpc_rl.data.errors import DataError
from hpc_rl.data.media import MediaFiles
from hpc_rl.data.multimodal import Multimodal
from hpc_rl.data.prompts import media_row
from hpc_rl.data.rows import Rows, find_path, load_rows
from hpc_rl.data.turns import Rendering
from hpc_rl.data.video import Video
from hpc_rl.recipe.schema import DatasetSpec


@dataclass(frozen=True)
class PromptMedia:
    """A prompt with media. `token_ids` have as many placeholders as a medium has tokens, `short_ids` what
    the chat template writes (one for each). `tensors` go by the names of the model's forward; `images` (PIL)
    and `videos` are what they were made of."""

    token_ids: list[int]
    short_ids: list[int]
    tensors: dict[str, Any]
    images: list[Any]
    videos: list[Video]

    def short(self, token_ids: list[int]) -> list[int]:
        """Ids that begin with the prompt (a later turn of it), with its media as one placeholder each."""
        count = len(self.token_ids)
        if token_ids[:count] != self.token_ids:
            raise DataError("ids with media do not begin with the prompt that the media are of")
        return self.short_ids + token_ids[count:]


class MediaPrompts:
    """The prompts with media of one data set, by row. `maker()` is for one thread alone."""

    def __init__(self, spec: DatasetSpec, base: Path, processor: Any, today: datetime) -> None:
        """Relative paths are tried under `base`; archives of media are unpacked. Raises DataError."""
        self.spec, self.rows, self._today = spec, load_rows(spec, base), today
        self._processor, self._lock = processor, threading.Lock()
        self.files = MediaFiles(spec, data_folder(spec, base))
        self.files.prepare()

    def maker(self) -> Maker:
        """A function from a row's index to its prompt. Raises DataError naming the row."""
        with self._lock:  # fast tokenizers must not be used by two threads, not even to be copied
            processor = copy.deepcopy(self._processor)
        media = Multimodal(processor, self.files, self._today)
        return Maker(self.rows, self.spec, media, processor.tokenizer)


class Maker:
    """See `MediaPrompts.maker`."""

    def __init__(self, rows: Rows, spec: DatasetSpec, media: Multimodal, tokenizer: Any) -> None:
        self._rows, self._spec, self._media, self._tokenizer = rows, spec, media, tokenizer

    def messages(self, row: int) -> list[Message] | None:
        """The messages of the row's prompt as a controller would send them."""
        found = media_row(self._rows[row], self._spec, self._rows.where(row))
        return None if found is None else found.conversation.messages

    def __call__(self, row: int) -> PromptMedia:
        where = self._rows.where(row)
        found = media_row(self._rows[row], self._spec, where)
        if found is None or not found.conversation.has_media:
            raise DataError(f"{where} has no images or videos")
        conversation = self._media.open(found.conversation, where)
        messages = self._media.template.prepared(conversation.messages)
        conversation.messages = messages
        text = self._media.template.render(messages, generate=True)
        _, _, tokens, tensors, _ = self._media.encode(Rendering(text, [], len(messages)), conversation, where)
        bos = self._tokenizer.bos_token
        special = bos is not None and not text.startswith(bos)
        short = self._tokenizer(text, add_special_tokens=special).input_ids
        return PromptMedia(tokens.ids, list(short), tensors or {}, conversation.images, conversation.videos)


def data_folder(spec: DatasetSpec, base: Path) -> Path | None:
    """The folder of a data file (None for a data set of the Hub): where relative paths of media begin."""
    path = find_path(spec.path, base)
    return path if path is None or path.is_dir() else path.parent
