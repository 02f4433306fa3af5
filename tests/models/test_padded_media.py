"""What cannot share a padded forward is said, instead of being a little wrong."""

from __future__ import annotations

import pytest
import torch

from hpc_rl.models.base import Media, ModelError
from hpc_rl.models.hf.media import padded_media

pytestmark = pytest.mark.torch
CPU = torch.device("cpu")


def of_images(count: int, length: int) -> Media:
    return {
        "pixel_values": torch.ones(1, count, 4, 3, 8, 8),
        "aspect_ratio_ids": torch.ones(1, count, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, count, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, length, count, 4, dtype=torch.long),
    }


def test_different_numbers_of_images_are_refused() -> None:
    with pytest.raises(ModelError, match=r"1 and 2 images .* set policy\.micro_batch_size to 1"):
        padded_media([of_images(1, 5), of_images(2, 7)], [5, 7], CPU)


def test_text_beside_images_gets_none() -> None:
    inputs = padded_media([None, of_images(2, 7)], [9, 7], CPU)
    assert inputs["pixel_values"].shape == (2, 2, 4, 3, 8, 8)
    assert inputs["pixel_values"][0].abs().max() == 0
    assert inputs["cross_attention_mask"][0].max() == 0
    assert inputs["cross_attention_mask"].shape == (2, 9, 2, 4)
