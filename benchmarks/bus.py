"""Messages per second of the bus over raw redis-py: `python -m benchmarks.bus`.

Both sides write 64 messages of 8 KiB to a stream at once (raw: a pipeline of 64 XADD, bus: one `send`),
read them back with one XREAD and trim, against the same Redis with the same settings. The bus side
encodes typed messages (a prompt group that is mostly text), numbers them, drops repeats and checks
types; the raw side moves as many opaque bytes. What it costs to make Python lists of tokens and
log-probs is the decoder's, whatever carries the bytes; it is printed beside the ratio
(`decode_tokens_us`, for 8 KiB of numbers).
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import msgspec
import redis

from benchmarks._report import control, interleave, report
from hpc_rl.bus.client import Bus, Inbox, decode_message
from hpc_rl.bus.messages import GroupDone
from hpc_rl.bus.server import RedisServer
from hpc_rl.types import Prompt, PromptGroup, Trajectory, VersionSpan

DEPTH = 64
NBYTES = 8192
BATCHES = 80
PAIRS = 15
GOAL = 0.9


def group_done(tokens: int) -> GroupDone:
    """A prompt group of four answers whose msgpack has NBYTES bytes: `tokens` each, the rest is text."""
    rng = random.Random(0)
    trajectories = [
        Trajectory(
            ordinal=7,
            sample=sample,
            replica=0,
            prompt_ids=[1, 2, 3],
            token_ids=[rng.randrange(50_000) for _ in range(tokens)],
            log_probs=[-rng.random() for _ in range(tokens)],
            spans=[VersionSpan(3, 0, tokens)],
            finish="stop",
            rewards={"gsm8k": 1.0},
            reward=1.0,
        )
        for sample in range(4)
    ]
    group = PromptGroup(Prompt(7, 0, 7, "How many apples?", "7"), trajectories)
    done = GroupDone(0, 1, "train", "", group, {"rollout/seconds": 1.0})
    room = NBYTES - len(msgspec.msgpack.encode(done))
    for trajectory in trajectories:
        trajectory.text = "x" * (room // len(trajectories) - 2)
    return done


def decode_us(message: GroupDone) -> float:
    """Microseconds of this process to decode one message."""
    data = msgspec.msgpack.encode(message)
    start = time.process_time()
    for _ in range(1000):
        decode_message(data)
    return (time.process_time() - start) * 1000


def bus_side(bus: Bus, message: GroupDone) -> float:
    done = [message] * DEPTH
    box = Inbox(bus, "benchmark:bus", cursor=bus.end_of("benchmark:bus"))
    start = time.perf_counter()
    for _ in range(BATCHES):
        bus.send(box.stream, *done)
        read = 0
        while read < DEPTH:
            read += len(box.poll(1.0, count=DEPTH))
    return DEPTH * BATCHES / (time.perf_counter() - start)


def raw_side(client: redis.Redis) -> float:
    payload = os.urandom(NBYTES)
    stream = "benchmark:raw"
    last = client.xrevrange(stream, count=1)
    cursor = last[0][0] if last else "0-0"
    start = time.perf_counter()
    for _ in range(BATCHES):
        with client.pipeline(transaction=False) as pipe:
            for _ in range(DEPTH):
                pipe.xadd(stream, {"m": payload})
            pipe.execute()
        read = 0
        while read < DEPTH:
            entries = client.xread({stream: cursor}, count=DEPTH, block=1000)[0][1]
            read += len(entries)
            cursor = entries[-1][0]
        client.xtrim(stream, minid=cursor, approximate=False)
    return DEPTH * BATCHES / (time.perf_counter() - start)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder) / "redis")
        server.start()
        try:
            server.write_bus_file(Path(folder) / "bus.json")
            bus = Bus.connect(Path(folder) / "bus.json", 5.0)
            client = redis.Redis(port=server.port, password=server.password, protocol=2)
            text, tokens = group_done(tokens=1), group_done(tokens=130)
            bus_side(bus, text), raw_side(client)
            ours, raw = interleave(lambda: bus_side(bus, text), lambda: raw_side(client), PAIRS)
        finally:
            server.stop()
    ratios = [a / b for a, b in zip(ours, raw, strict=True)]
    facts = {
        "nbytes": len(msgspec.msgpack.encode(text)),
        "depth": DEPTH,
        "raw_us": round(1e6 / statistics.median(raw), 1),
        "decode_text_us": round(decode_us(text), 1),
        "decode_tokens_us": round(decode_us(tokens), 1),
    }
    report("bus", ratios, goal=GOAL, better="higher", aa=control(raw), **facts)


if __name__ == "__main__":
    main()
