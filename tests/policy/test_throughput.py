"""The formula of MFU against torch's own count of what a model runs."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from hpc_rl.catalog.flops import model_flops
from hpc_rl.policy.throughput import StepTimer, Throughput
from tests.families import FAMILIES

pytestmark = pytest.mark.torch
torch.set_num_threads(1)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_formula_is_what_runs(family: str) -> None:
    config = FAMILIES[family].config()
    # Written out, each of the two products of attention is counted once, and twice backward.
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.randint(0, 96, (3, 40))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    found = model_flops(config.to_dict())
    assert found is not None
    assert counter.get_total_flops() == pytest.approx(found.step(120, 120, 3 * 40**2), rel=0.01)


def test_rates_are_over_all_devices() -> None:
    flops = model_flops(FAMILIES["llama"].config().to_dict())
    sums = {"input_tokens": 1000.0, "tokens": 500.0, "sequences": 10.0, "squares": 1e5}
    assert flops is not None
    rates = Throughput(flops, 1.0, 1e12, 4).metrics(sums, 2.0)
    assert rates["train/tokens_per_s"] == 500.0
    assert rates["train/samples_per_s"] == 5.0
    assert rates["train/mfu"] == pytest.approx(flops.step(1000, 500, 1e5) / 2.0 / 4e12)
    assert "train/mfu" not in Throughput(flops, 1.0, None, 4).metrics(sums, 2.0)


def test_the_parts_of_a_step_add_up() -> None:
    timer = StepTimer(torch.device("cpu"))
    timer.begin()
    for name in ("data", "forward_backward"):
        timer.mark(name)
    found = timer.metrics()
    assert list(found) == ["time/data_s", "time/forward_backward_s"]
    assert 0 <= sum(found.values()) <= timer.seconds()
