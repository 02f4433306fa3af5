"""Media of rows: found by path, name or archive; decoded the same every time; damage named."""

# ruff: noqa: E501
from __future__ import annotations

import base64
import io
import os
import tarfile
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hpc_rl.data import archives
from hpc_rl.data.chat import Conversation, conversation_of
from hpc_rl.data.errors import DataError
from hpc_rl.data.media import MediaFiles
from hpc_rl.data.video import read_video, sample, shrunk
from hpc_rl.recipe.schema import DatasetSpec

FPS = 10


def write_video(path: Path, frames: int = 30, codec: str = "mpeg4") -> Path:
    """Frame k is grey of brightness 8 k, shown at k / 10 seconds."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k in range(frames):
            picture = np.full((48, 64, 3), 8 * k, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def files(spec: dict[str, Any], base: Path | None = None, cache: Path | None = None) -> MediaFiles:
    return MediaFiles(DatasetSpec(path="rows.json", **spec), base, cache)


# --- images ----------------------------------------------------------------------------------------
def test_every_way_to_say_an_image_gives_the_same_picture(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    picture.save(tmp_path / "a.png")
    raw = (tmp_path / "a.png").read_bytes()
    url = "data:image/png;base64," + base64.b64encode(raw).decode()
    media = files({"media_path": str(tmp_path)})
    ways = ["a.png", str(tmp_path / "a.png"), f"file://{tmp_path}/a.png", raw, url, picture,
            {"bytes": raw, "path": "elsewhere.png"}, {"bytes": None, "path": "a.png"}]  # fmt: skip
    for way in ways:
        assert np.array_equal(np.asarray(media.image(way, "row 0")), np.asarray(picture))
    # Without media_path, beside the annotations.
    assert np.array_equal(np.asarray(files({}, tmp_path).image("a.png", "row 0")), np.asarray(picture))


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 0, 20, 20))
    exif = picture.getexif()
    exif[0x0112] = 6  # a quarter turn clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    got = files({}, tmp_path).image("a.png", "row 0")
    assert got.size == (20, 40)
    assert (got.getpixel((10, 5)), got.getpixel((10, 35))) == ((0, 0, 255), (255, 0, 0))


def test_pictures_are_made_to_fit_the_limits() -> None:
    assert shrunk(100, 50, None, 5000) == (100, 50)
    assert shrunk(200, 100, None, 5000) == (100, 50)
    assert shrunk(10, 5, 5000, None) == (100, 50)
    image = files({"max_pixels": 100}).image(Image.new("L", (20, 20)), "row 0")
    assert (image.size, image.mode) == ((10, 10), "RGB")


def test_missing_and_damaged_files_name_row_and_file(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:2000])
    media = files({"media_path": str(tmp_path)})
    for name in ("bad.png", "cut.png"):
        with pytest.raises(DataError, match=rf"rows.json: row 4: image {name} cannot be read"):
            media.image(name, "rows.json: row 4")
    with pytest.raises(DataError, match=r"row 4: .*none\.png does not exist"):
        media.image("none.png", "row 4")
    with pytest.raises(DataError, match="is on the web"):
        media.image("https://example.org/a.png", "row 4")
    with pytest.raises(DataError, match=r"a\.png is a relative path; set data\.media_path"):
        files({}).image("a.png", "row 4")
    with pytest.raises(DataError, match=r"must be a path, bytes or a picture, this is '3' \(int\)"):
        media.image(3, "row 4")
    with pytest.raises(DataError, match=r"row 4: an image must be .* this is an object with 'a'"):
        media.check(Conversation([], images=[{"a": 1}]), "row 4")
    with pytest.raises(DataError, match=r"row 4: a video must be a path, this is '3' \(int\)"):
        media.check(Conversation([], videos=[3]), "row 4")
    media.check(
        Conversation([], images=[{"bytes": b"not looked into here"}, "data:image/png;base64,"]), "row 4"
    )
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"row 4: video .*bad\.mp4 cannot be read"):
        media.video("bad.mp4", "row 4")


# --- video -----------------------------------------------------------------------------------------
def test_sampling_by_time() -> None:
    shown = [k / 10 for k in range(30)]
    assert sample(shown, 2.0, 32) == [0, 5, 10, 15, 20, 25]
    assert sample(shown, 2.0, 4) == [0, 9, 19, 29]
    assert sample(shown, 2.0, 1) == [0]
    assert sample(shown, 100.0, 64) == list(range(30))  # no frame twice
    assert sample([3.0], 2.0, 8) == [0]
    assert sample([0.0, 0.1, 2.0, 2.1], 1.0, 8) == [0, 1, 2]  # uneven: what is on the screen then


def test_the_frames_of_a_video_are_those_of_their_times(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4")
    video = read_video(path, 2.0, 32, None, "row 0")
    assert video.indices == [0, 5, 10, 15, 20, 25]
    assert np.allclose(video.seconds, [0, 0.5, 1, 1.5, 2, 2.5], atol=1e-3)
    assert (video.total, round(video.fps, 3)) == (30, 10.0)
    assert video.frames.shape == (6, 48, 64, 3)
    means = video.frames.mean(axis=(1, 2, 3))
    assert np.abs(means - 8 * np.asarray(video.indices)).max() < 4  # yuv and the codec cost a little
    again = read_video(path, 2.0, 32, None, "row 0")
    assert np.array_equal(video.frames, again.frames)
    small = read_video(path, 2.0, 2, 12 * 16, "row 0")
    assert small.frames.shape == (2, 12, 16, 3)


# --- clips by name, archives --------------------------------------------------------------------------
COSMOS = {"format": "cosmos_reason1"}


def media_root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "deep" / "er" / "a.mp4").write_bytes(b"a")
    for name in ("b.mp4", "c.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    with tarfile.open(root / "clips.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "b.mp4", "in/b.mp4")
    with zipfile.ZipFile(root / "more.zip", "w") as file:
        file.write(tmp_path / "c.mp4", "c.mp4")
    return root


def test_clips_are_found_by_name_under_the_root_and_in_its_archives(tmp_path: Path) -> None:
    root = media_root(tmp_path)
    media = files({**COSMOS, "media_path": str(root)})
    for name, content in (("a.mp4", b"a"), ("b.mp4", b"b.mp4"), ("c.mp4", b"c.mp4")):
        path = media.find(f"video_clips/somewhere/{name}", "row 0")
        assert path is not None
        assert path.read_bytes() == content
    with pytest.raises(DataError, match=r"row 3: no file called d\.mp4 under"):
        media.find("d.mp4", "row 3")
    # Unpacked once: a second run touches nothing.
    target = root / "clips.tar.gz.unpacked"
    before = target.stat().st_mtime_ns
    assert files({**COSMOS, "media_path": str(root)}).find("b.mp4", "") == target / "in" / "b.mp4"
    assert target.stat().st_mtime_ns == before
    # A new clip is seen although the listing is kept.
    (root / "deep" / "d.mp4").write_bytes(b"d")
    assert files({**COSMOS, "media_path": str(root)}).find("d.mp4", "") is not None


def test_before_the_queue_archives_are_left_alone(tmp_path: Path) -> None:
    root = media_root(tmp_path)
    media = files({**COSMOS, "media_path": str(root)})
    media.prepare(unpack=False)
    media.check(Conversation([], videos=["a.mp4", "b.mp4"]), "row 0")
    assert not (root / "clips.tar.gz.unpacked").exists()


def test_of_two_clips_with_one_name_the_longer_path_decides(tmp_path: Path) -> None:
    for part in ("x", "y"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.mp4").write_bytes(part.encode())
    media = files({**COSMOS, "media_path": str(tmp_path)})
    found = media.find("clips/y/a.mp4", "row 0")
    assert found is not None
    assert found.read_bytes() == b"y"
    with pytest.raises(DataError, match=r"row 0: a\.mp4 could be x/a\.mp4 or y/a\.mp4"):
        media.find("a.mp4", "row 0")


def test_a_folder_that_cannot_be_written_uses_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = media_root(tmp_path)
    real = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != root and real(p, mode))  # root ignores bits
    media = files({**COSMOS, "media_path": str(root)}, cache=tmp_path / "cache")
    found = media.find("b.mp4", "row 0")
    assert found is not None
    assert found.is_relative_to(tmp_path / "cache")
    assert not (root / "clips.tar.gz.unpacked").exists()


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_that_lead_outside_are_refused(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "root" / f"evil.{kind}"
    archive.parent.mkdir()
    if kind == "tar":
        with tarfile.open(archive, "w") as tar:
            tar.addfile(tarfile.TarInfo("../escaped"), io.BytesIO(b""))
    else:
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("../escaped", "x")
    with pytest.raises(DataError, match="cannot be unpacked"):
        archives.unpack(archive, tmp_path / "cache")
    assert not (tmp_path / "escaped").exists()
    assert [p.name for p in archive.parent.iterdir()] == [archive.name]  # nothing half-done stays


def test_a_cut_archive_is_refused_and_a_replaced_one_unpacked_anew(tmp_path: Path) -> None:
    root = media_root(tmp_path)
    whole = (root / "clips.tar.gz").read_bytes()
    (root / "clips.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"clips\.tar\.gz cannot be unpacked"):
        archives.unpack(root / "clips.tar.gz", tmp_path / "cache")
    (root / "clips.tar.gz").write_bytes(whole)
    target = archives.unpack(root / "clips.tar.gz", tmp_path / "cache")
    assert (target / "in" / "b.mp4").is_file()
    with tarfile.open(root / "clips.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "c.mp4", "new.mp4")
    target = archives.unpack(root / "clips.tar.gz", tmp_path / "cache")
    assert sorted(p.name for p in target.iterdir() if not p.name.startswith(".")) == ["new.mp4"]


def test_many_at_once_unpack_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = media_root(tmp_path)
    unpacked = []
    real = archives._unpack_into

    def slow(archive: Path, target: Path) -> None:
        unpacked.append(target)
        time.sleep(0.2)
        real(archive, target)

    monkeypatch.setattr(archives, "_unpack_into", slow)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(archives.unpack(root / "more.zip", tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(unpacked) == 1
    assert found == [root / "more.zip.unpacked"] * 4


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    root = media_root(tmp_path)
    lock = root / ".more.zip.unpacked.lock"
    lock.write_text("")
    with pytest.raises(DataError, match=r"was not unpacked within 1 s"):
        archives.unpack(root / "more.zip", tmp_path / "cache", limit_s=1)
    old = time.time() - 3600
    os.utime(lock, (old, old))
    assert archives.unpack(root / "more.zip", tmp_path / "cache", limit_s=5).is_dir()
    assert not lock.exists()


# --- rows ------------------------------------------------------------------------------------------
def llava(row: dict[str, Any], **spec: Any) -> Conversation:
    return conversation_of(row, DatasetSpec(path="a.json", format="llava", **spec), "a.json: row 2")


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[k % 2], "value": v} for k, v in enumerate(values)]


def test_llava_placeholders_become_parts() -> None:
    found = llava({"image": "a.png", "conversations": turns("<image>\nWhat?", "A cat", "Sure?", "Yes")})
    assert found.images == ["a.png"]
    assert found.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert [m["role"] for m in found.messages] == ["user", "assistant", "user", "assistant"]
    assert found.messages[2]["content"] == "Sure?"
    two = llava({"image": ["a", "b"], "conversations": turns("A <image> and <image>\n?", "x", "and", "y")})
    assert [p.get("text", p["type"]) for p in two.messages[0]["content"]] == [
        "A ",
        "image",
        " and ",
        "image",
        "?",
    ]
    front = llava({"video": "v.mp4", "conversations": turns("What?", "x")}, system="S")
    assert front.messages[1]["content"] == [{"type": "video"}, {"type": "text", "text": "What?"}]
    assert front.videos == ["v.mp4"]
    plain = llava({"image": None, "conversations": turns("no <image> here", "x")})
    assert plain.messages[0]["content"] == "no <image> here"
    assert not plain.has_media


BAD: list[Any] = [
    ({"image": ["a"], "conversations": turns("<image><image>", "x")}, "row 2: 2 image placeholders for 1 images"),
    ({"image": "a", "conversations": [{"from": "gpt", "value": "x"}]}, "row 2: no user message to put the image into"),
    ({"image": "a"}, "row 2 has no column 'conversations'"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "message 0 has role 'robot'"),
    ({"conversations": [{"from": "human"}]}, "message 0 must have `role` and `content`"),
    ({"conversations": ["x"]}, "message 0 must be a mapping, this is str"),
    ({"conversations": [{"role": "user", "content": [{"type": "audio"}]}]}, "part of type 'audio'"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_llava_rows_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        llava(row)


def test_placeholders_in_the_text_work_in_every_format() -> None:
    row = {"messages": turns("<image>\nWhat?", "A cat", "And <image>?", "A dog"), "images": ["a", "b"]}
    found = conversation_of(row, DatasetSpec(path="x", format="chat"))
    assert [m["content"] for m in found.messages[::2]] == [
        [{"type": "image"}, {"type": "text", "text": "What?"}],
        [{"type": "text", "text": "And "}, {"type": "image"}, {"type": "text", "text": "?"}],
    ]
    with pytest.raises(DataError, match="row 3: 2 image placeholders for 1 images"):
        conversation_of({**row, "images": ["a"]}, DatasetSpec(path="x", format="chat"), "row 3")
    clip = {"conversations": turns("<video>\nnext?", "left"), "video": "v.mp4"}
    found = conversation_of(clip, DatasetSpec(path="x", format="cosmos_reason1"))
    assert found.messages[0]["content"] == [{"type": "video"}, {"type": "text", "text": "next?"}]
    # Where parts say where the picture goes, the text is text.
    parts = [{"type": "image"}, {"type": "text", "text": "write the tag"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "<image>"}]}
    found = conversation_of({**row, "images": ["a"]}, DatasetSpec(path="x", format="chat"))
    assert found.messages[1]["content"] == "<image>"


def test_cosmos_reason1_rows_and_parts_of_a_chat() -> None:
    spec = DatasetSpec(path="x", format="cosmos_reason1")
    row = {"video": "video_clips/a.mp4", "conversations": [
        {"role": "user", "content": "What next?"}, {"role": "assistant", "content": "<think>…</think>Left"}]}  # fmt: skip
    found = conversation_of(row, spec)
    assert found.videos == ["video_clips/a.mp4"]
    assert found.messages[0]["content"][0] == {"type": "video"}
    chat = DatasetSpec(path="x", format="chat")
    parts = [{"type": "image_url", "image_url": {"url": "b.png"}}, {"type": "text", "text": "?"},
             {"type": "image", "image": "c.png", "video": None}]  # fmt: skip
    answer = {"role": "assistant", "content": "x", "tool_calls": None}
    found = conversation_of({"messages": [{"role": "user", "content": parts}, answer]}, chat)
    assert found.images == ["b.png", "c.png"]
    assert "tool_calls" not in found.messages[1]
    column = [{"type": "image"}, {"type": "text", "text": "?"}]
    found = conversation_of(
        {"messages": [{"role": "user", "content": column}, answer], "images": [{"bytes": b"x"}]}, chat
    )
    assert found.images == [{"bytes": b"x"}]


def test_chats_and_pictures_in_parquet_and_saved_data_sets(tmp_path: Path) -> None:
    """Arrow fills every struct with all fields, and `datasets` hands out pictures or bytes."""
    import datasets

    from hpc_rl.data.rows import load_rows

    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    picture = Image.fromarray(pixels)
    user = [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]
    messages = [
        {"role": "user", "content": user, "tool_calls": None},
        {"role": "assistant", "content": [{"type": "text", "text": "cat"}], "tool_calls": None},
    ]
    table = datasets.Dataset.from_dict({"messages": [messages] * 2, "images": [[picture]] * 2})
    table = table.cast_column("images", datasets.List(datasets.Image()))
    table.save_to_disk(str(tmp_path / "saved"))
    table.to_parquet(str(tmp_path / "rows.parquet"))
    for name in ("saved", "rows.parquet"):
        spec = DatasetSpec(path=name, format="chat")
        row = load_rows(spec, tmp_path)[1]
        found = conversation_of(row, spec)
        assert found.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "what?"}]
        assert found.messages[1] == {"role": "assistant", "content": "cat"}
        image = MediaFiles(spec, tmp_path).image(found.images[0], "row 1")
        assert np.array_equal(np.asarray(image), pixels)
