"""Patches are exact and short; a copy that is not what the policy thinks is found out and replaced."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_rl.weights.delta import GAPS8, GAPS16, MASK, SAME, WHOLE, Patch, apply, encode
from hpc_rl.weights.gloo import GlooTransport
from hpc_rl.weights.mirror import Mirror
from hpc_rl.weights.protocol import PushResult, WeightTransferError
from hpc_rl.weights.receiver import Receiver
from hpc_rl.weights.sender import BroadcastSender, group_prefix

pytestmark = [pytest.mark.torch, pytest.mark.timeout(120)]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def there_and_back(old: torch.Tensor, new: torch.Tensor) -> Patch:
    """The patch from `old` to `new`, after checking that it makes one of the other."""
    patch, parts = encode(as_bytes(old), as_bytes(new), old.element_size())
    data = np.concatenate([part.view(np.uint8) for part in parts]) if parts else np.empty(0, np.uint8)
    assert len(data) == patch.nbytes
    target = as_bytes(old).clone()
    apply(patch, torch.from_numpy(data), target)
    assert torch.equal(target, as_bytes(new))
    return patch


@pytest.mark.parametrize("step", [1, -1, 5, -300])
@pytest.mark.parametrize(
    ("density", "form", "share"),
    [(0.0, SAME, 0), (0.0005, GAPS16, 0.6), (0.03, GAPS8, 0.55), (0.4, MASK, 0.5), (1.0, MASK, 0.5)],
)
def test_every_density_has_its_form(density: float, form: str, share: float, step: int) -> None:
    """`share` is bytes per changed element over four."""
    torch.manual_seed(1)
    old = (torch.randn(300, 217) * 0.02).bfloat16()
    bits = old.view(torch.int16).clone()
    bits[torch.rand(old.shape) < density] += step
    patch = there_and_back(old, bits.view(torch.bfloat16))
    if step == -300 and density == 1.0:
        assert patch.form == WHOLE
        return
    assert patch.near == (patch.changed if abs(step) == 1 and density > 0.001 else 0)
    if patch.near == 0:
        assert patch.form == form
    extra = 2 if step == -300 else 0
    room = old.numel() / 8 if form == MASK else 0.002 * old.numel()
    per_element = (1 if patch.near else 4 * share) + extra
    assert patch.nbytes <= old.numel() * density * per_element * 1.3 + room


def test_another_tensor_travels_whole() -> None:
    assert there_and_back(torch.randn(1000).bfloat16(), torch.randn(1000).bfloat16()).form == WHOLE


def test_other_widths_are_the_same_or_whole() -> None:
    old = torch.arange(100, dtype=torch.float32)
    assert there_and_back(old, old.clone()).form == SAME
    assert there_and_back(old, old + (torch.arange(100) == 3)).form == WHOLE


def test_a_patch_of_another_tensor_is_refused() -> None:
    old = torch.zeros(4000, dtype=torch.bfloat16)
    new = old.clone()
    new[3900] = 1
    patch, parts = encode(as_bytes(old), as_bytes(new), 2)
    data = torch.from_numpy(np.concatenate([part.view(np.uint8) for part in parts]))
    with pytest.raises(ValueError, match="beyond the tensor"):
        apply(patch, data, as_bytes(old[:3000]).clone())
    with pytest.raises(ValueError, match="unknown form"):
        apply(Patch("zip", patch.nbytes, patch.changed, patch.wide), data, as_bytes(old).clone())


def test_a_step_of_adamw_takes_less_than_ten_per_cent() -> None:
    """Weights of std 0.02, lr 3e-6, from the first step on, which moves every weight by lr."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(400_000) * 0.02)
    optimizer = torch.optim.AdamW([weight], lr=3e-6, weight_decay=0.01)
    shares = []
    for _ in range(4):
        old = weight.detach().bfloat16()
        weight.grad = torch.randn_like(weight) * 1e-3
        optimizer.step()
        new = weight.detach().bfloat16()
        shares.append(there_and_back(old, new).nbytes / old.nbytes)
    assert max(shares) < 0.07


# --- over real gloo groups ------------------------------------------------------------------------------
class Model:
    """bf16 weights that a step changes a little; a source of two buckets."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.weights = {
            f"layers.{i}.{name}": (torch.randn(40, 50) * 0.02).bfloat16() for i in range(2) for name in "qk"
        } | {"norm": torch.ones(8)}

    def step(self) -> None:
        for weight in self.weights.values():
            if weight.dtype == torch.bfloat16:
                weight.view(torch.int16)[torch.rand(weight.shape) < 0.02] += 1

    def buckets(self, max_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
        items = list(self.weights.items())
        yield items[:2]
        yield items[2:]


class Replica:
    """A worker that keeps its copy over pushes; `receive` runs in a thread."""

    def __init__(self, bus_file: Path, replica: int, incarnation: int = 0) -> None:
        self.bus_file, self.replica, self.incarnation = bus_file, replica, incarnation
        self.mirror = Mirror()
        self.channel: Any = None
        self.loaded: dict[str, torch.Tensor] = {}
        self.nbytes = 0
        self.error: Exception | None = None

    def receive(self, version: int, names: list[str]) -> threading.Thread:
        def run() -> None:
            try:
                deadline = time.monotonic() + 20
                if self.channel is None:
                    prefix = group_prefix(1, self.replica, self.incarnation, version)
                    self.channel = GlooTransport.join(self.bus_file, prefix, 0, 1, 20.0)
                receiver = Receiver(self.channel, names)
                try:
                    receiver.fetch(version, deadline, self.mirror)
                except WeightTransferError:
                    self.channel.close()
                    raise
                self.loaded = {n: t.clone() for bucket in self.mirror.buckets() for n, t in bucket}
                self.nbytes = receiver.nbytes
                receiver.finish(True, deadline)
            except WeightTransferError as error:
                self.error = error

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread


def push(sender: BroadcastSender, version: int, model: Model, *replicas: Replica) -> PushResult:
    threads = [replica.receive(version, list(model.weights)) for replica in replicas]
    result = sender.push(version, model, [r.replica for r in replicas], [r.incarnation for r in replicas])
    for thread in threads:
        thread.join(20)
    return result


def check_equal(model: Model, replica: Replica) -> None:
    assert replica.error is None
    assert list(replica.loaded) == list(model.weights)
    assert all(torch.equal(replica.loaded[name], weight) for name, weight in model.weights.items())


@pytest.mark.redis
def test_changes_for_those_who_have_the_version_before_and_all_for_the_others(
    bus_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sender = GlooTransport.sender(
        bus_file, attempt=1, workers=1, bucket_bytes=1 << 20, timeout_s=20.0, changes=True
    )
    model, first, late = Model(), Replica(bus_file, 0), Replica(bus_file, 1)
    whole = push(sender, 1, model, first)
    assert whole.failed == {}
    check_equal(model, first)
    model.step()
    both = push(sender, 2, model, first, late)  # one that joins gets all
    assert both.failed == {}
    check_equal(model, first)
    check_equal(model, late)
    assert first.nbytes < 0.1 * late.nbytes
    assert late.nbytes == whole.nbytes
    model.step()
    push(sender, 3, model, first)
    model.step()
    push(sender, 4, model, first, late)  # `late` was left out of version 3
    check_equal(model, first)
    check_equal(model, late)
    assert first.nbytes < 0.1 * late.nbytes

    # A copy that changed behind the policy's back: found by the checksum, repeated whole, no error.
    caplog.clear()
    next(iter(first.mirror.buckets()))[1][1].view(torch.int16)[7, 7] += 1
    model.step()
    assert push(sender, 5, model, first, late).failed == {}
    check_equal(model, first)
    check_equal(model, late)
    assert first.nbytes > whole.nbytes
    assert late.nbytes < 0.1 * whole.nbytes
    assert "replica 0 did not hold version 4: it got all" in caplog.text
    assert "version 5 comes again, whole: checksum of layers.0.k is wrong after its changes" in caplog.text

    # A copy of another version, which its holder knows.
    caplog.clear()
    late.mirror.version = 3
    model.step()
    assert push(sender, 6, model, first, late).failed == {}
    check_equal(model, late)
    assert "the changes are those since version 5, the weights here are of version 3" in caplog.text
    sender.close()


@pytest.mark.redis
def test_a_push_goes_on_while_the_weights_change_and_its_end_is_told(bus_file: Path) -> None:
    """What arrives is the version that was gathered, however late the replica comes."""
    sender = GlooTransport.sender(
        bus_file, attempt=1, workers=1, bucket_bytes=1 << 20, timeout_s=20.0, keep=True
    )
    model, replica = Model(), Replica(bus_file, 0)
    results: list[PushResult] = []
    told = threading.Event()

    def done(result: PushResult) -> None:
        results.append(result)
        told.set()

    began = time.monotonic()
    sender.start(1, model, [0], [0], done)
    assert time.monotonic() - began < 5  # nobody has joined
    assert not told.is_set()
    gathered = {name: weight.clone() for name, weight in model.weights.items()}
    model.step()
    replica.receive(1, list(model.weights)).join(20)
    assert told.wait(20)
    assert results[0].failed == {}
    assert all(torch.equal(replica.loaded[name], weight) for name, weight in gathered.items())
    # the next push waits for the one before, and a replica that never comes fails alone
    sender._connect_s = 1.0
    thread = replica.receive(2, list(model.weights))
    sender.start(2, model, [0, 9], [0, 0], done)
    sender.wait()
    thread.join(20)
    assert list(results[1].failed) == [9]
    check_equal(model, replica)
    sender.close()


@pytest.mark.redis
def test_a_source_that_fails_and_a_report_that_fails(bus_file: Path) -> None:
    class Broken(Model):
        def buckets(self, max_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
            yield list(self.weights.items())[:2]
            raise OSError("disk gone")

    def lost(result: PushResult) -> None:
        raise ConnectionError("the bus is gone")

    sender = GlooTransport.sender(
        bus_file, attempt=1, workers=1, bucket_bytes=1 << 20, timeout_s=20.0, changes=True
    )
    broken, replica = Broken(), Replica(bus_file, 0)
    thread = replica.receive(1, list(broken.weights))
    with pytest.raises(OSError, match="disk gone"):
        sender.start(1, broken, [0], [0], lost)
    thread.join(20)
    assert "gave up the push of version 1" in str(replica.error)
    assert replica.mirror.version is None
    sender.start(2, Model(), [], [], lost)
    with pytest.raises(ConnectionError, match="the bus is gone"):
        sender.wait()
    sender.close()
