"""The policy and the 1,000 replicas of `benchmarks/controller_load.py`: they speak as the real ones and do
nothing. Each runs in a process of its own, and its CPU time does not count."""

from __future__ import annotations

import heapq
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import msgspec

from hpc_rl.bus import messages as m
from hpc_rl.bus.client import Bus
from hpc_rl.types import EngineLoad, PromptGroup, Trajectory, VersionSpan

BEAT_S = 2.0
GROUP_SIZE = 8
PROMPT_TOKENS = 32


class Reader:
    """Reads many streams with one connection, and trims them."""

    def __init__(self, bus: Bus, streams: list[str]) -> None:
        self.client = bus._redis
        self.cursors: dict[bytes, bytes] = {stream.encode(): b"0-0" for stream in streams}

    def poll(self, block_ms: int) -> list[tuple[bytes, bytes]]:
        """(stream, message bytes), in order per stream."""
        found: list[tuple[bytes, bytes]] = []
        with self.client.pipeline(transaction=False) as pipe:
            for stream, entries in self.client.xread(self.cursors, count=64, block=block_ms) or []:
                for identifier, fields in entries:
                    found += [(stream, data) for data in fields.values()]
                    self.cursors[stream] = identifier
                pipe.xtrim(stream, minid=self.cursors[stream], approximate=False)
            pipe.execute()
        return found


class TrainStep(msgspec.Struct, tag="TrainStep"):
    """As the bus's, but for what is trained: it is skipped, not made into objects."""

    step: int


class Other(msgspec.Struct, tag=True):
    pass


class SaveCheckpoint(Other):
    step: int


class PushWeights(Other):
    version: int
    replicas: list[int]


class Stop(Other):
    reason: str


def policy(run: str, bus_file: str, train_s: float) -> None:
    """Trains, pushes and saves in no time but `train_s` per step; ends with Stop."""
    bus = Bus.connect(Path(bus_file), 30.0)
    reader = Reader(bus, [m.inbox("policy", 0)])
    decode = msgspec.msgpack.Decoder(TrainStep | SaveCheckpoint | PushWeights | Stop).decode
    bus.send(m.inbox("controller"), m.PolicyReady(0, 0, {}))
    while True:
        for _, data in reader.poll(500):
            match decode(data):
                case TrainStep(step=step):
                    time.sleep(train_s)
                    answer: Any = m.StepDone(step, train_s, {"train/loss": 0.0})
                case PushWeights(version=version):
                    answer = m.WeightsPushed(version, 0.0, 1)
                case SaveCheckpoint(step=step):
                    folder = Path(run) / "checkpoints" / f"step_{step:08d}" / "policy"
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / ".metadata").write_text("x")
                    answer = m.CheckpointSaved(step, 0.0)
                case _:
                    return
            bus.send(m.inbox("controller"), answer)


class Replicas:
    """`count` replicas with `slots` groups each, which take lognormal times of mean `mean_s`."""

    def __init__(self, bus: Bus, count: int, mean_s: float, tokens: int, nbytes: int) -> None:
        self.bus, self.count, self.mean_s, self.tokens = bus, count, mean_s, tokens
        self.rng = random.Random(0)
        self.version = [0] * count
        self.due: list[tuple[float, int, int, m.Generate]] = []
        self.freed: list[list[float]] = [[] for _ in range(count)]  # when a place became free
        self.waits: list[tuple[float, float]] = []  # when it was filled, and how long that took
        self.done = 0
        rng = self.rng
        self.ids = [rng.randrange(50_000) for _ in range(tokens)]
        self.log_probs = [-rng.random() for _ in range(tokens)]
        self.text = ""
        room = nbytes - len(msgspec.msgpack.encode(self.trajectory(10_000, 0, 0)))
        self.text = "x" * max(0, room)

    def trajectory(self, ordinal: int, sample: int, replica: int) -> Trajectory:
        return Trajectory(
            ordinal, sample, replica, list(range(PROMPT_TOKENS)), self.ids, self.log_probs,
            [VersionSpan(self.version[replica], 0, self.tokens)], "stop", self.text,
            rewards={"exact": float(sample % 2)}, reward=float(sample % 2), seconds=1.0,
        )  # fmt: skip

    def take(self, replica: int, message: Any) -> m.Message | None:
        """Obey one message; what is said at once."""
        now = time.perf_counter()
        if isinstance(message, m.ReceiveWeights):
            self.version[replica] = message.version
            return m.WeightsApplied(replica, 1, message.version, 1)
        if isinstance(message, m.Generate):
            if self.freed[replica]:
                self.waits.append((now, now - self.freed[replica].pop(0)))
            takes = self.rng.lognormvariate(math.log(self.mean_s) - 0.125, 0.5)
            heapq.heappush(self.due, (now + takes, self.done + len(self.due), replica, message))
        return None

    def finished(self) -> list[m.Message]:
        """The groups that are due."""
        now, answers = time.perf_counter(), []
        while self.due and self.due[0][0] <= now and len(answers) < 64:
            _, _, replica, request = heapq.heappop(self.due)
            ordinal = request.prompt.ordinal
            samples = [self.trajectory(ordinal, sample, replica) for sample in range(request.group_size)]
            group = PromptGroup(request.prompt, samples)
            load = EngineLoad(running=16)
            answers.append(m.GroupDone(replica, 1, request.purpose, request.tag, group, {}, load))
            self.freed[replica].append(now)
            self.done += 1
        return answers


def replicas(bus_file: str, result: str, count: int, mean_s: float, tokens: int, nbytes: int) -> None:
    """Ends when all were told to stop; writes what it measured to `result`, every second."""
    bus = Bus.connect(Path(bus_file), 30.0)
    streams = {m.inbox("rollout", index).encode(): index for index in range(count)}
    reader = Reader(bus, [name.decode() for name in streams])
    decode = msgspec.msgpack.Decoder(m.Message).decode
    all_of_them = Replicas(bus, count, mean_s, tokens, nbytes)
    bus.send(m.inbox("controller"), *(m.ReplicaReady(index, 1, 0) for index in range(count)))
    beaten, stopped = 0.0, 0
    history: list[tuple[float, int]] = []
    while stopped < count:
        if time.time() - beaten > BEAT_S:
            beaten = time.time()
            beat = {"time": beaten, "phase": "generate", "phase_since": beaten, "limit_s": None,
                    "incarnation": 1, "step": 0, "pid": 1}  # fmt: skip
            data = msgspec.msgpack.encode(beat)
            bus._redis.hset("heartbeats", mapping={f"rollout:{index}": data for index in range(count)})
            history.append((time.perf_counter(), all_of_them.done))
            measured = {"history": history, "waits": all_of_them.waits}
            Path(result).with_suffix(".new").write_text(json.dumps(measured))
            Path(result).with_suffix(".new").rename(result)
        soon = all_of_them.due[0][0] - time.perf_counter() if all_of_them.due else 0.02
        answers: list[m.Message] = []
        for stream, data in reader.poll(max(1, min(20, int(soon * 1000)))):
            message = decode(data)
            stopped += isinstance(message, m.Stop)
            answer = all_of_them.take(streams[stream], message)
            if answer is not None:
                answers.append(answer)
        answers += all_of_them.finished()
        bus.send(m.inbox("controller"), *answers)
