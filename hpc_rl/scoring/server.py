"""The loop of a process that serves models: requests from all rollout replicas in, batches, answers out.

What waits is computed in one batch: the oldest request and those closest to it in length, up to
`Work.batch_tokens` with padding. A batch has a deadline, which the heartbeat tells the controller: a process
that hangs in one is ended and started again, and what was asked of it is asked elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from hpc_rl.bus import messages as m
from hpc_rl.roles import RoleProcess
from hpc_rl.scoring.base import Job, Work

POLL_S = 1.0
READ = 1024  # stream entries at once
SAY_S = 300.0


def choose(queue: Sequence[Job], batch_tokens: int) -> list[int]:
    """The places in `queue` of the next batch: the oldest, and those closest to it in length that fit."""
    oldest = queue[0].length
    order = sorted(range(len(queue)), key=lambda i: (abs(queue[i].length - oldest), i))
    chosen: list[int] = []
    longest = 0
    for index in order:
        width = max(longest, queue[index].length)
        if chosen and width * (len(chosen) + 1) > batch_tokens:
            break
        chosen.append(index)
        longest = width
    return sorted(chosen)


class Server:
    """`limit_s` is how long a batch may take."""

    def __init__(self, process: RoleProcess, work: Work, *, limit_s: float) -> None:
        self.process, self.work, self.limit_s = process, work, limit_s
        self.queue: list[Job] = []
        self._answered = self._batches = 0
        self._said = time.monotonic()

    def serve(self) -> None:
        """Until `Stop`. Raises what ends the process."""
        process = self.process
        ready = m.ScoringReady(process.role, process.index, process.incarnation)
        process.phase("idle")
        process.send(ready)
        while True:
            for message in process.inbox.poll(0.0 if self.queue else POLL_S, count=READ):
                if isinstance(message, m.Stop):
                    process.log.info("stopping: %s", message.reason)
                    process.send(m.RoleStopped(role=process.role, index=process.index))
                    return
                self._take(message)
            if self.queue:
                self._batch()
            self._say()

    def _take(self, message: m.Message) -> None:
        try:
            self.queue.append(self.work.open(message))
        except TypeError as error:
            self.process.log.warning("%s", error)

    def _batch(self) -> None:
        places = choose(self.queue, self.work.batch_tokens)
        jobs = [self.queue[i] for i in places]
        taken = set(places)
        self.queue = [job for i, job in enumerate(self.queue) if i not in taken]
        with self.process.within("score", self.limit_s):
            for reply_to, numbers in by_stream(jobs).items():
                self.process.bus.send(reply_to, m.ScoringBegan([jobs[i].number for i in numbers]))
            answers = self.work.run(jobs)
        for reply_to, numbers in by_stream(jobs).items():
            self.process.bus.send(reply_to, *(answers[i] for i in numbers))
        self._answered += len(jobs)
        self._batches += 1

    def _say(self) -> None:
        now = time.monotonic()
        if now - self._said < SAY_S:
            return
        if self._batches:
            rate, size = self._answered / (now - self._said), self._answered / self._batches
            text = "%.2f answers/s in batches of %.1f, %d wait"
            self.process.log.info(text, rate, size, len(self.queue))
        self._said, self._answered, self._batches = now, 0, 0


def by_stream(jobs: Sequence[Job]) -> dict[str, list[int]]:
    """The places of `jobs` by the stream that wants their answers."""
    found: dict[str, list[int]] = {}
    for index, job in enumerate(jobs):
        found.setdefault(job.reply_to, []).append(index)
    return found
