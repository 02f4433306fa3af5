"""vLLM's log-probs of what it samples are ours (fp32, CPU): 1e-5, for every family that vLLM serves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hpc_rl.policy.adapter_source import AdapterSource
from tests.families import FAMILIES
from tests.models import contract as c
from tests.models.test_lora import adapted, stir
from tests.tiny_vlms import PLACE, encode, picture, processor

pytestmark = [pytest.mark.vllm, pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(1500)]
torch.set_num_threads(1)
SERVED = [name for name, family in FAMILIES.items() if family.vllm]
# Longer than the windows of 16.
PROMPT = list(range(6, 28))
TEXT, PICTURE = "what is on the picture @ and how many?", (7, 42, 28)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """`FAMILY/model` and `FAMILY/answer.json` for all families that are asked for."""
    base = tmp_path_factory.mktemp("vllm")
    asked: dict[str, None] = {
        item.callspec.params["family"]: None
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path
    }
    jobs = []
    for family in asked:
        folder = c.save(base / family / "model", family)
        job = {"family": family, "folder": str(folder), "out": str(base / family / "answer.json")}
        if FAMILIES[family].vision:
            job |= {"prompt": TEXT.replace("@", PLACE[family]), "images": [PICTURE]}
        else:
            job |= {"prompt_ids": PROMPT}
        if FAMILIES[family].vllm_lora:
            model = adapted(folder)
            stir(model)
            entries = (entry for bucket in AdapterSource(model).buckets(1 << 30) for entry in bucket)
            save_file(dict(entries), base / family / "push.safetensors")
            job |= {"adapter": str(base / family / "push.safetensors"), "base": model.fingerprint.hex()}
        jobs.append(job)
    (base / "jobs.json").write_text(json.dumps(jobs))
    with (base / "log").open("w") as log:
        command = [sys.executable, "-m", "tests.models.vllm_samples", str(base / "jobs.json")]
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, timeout=1400)
    return base


@pytest.mark.parametrize("family", SERVED)
@torch.no_grad()
def test_log_probs_are_those_of_vllm(family: str, samples: Path) -> None:
    answer = json.loads((samples / family / "answer.json").read_text())
    assert "error" not in answer, answer["error"]
    prompt, media = PROMPT, None
    if FAMILIES[family].vision:
        prompt, media = encode(processor(family), family, TEXT, picture(*PICTURE))
    assert answer["prompt_ids"] == prompt
    ids = torch.tensor(prompt + answer["token_ids"])
    keep = torch.arange(len(prompt) - 1, len(ids) - 1)
    model = c.build_model(samples / family / "model")
    logits = model.logits(ids, torch.arange(len(ids)), keep, None if media is None else [media])
    ours = logits.log_softmax(-1).gather(1, ids[keep + 1, None])[:, 0]
    difference = (ours - torch.tensor(answer["log_probs"])).abs().max()
    assert float(difference) <= 1e-5


@pytest.mark.parametrize("family", [name for name in SERVED if FAMILIES[name].vllm_lora])
@torch.no_grad()
def test_log_probs_with_an_adapter_are_those_of_vllm(family: str, samples: Path) -> None:
    """The adapter as a push installs it, against the adapted module itself; on a catalog's word runs that
    may send it alone do (`Family.vllm_lora`)."""
    answer = json.loads((samples / family / "answer.json").read_text())
    assert "error" not in answer, answer["error"]
    made = answer["adapted"]
    ids = torch.tensor(PROMPT + made["token_ids"])
    keep = torch.arange(len(PROMPT) - 1, len(ids) - 1)
    model = adapted(samples / family / "model")
    differences = []
    for stirred in (False, True):
        if stirred:
            stir(model)
        logits = model.logits(ids, torch.arange(len(ids)), keep)
        ours = logits.log_softmax(-1).gather(1, ids[keep + 1, None])[:, 0]
        differences.append(float((ours - torch.tensor(made["log_probs"])).abs().max()))
    assert differences[0] > 1e-2, "the adapter changes nothing, so nothing is shown"
    assert differences[1] <= 1e-5
