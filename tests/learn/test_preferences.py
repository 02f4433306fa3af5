"""SFT, DPO on pairs, and distillation of what came out, through the command line: the habit changes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from hpc_rl.telemetry.curve import curve
from tests.e2e.gsm8k import ROOT
from tests.e2e.harness import Run

FOLDER = ROOT / "recipes" / "quickstart"
pytestmark = [pytest.mark.learn, pytest.mark.timeout(3600)]


@torch.no_grad()
def greedy_accuracy(model: Path, rows: Path) -> float:
    """The share of rows that the exported weights answer right, decoding greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    groups: dict[int, list[dict]] = defaultdict(list)
    for row in map(json.loads, rows.read_text().splitlines()):
        groups[len(row["prompt"])].append(row)  # rows of one length need no padding
    right = 0
    for group in groups.values():
        ids = torch.tensor([tokenizer(row["prompt"]).input_ids for row in group])
        out = module.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        right += sum(text == row["answer"] for text, row in zip(texts, group, strict=True))
    return right / sum(map(len, groups.values()))


def test_preferences_make_sorting_the_habit_and_a_student_takes_it_over(tmp_path: Path) -> None:
    """DPO: accuracy on held-out pairs above 0.9, and greedy answers to held-out rows from below 0.4 to above
    0.8. Distillation into the model before DPO, without a reward: the same, from its own samples."""
    task = tmp_path / "task"
    subprocess.run([sys.executable, str(FOLDER / "make_model.py"), str(task)], check=True, timeout=300)

    def submit(stage: str, model: Path, train: str, *more: str) -> Run:
        paths = [f"model.path={model}", f"data.train.path={task / train}", f"output_root={tmp_path / 'runs'}"]
        run = Run.submit(FOLDER / f"{stage}.yaml", *paths, "cluster.placement=local", *more)
        run.complete(1200)
        return run

    sft = submit("sft", task / "model", "train_sft.jsonl")
    start = sft.root / "safetensors" / "final"
    dpo = submit("dpo", start, "pairs.jsonl", f"data.eval.path={task / 'pairs_eval.jsonl'}")
    teacher = dpo.root / "safetensors" / "final"
    points = [(row["step"], row["eval/accuracy"]) for row in dpo.metrics() if "eval/accuracy" in row]
    print(curve(points, title="held-out pairs moved towards the chosen answer, by step of DPO"))
    before, after = (greedy_accuracy(model, task / "eval.jsonl") for model in (start, teacher))
    print(f"held-out greedy accuracy {before:.3f} -> {after:.3f}")
    assert points[0] == (0, 0.0)
    assert points[-1][1] > 0.9
    assert before < 0.4
    assert after > 0.8

    student = submit(
        "distill",
        start,
        "train.jsonl",
        f"data.eval.path={task / 'eval.jsonl'}",
        f"teacher.path={teacher}",
        "rollout.engine=hf",
    )
    rows = student.metrics()
    taught = [(row["step"], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row]
    apart = [row["train/kl_teacher"] for row in rows if "train/kl_teacher" in row]
    print(curve(taught, title="held-out greedy accuracy of the student, by step of distillation"))
    print(f"reverse KL to the teacher per token {apart[0]:.3f} -> {apart[-1]:.3f}")
    assert taught[0][1] == pytest.approx(before, abs=0.02)
    assert taught[-1][1] > 0.8
    assert apart[-1] < 0.2 * apart[0]
