"""What `status` says of uploads: the last word on each."""

from __future__ import annotations

from hpc_rl.cli._uploads import export_problem, upload_lines


def test_the_last_word_on_each_folder_and_target_counts() -> None:
    final = {"item": "safetensors/final"}
    events = [
        {"kind": "upload_failed", "time": 1.0, "item": "", "target": "s3://b/p", "error": "no keys"},
        {
            "kind": "upload_failed",
            "time": 2.0,
            "item": "safetensors/final",
            "target": "",
            "error": "walltime",
        },
        {"kind": "checkpoint_complete", "time": 3.0, "step": 4},
        {"kind": "uploaded", "time": 4.0, **final, "target": "s3://b/p", "nbytes": 3},
        {
            "kind": "upload_failed",
            "time": 5.0,
            "item": "safetensors/final",
            "target": "hub:m",
            "error": "403",
        },
    ]
    first, second = upload_lines(events[:2])
    assert first.words() == "everything to s3://b/p FAILED: no keys"
    assert second.words() == "safetensors/final FAILED: walltime"
    lines = upload_lines(events)
    assert [line.words() for line in lines] == [
        "safetensors/final is at s3://b/p",
        "safetensors/final to hub:m FAILED: 403",
    ]
    stored = {
        "kind": "uploaded",
        "time": 6.0,
        "item": "safetensors/final",
        "target": "hub:m",
        "url": "https://h/m",
    }
    assert upload_lines([*events, stored])[-1].words() == "safetensors/final is at https://h/m"


def test_an_export_that_failed_is_told_until_it_is_there() -> None:
    failed = {"kind": "export_failed", "time": 1.0, "step": 4, "label": "final", "error": "disk full"}
    assert export_problem([failed]) == "export final failed: disk full"
    assert export_problem([failed, {"kind": "exported", "time": 2.0, "step": 4, "label": "final"}]) is None
