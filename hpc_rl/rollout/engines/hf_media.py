"""What a forward of the `hf` engine is given besides ids and cache: positions, and the prompt's media.

Media go in with the prefix, once for every row of the batch, and again when the cache is recomputed after
new weights. What comes after the prompt is text. Positions are given at every forward: a model that works
them out itself keeps what it needs for that on the module, where another forward would overwrite it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpc_rl.data.prompt_media import PromptMedia
from hpc_rl.models.hf.media import CROSS, PACKED, PER_TOKEN, PackedMedia, padded_media, rotary_positions
from hpc_rl.rollout.engine import PromptError


class Prefix:
    """A prompt of text alone."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def inputs(self, ids: Tensor, start: int) -> dict[str, Any]:
        """Inputs beside `ids` [rows, T], the tokens from `start` of their sequences."""
        return {"position_ids": torch.arange(start, start + ids.shape[1], device=ids.device).expand_as(ids)}


class MediaPrefix(Prefix):
    """A prompt with images or videos. Raises PromptError where the model takes none."""

    def __init__(self, model: Any, media: PromptMedia) -> None:
        super().__init__(model)
        if CROSS in media.tensors:
            raise PromptError(
                f"the hf engine does not generate from images with {type(model).__name__}, whose text "
                "reaches them by cross attention"
            )
        self._media = media.tensors
        self._rule = PACKED.get(model.config.model_type, PackedMedia())
        self._shift = 0  # of the rotary positions after the prompt, against the number of tokens

    def inputs(self, ids: Tensor, start: int) -> dict[str, Any]:
        if start > 0:
            found = super().inputs(ids, start + self._shift)
            # Three equal rows: two-dimensional positions would pass for text's own.
            place = found["position_ids"]
            return {"position_ids": place.expand(3, *place.shape) if self._rule.mrope else place}
        rows = [self._media] * len(ids)
        found = padded_media(rows, [ids.shape[1]] * len(ids), ids.device)
        found = {name: value.to(ids.device) for name, value in found.items()}
        if not self._rule.mrope:
            return super().inputs(ids, 0) | found
        types = next(found[name] for name in PER_TOKEN if name in found)
        media = {name: value.to(ids.device) for name, value in self._media.items()}
        place = rotary_positions(self.model, ids[0], types[0], media)  # text alone differs between the rows
        self._shift = int(place.max()) + 1 - ids.shape[1]
        return {"position_ids": place[:, None].expand(3, *ids.shape)} | found
