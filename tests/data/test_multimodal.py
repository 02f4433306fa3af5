"""Real processors of six families: the mask lies on the answers however pictures expand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from hpc_rl.data.encode import IMAGE, EncodedRow, Encoder
from hpc_rl.data.encode import VIDEO as VIDEO_KIND
from hpc_rl.data.errors import DataError
from hpc_rl.data.media import MediaFiles
from hpc_rl.data.multimodal import Multimodal, kinds_of
from hpc_rl.recipe.schema import DatasetSpec
from tests.data.test_media import write_video
from tests.tiny_vlms import PLACE, picture, processor

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
FAMILIES = list(PLACE)
VIDEO = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def make(family: str, template: str | None = None, **spec: Any) -> tuple[Any, Encoder, Multimodal]:
    made = processor(family)
    made.chat_template = template or made.chat_template
    options = DatasetSpec(**{"path": "a.json", "format": "llava", **spec})
    media = Multimodal(made, MediaFiles(options, None))
    return made, Encoder(made.tokenizer, options, spec.pop("max_length", None), media), media


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[k % 2], "value": v} for k, v in enumerate(values)]


def learned(made: Any, row: EncodedRow) -> list[str]:
    (one,) = row.sequences
    text = made.tokenizer.convert_ids_to_tokens(
        [t if m else made.tokenizer.bos_token_id for t, m in zip(one.token_ids, one.loss_mask, strict=True)]
    )
    return [run for run in "".join(text).split("<bos>") if run]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_learned_and_pictures_are_not(family: str) -> None:
    made, encode, _ = make(family)
    row = encode({
        "image": [picture(0), picture(1, 56, 28)],
        "conversations": turns("<image>\nwhat?", "cat", "and <image> this?", "two dogs"),
    })  # fmt: skip
    assert learned(made, row) == ["cat<eos>", "two dogs<eos>"]
    (one,) = row.sequences
    assert one.token_ids.count(made.tokenizer.bos_token_id) == 1
    assert one.media is not None
    assert not {"input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets"} & set(one.media)
    # The processor alone, as a user would call it, gives the same ids and pixels.
    text = made.apply_chat_template([
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "cat"},
        {"role": "user", "content": [
            {"type": "text", "text": "and "}, {"type": "image"}, {"type": "text", "text": " this?"}]},
        {"role": "assistant", "content": "two dogs"},
    ])  # fmt: skip
    plain = made(text=[text], images=[[picture(0), picture(1, 56, 28)]], add_special_tokens=False,
                 return_tensors="pt")  # fmt: skip
    assert one.token_ids == plain["input_ids"][0].tolist()
    for name, value in one.media.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(plain[name]))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_pictures_and_the_blank(family: str) -> None:
    made, encode, media = make(family)
    row = encode({"conversations": turns("what?", "cat")})
    assert learned(made, row) == ["cat<eos>"]
    assert row.sequences[0].media is None
    blank = media.blank()
    assert blank.media is not None
    assert "pixel_values" in blank.media
    assert not any(blank.loss_mask)
    assert len(blank.loss_mask) == len(blank.token_ids)
    assert kinds_of(blank.media) == IMAGE
    if family in VIDEO:
        clip = media.blank(VIDEO_KIND)
        assert kinds_of(clip.media) == VIDEO_KIND
        assert not any(clip.loss_mask)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_picture_in_an_answer_is_not_learned(family: str) -> None:
    made, encode, _ = make(family)
    row = encode({"image": [picture(0)], "conversations": turns("draw", "a<image>b")})
    text = "".join(learned(made, row))
    assert "<image>" not in text
    assert text.replace("<vision>", "").replace("</vision>", "") == "ab<eos>"


def test_a_second_bos_does_not_shift_the_mask_of_a_picture() -> None:
    made, encode, _ = make("llava", "{{ bos_token }}" + processor("llava").chat_template)
    row = encode({"image": [picture(0)], "conversations": turns("draw", "a<image>b")})
    assert row.sequences[0].token_ids.count(made.tokenizer.bos_token_id) == 1
    assert "".join(learned(made, row)) == "ab<eos>"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_placeholder_that_is_text_is_refused_with_its_row(family: str) -> None:
    """The model would look for a picture there, and fail beside a row that has one."""
    made, encode, media = make(family, format="chat")
    token = made.image_token
    with pytest.raises(DataError, match=f"row 1: its text holds {token}"):
        encode({"messages": turns("what tag?", f"it is {token}")}, "row 1")
    part = {"type": "text", "text": f"what is {token}?"}
    row = {"messages": [
        {"role": "user", "content": [{"type": "image"}, part]}, {"role": "assistant", "content": "cat"},
    ], "images": [picture(0)]}  # fmt: skip
    with pytest.raises(DataError, match="row 2: "):
        encode(row, "row 2")
    spec = DatasetSpec(path="a.json", format="text")
    with pytest.raises(DataError, match=f"row 3: its text holds {token}"):
        Encoder(made.tokenizer, spec, None, media)({"text": f"a {token}"}, "row 3")


def test_a_template_without_bos_gets_it_once() -> None:
    bare = processor("llava").chat_template.removeprefix("{{ bos_token }}")
    made, encode, _ = make("llava", bare)
    bos = ("<bos>", made.tokenizer.bos_token_id)
    made.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[bos]
    )
    for image in ({"image": [picture(0)]}, {}):
        row = encode({**image, "conversations": turns("<image>?" if image else "?", "cat")})
        assert row.sequences[0].token_ids.count(bos[1]) == 1
        assert learned(made, row) == ["cat<eos>"]


def test_long_rows_with_pictures_are_dropped_not_cut() -> None:
    made, _, media = make("llava")
    row = {"image": [picture(0)], "conversations": turns("<image>?", "cat")}
    for how in ("truncate", "drop"):
        spec = DatasetSpec(path="a.json", format="llava", overlong=how)
        got = Encoder(made.tokenizer, spec, 12, media)(row)
        assert (got.sequences, got.dropped, got.truncated) == ([], 1, 0)
    spec = DatasetSpec(path="a.json", format="llava", overlong="error")
    with pytest.raises(DataError, match=r"row 5 has 24 tokens"):
        Encoder(made.tokenizer, spec, 12, media)(row, "row 5")
    text = Encoder(made.tokenizer, DatasetSpec(path="a.json", format="llava"), 6, media)
    assert text({"conversations": turns("?", "cat and dog")}).truncated == 1


@pytest.mark.parametrize("family", VIDEO)
def test_videos_keep_their_times(family: str, tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4")
    made, encode, _ = make(family, media_path=str(tmp_path), fps=2.0, max_frames=4)
    row = encode({"video": "v.mp4", "conversations": turns("<video>\nwhat?", "cat")})
    assert learned(made, row) == ["cat<eos>"]
    media = row.sequences[0].media
    assert media is not None
    assert media["video_grid_thw"][0, 0] == 2  # four frames, two by two
    if family == "qwen2_5_vl":  # 4 frames over 2.9 s
        seconds = float(torch.as_tensor(media["second_per_grid_ts"])[0])
        assert abs(seconds - 2 * 3.0 / 4) < 0.1
    if family == "qwen3_vl":
        text = "".join(made.tokenizer.convert_ids_to_tokens(row.sequences[0].token_ids))
        assert "<0.4 seconds>" in text or "<0.5 seconds>" in text
    again = encode({"video": "v.mp4", "conversations": turns("<video>\nwhat?", "cat")}).sequences[0]
    assert again.token_ids == row.sequences[0].token_ids


@pytest.mark.parametrize("family", ["gemma3_vlm", "llava"])
def test_without_a_video_processor_a_video_is_its_frames(family: str, tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4")
    made, encode, _ = make(family, media_path=str(tmp_path), fps=1.0)
    row = encode({"video": "v.mp4", "conversations": turns("<video>\nwhat?", "cat")})
    assert learned(made, row) == ["cat<eos>"]
    media = row.sequences[0].media
    assert media is not None
    assert media["pixel_values"].shape[0] == 3  # at 0, 1 and 2 s
    assert float((media["pixel_values"][0] - media["pixel_values"][2]).abs().max()) > 0.1


def test_pictures_for_a_model_without_processor_are_an_error() -> None:
    made = processor("llava")
    made.tokenizer.chat_template = made.chat_template
    encode = Encoder(made.tokenizer, DatasetSpec(path="a.json", format="llava"))
    with pytest.raises(DataError, match="row 1 has images or videos, and the model has no processor"):
        encode({"image": [picture(0)], "conversations": turns("<image>?", "cat")}, "row 1")


def test_what_the_processor_refuses_names_the_row() -> None:
    made, encode, _ = make("mllama")
    made.chat_template = made.chat_template.replace("<image>", "")
    made, encode, _ = make("mllama", made.chat_template)
    with pytest.raises(DataError, match="row 1: MllamaProcessor refuses its 1 images"):
        encode({"image": [picture(0)], "conversations": turns("<image>?", "cat")}, "row 1")
