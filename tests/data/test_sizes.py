"""The size of a row from the headers of its media is the size of the row as it is encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hpc_rl.data.encode import Encoder
from hpc_rl.data.errors import DataError
from hpc_rl.data.media import MediaFiles
from hpc_rl.data.multimodal import Multimodal
from hpc_rl.data.sizes import Measured, RowSizes
from hpc_rl.recipe.schema import DatasetSpec
from tests.data.test_media import write_video
from tests.tiny_vlms import picture, processor

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
FAMILIES = ["gemma3_vlm", "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def encoders(family: str, **spec: Any) -> list[Encoder]:
    options = DatasetSpec(**{"path": "a.json", "format": "llava", **spec})
    found = []
    for cls in (Multimodal, Measured):
        made = processor(family)
        if family.startswith("qwen"):  # of a frame, or of the whole clip
            made.video_processor.size = {"shortest_edge": 14 * 14, "longest_edge": 56 * 56}
        media = cls(made, MediaFiles(options, None))
        found.append(Encoder(made.tokenizer, options, 200, media))
    return found


def chat(question: str, answer: str = "cat", **media: Any) -> dict[str, Any]:
    return {
        **media,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_from_headers_are_those_of_encoded_rows(family: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1, 70, 28).save(tmp_path / "turned.jpg", exif=exif)
    picture(2, 84, 21).save(tmp_path / "wide.jpg")
    write_video(tmp_path / "v.mp4", 25)
    write_video(tmp_path / "short.mp4", 2)
    spec = {"media_path": str(tmp_path), "fps": 2.0, "max_frames": 4, "max_pixels": 1600}
    whole, measured = encoders(family, **spec)
    rows = [
        chat("<image><image>\nwhat?", image=["turned.jpg", "wide.jpg"]),
        chat("what?", "nothing, two words"),
        chat("<video>what?", video="v.mp4"),
        chat("what?", video="short.mp4"),
        chat("<image>", "an <image>, too", image=[picture(0), "wide.jpg"]),
        chat("<image>" + "long " * 60, image=[picture(0)]),  # dropped
    ]
    found = [(RowSizes.of(measured(row, "row")), RowSizes.of(whole(row, "row"))) for row in rows]
    assert all(left == right for left, right in found)
    assert len({right.sequences for _, right in found}) == 6
    assert found[-1][0].dropped == 1
    again = [RowSizes.of(measured(row, "row")) for row in rows]  # what the processor said is kept
    assert again == [right for _, right in found]


def test_pictures_are_not_decoded_for_their_sizes(tmp_path: Path) -> None:
    picture(1, 70, 56).save(tmp_path / "a.jpg")
    cut = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "b.jpg").write_bytes(b"nothing")
    whole, measured = encoders("qwen2_5_vl", media_path=str(tmp_path))
    picture(1, 70, 56).save(tmp_path / "c.jpg")
    row = chat("<image>?", image="a.jpg")
    assert RowSizes.of(measured(row, "r")) == RowSizes.of(whole(chat("<image>?", image="c.jpg"), "r"))
    with pytest.raises(DataError, match=r"row 3: image a\.jpg cannot be read"):
        whole(row, "row 3")
    with pytest.raises(DataError, match=r"row 4: image b\.jpg cannot be read"):
        measured(chat("<image>?", image="b.jpg"), "row 4")


def test_a_processor_that_does_not_report_is_refused() -> None:
    _, measured = encoders("mllama")
    with pytest.raises(DataError, match=r"row 1: .*MllamaProcessor.*policy\.batch_size"):
        measured(chat("<image>?", image=[picture(0)]), "row 1")
