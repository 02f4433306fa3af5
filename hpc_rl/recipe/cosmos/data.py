"""Data and validation: the dataset section, the published scripts, and what they read from `[custom]`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hpc_rl.recipe.cosmos.draft import Draft

_PLACE = "train.train_policy"
_CLIPS = "~/.cache/cosmos/datasets/{name}/{subset}/video_clips"  # cosmos-rl's $COSMOS_CACHE


@dataclass(frozen=True)
class Script:
    """What a launch script of cosmos-rl's does to the rows, as keys of `data.train`."""

    format: str
    keys: dict[str, Any] = field(default_factory=dict)
    note: str = ""


SCRIPTS: dict[str, Script] = {
    "dummy_sft.py": Script(
        "chat",
        {"repair": ["merge_roles", "move_system"]},
        "dummy_sft.py glued the turns to plain text and learned all of it; here the chat template is used, "
        "roles that it refuses are repaired, and the assistant's tokens are learned",
    ),
    "hf_vlm_sft.py": Script("chat", {}, "rows hold messages and images, as hf_vlm_sft.py hands them on"),
    "cosmos_sft.py": Script("cosmos_reason1", {"fps": 1.0, "max_pixels": 81920}),
    "llava_sft.py": Script("llava"),
    "hf_sft.py": Script("chat"),
}


def find_script(draft: Draft, name: str | None) -> Script:
    """The script by its name, else by what the file says."""
    if name is not None:
        base = name.replace("\\", "/").rsplit("/", 1)[-1]
        known = SCRIPTS.get(base) or SCRIPTS.get(f"{base}.py")
        if known is not None:
            draft.notes += [known.note] if known.note else []
            return known
        draft.notes.append(
            f"the script {base} is not one of cosmos-rl's own ({', '.join(SCRIPTS)}): what it does to the "
            "rows is not in this recipe; say it in data.train, or write a plugin"
        )
    if draft.written("custom.dataset.annotation_path"):
        return SCRIPTS["llava_sft.py"]
    if "cosmos-reason1-sft-dataset" in str(draft.get(f"{_PLACE}.dataset.name")).lower():
        return SCRIPTS["cosmos_sft.py"]
    if draft.written("custom.dataset.path"):
        return SCRIPTS["hf_sft.py"]
    return Script("chat")


def translate_data(draft: Draft, script_name: str | None, given: bool) -> None:
    """`given`: the command line names the data, so that the file need not."""
    script = find_script(draft, script_name)
    draft.put("data.train.format", script.format)
    for key, value in script.keys.items():
        draft.put(f"data.train.{key}", value)
    if script.format == "llava":
        _llava(draft)
    elif draft.written("custom.dataset.path"):
        draft.put("data.train.path", draft.get("custom.dataset.path"), "custom.dataset.path")
    else:
        dataset(draft, f"{_PLACE}.dataset", "data.train")
    if "path" not in draft.recipe["data"]["train"] and not given and not draft.problems:
        message = (
            "is empty, so a script of your own made the rows; name them on the command line: "
            "data.train.path=FILE data.train.format=chat"
        )
        draft.bad(
            "custom.dataset.annotation_path" if script.format == "llava" else f"{_PLACE}.dataset.name",
            message,
        )
    if script.format == "cosmos_reason1":
        _clips(draft)
    _columns(draft, script.format)
    _vision(draft)
    shuffle = f"{_PLACE}.dataloader_shuffle"
    draft.put("data.train.shuffle", draft.get(shuffle), shuffle)


def dataset(draft: Draft, place: str, to: str) -> None:
    """Where the rows of section `place` are, as the recipe section `to`."""
    local = draft.get(f"{place}.local_dir")
    if local:
        draft.put(f"{to}.path", local, f"{place}.local_dir", note="read from this folder, not from the Hub")
        draft.drop(f"{place}.name", "local_dir has the rows")
    elif name := draft.get(f"{place}.name"):
        draft.put(f"{to}.path", name, f"{place}.name")
    for name in ("subset", "revision"):
        if value := draft.get(f"{place}.{name}"):
            draft.put(f"{to}.{name}", value, f"{place}.{name}")
        else:
            draft.same(f"{place}.{name}", "empty")
    split = draft.get(f"{place}.split")
    splits = [part for part in (split if isinstance(split, list) else [split]) if part]
    if splits:
        note = (
            "the splits one after the other, as Hugging Face's datasets write it" if len(splits) > 1 else ""
        )
        draft.put(f"{to}.split", "+".join(splits), f"{place}.split", note=note)
    else:
        draft.same(f"{place}.split", "empty: train")


def _llava(draft: Draft) -> None:
    if path := draft.get("custom.dataset.annotation_path"):
        draft.put("data.train.path", path, "custom.dataset.annotation_path")
    if media := draft.get("custom.dataset.media_path"):
        draft.put("data.train.media_path", media, "custom.dataset.media_path")
    else:
        draft.same("custom.dataset.media_path", "empty: the rows hold whole paths")
    why = "llava_sft.py reads the rows of custom.dataset.annotation_path"
    for name in ("name", "subset", "revision", "split", "local_dir"):
        draft.drop(f"{_PLACE}.dataset.{name}", why)


def _clips(draft: Draft) -> None:
    """cosmos_sft.py looks its clips up where cosmos-rl unpacked them."""
    name = "/".join(str(draft.recipe["data"]["train"].get("path", "")).strip("/").split("/")[-2:])
    folder = _CLIPS.format(name=name, subset=draft.get(f"{_PLACE}.dataset.subset") or "").replace("//", "/")
    draft.put("data.train.media_path", folder)
    draft.notes.append(
        f"data.train.media_path: {folder} is where cosmos-rl unpacked the clips; name another folder if "
        "COSMOS_CACHE was set, or it is another machine"
    )


def _columns(draft: Draft, form: str) -> None:
    key = f"{_PLACE}.conversation_column_name"
    if form == "chat":
        draft.put("data.train.messages", draft.get(key), key)
    else:
        draft.drop(key, f"the column belongs to the format ({form})")
    custom, own = "custom.dataset.system_prompt", f"{_PLACE}.system_prompt"
    if draft.get(custom):
        draft.put("data.train.system", draft.get(custom), custom)
        draft.drop(own, f"{custom} is the one that llava_sft.py used")
    elif draft.get(own):
        draft.put("data.train.system", draft.get(own), own)
    for key in (custom, own):
        if not draft.get(key):
            draft.same(key, "empty")


def _vision(draft: Draft) -> None:
    place = "custom.vision"
    written = any(draft.written(f"{place}.{name}") for name in ("fps", "nframes", "max_frames", "max_pixels"))
    if not written and draft.written("custom.dataset.annotation_path"):
        draft.put("data.train.fps", 1.0)
        draft.notes.append("data.train.fps: 1, llava_sft.py's when [custom.vision] is not there")
    for name in ("fps", "max_frames", "min_pixels", "max_pixels"):
        if (value := draft.get(f"{place}.{name}")) is not None:
            draft.put(f"data.train.{name}", value, f"{place}.{name}")
    if (frames := draft.get(f"{place}.nframes")) is not None:
        note = "a bound here, a number there: frames come at data.train.fps until there are so many"
        draft.put("data.train.max_frames", frames, f"{place}.nframes", note=note)


def translate_validation(draft: Draft) -> None:
    size_key = f"{_PLACE}.dataset.test_size"
    if not draft.get("validation.enable"):
        why = "validation is off in this file (validation.enable), so nothing was held out"
        for name in ("val_before_train", "freq"):
            draft.drop(f"validation.{name}", why)
        for name in ("name", "subset", "revision", "split", "local_dir"):
            draft.drop(f"validation.dataset.{name}", why)
        draft.drop(size_key, why)
        return draft.same("validation.enable")
    draft.put("eval.every", draft.get("validation.freq"), "validation.freq")
    draft.put("eval.before", draft.get("validation.val_before_train"), "validation.val_before_train")
    if draft.get("validation.dataset.name") or draft.get("validation.dataset.local_dir"):
        return _own_validation(draft, size_key)
    size = draft.get(size_key)
    if size is None:
        draft.put(
            "data.holdout",
            0.1,
            size_key,
            "validation.enable",
            note="a tenth is held out when nothing says more",
        )
    elif isinstance(size, float) and not 0 <= size < 1:
        draft.bad(size_key, f"is {size:g}; must be a share below 1, or a whole number of rows")
    elif size < 0:
        draft.bad(size_key, f"is {size}; must be a share below 1, or a whole number of rows")
    else:
        # 0 holds one row out there, too
        note = "cosmos-rl held the first rows out" + ("; 0 is one row there" if size == 0 else "")
        draft.put("data.holdout", size or 1, size_key, note=note)
        draft.put("data.holdout", size or 1, "validation.enable")


def _own_validation(draft: Draft, size_key: str) -> None:
    dataset(draft, "validation.dataset", "data.eval")
    train = draft.recipe["data"]["train"]
    for name in (
        "format",
        "messages",
        "system",
        "repair",
        "media_path",
        "fps",
        "max_frames",
        "min_pixels",
        "max_pixels",
    ):
        if name in train:
            draft.put(f"data.eval.{name}", train[name])
    draft.put("data.eval.shuffle", False)
    draft.same("validation.enable")
    draft.drop(size_key, "the validation has rows of its own (validation.dataset)")
