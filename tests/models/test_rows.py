"""The two ways of a row, packed and padded, where the contract takes only one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as T

from hpc_rl.models.hf import rows
from tests.families import FAMILIES, IMAGE, SIZES
from tests.models import contract as c

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
VISION = [name for name, family in FAMILIES.items() if family.vision and family.packed]


def largest_difference(model: c.HfModel, way: rows.Rows, plain: T.PreTrainedModel, row: c.Row) -> float:
    ids, positions, keep, _, media = c.tensors(row)
    with torch.no_grad():
        ours = way(model.module, ids, positions, keep, media)
        everything = torch.cat([c.alone(plain, sequence) for sequence in row])
    return float((ours - everything[keep]).abs().max())


@pytest.mark.parametrize("family", [*VISION, "gemma2", "gpt_oss"])
def test_padded_rows_are_right_where_packed_ones_are_taken(family: str, tmp_path: Path) -> None:
    """Windows, images in both directions, three-dimensional positions: by Transformers' own masks."""
    folder = c.save(tmp_path, family)
    model = c.build_model(folder, attn_implementation="eager")
    plain = c.reference(folder)
    for row in c.rows_of(family):
        assert largest_difference(model, rows.padded, plain, row) <= c.TOLERANCE


@pytest.mark.parametrize("family", VISION)
def test_images_with_the_attention_of_transformers(family: str, tmp_path: Path) -> None:
    """Gemma 3 cannot be packed with it; the others find their boundaries by the text positions."""
    folder = c.save(tmp_path, family)
    model, plain = c.build_model(folder, attn_implementation="sdpa"), c.reference(folder)
    assert (model.rows is rows.padded) == (family == "gemma3_vlm")
    for row in c.rows_of(family):
        assert largest_difference(model, model.rows, plain, row) <= c.TOLERANCE


def test_a_family_with_images_that_nobody_knows_is_padded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = T.InternVLConfig(
        text_config=T.Qwen2Config(**SIZES),
        vision_config=T.InternVLVisionConfig(**vision, image_size=[28, 28], patch_size=[7, 7]),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    torch.manual_seed(0)
    T.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    model, plain = c.build_model(tmp_path), c.reference(tmp_path)
    assert model.rows is rows.padded
    assert "how images of internvl go into a packed row is not known" in caplog.text
    row = [
        c.Sequence([5, 9, *[IMAGE] * 4, 10, 11, 12], {"pixel_values": torch.randn(1, 3, 28, 28)}),
        c.Sequence(list(range(20, 45))),
        c.Sequence([*[IMAGE] * 8, 13, 14], {"pixel_values": torch.randn(2, 3, 28, 28)}, trained_from=9),
    ]
    assert largest_difference(model, model.rows, plain, row) <= c.TOLERANCE
