"""A small real controller: starts the plan's roles, counts their answers, obeys interrupts.

`TRIVIAL` configures it: {"goal": answers per process, "pause": seconds between rounds, "end": "stop_role"
to end the steps with StopRole instead of Stop}.
"""

from __future__ import annotations

import json
import os
import sys
import time

from hpc_rl.bus import messages as m
from hpc_rl.roles import RoleProcess, main


class AttemptFailed(RuntimeError):
    pass


def body(process: RoleProcess) -> int:
    wanted = json.loads(os.environ["TRIVIAL"])
    members = [(g.role, task) for g in process.plan.groups for task in range(g.tasks)]
    steps = {("policy", 0), *(who for who in members if who[0] == "rollout")}
    incarnations = dict.fromkeys(steps, 1)
    for role, index in sorted(steps):
        process.bus.send(m.inbox("supervisor"), m.StartRole(role, index, 1))
    alive: set[tuple[str, int]] = set()
    answers: dict[tuple[str, int], list[int]] = {who: [] for who in members}
    sent: dict[tuple[str, int], int] = dict.fromkeys(members, 0)
    ending: int | None = None
    next_round = 0.0
    process.phase("train")
    while steps:
        for message in process.inbox.poll(0.1):
            match message:
                case m.Register():
                    who = (message.role, message.index)
                    alive.add(who)
                    sent[who] = len(answers[who])  # what an earlier incarnation left unanswered
                    process.log.info("registered %s %d on %s", message.role, message.index, message.node)
                case m.WeightsApplied():
                    answers["rollout", message.replica].append(message.version)
                case m.PolicyReady():
                    answers["policy", message.rank].append(message.step)
                case m.StepExited():
                    who = (message.role, message.index)
                    if message.code == 0 or ending is not None:
                        steps.discard(who)
                    elif message.role == "rollout":
                        alive.discard(who)
                        incarnations[who] += 1
                        process.bus.send(m.inbox("supervisor"), m.StartRole(*who, incarnations[who]))
                    else:
                        raise AttemptFailed(f"{message.role} ended with code {message.code}")
                case m.Interrupt(kind="term"):
                    raise SystemExit(143)
                case m.Interrupt():
                    ending = 75
                    stop(process, members, "walltime")
        if ending is None and time.monotonic() > next_round:
            next_round = time.monotonic() + wanted.get("pause", 0.02)
            for who in members:
                if who in alive and sent[who] < wanted["goal"]:
                    sent[who] += 1
                    process.bus.send(m.inbox(*who), m.ReceiveWeights(sent[who]))
            if all(len(got) >= wanted["goal"] for got in answers.values()):
                ending = 0
                if wanted.get("end") == "stop_role":
                    for role, index in steps:
                        process.bus.send(m.inbox("supervisor"), m.StopRole(role, index, 20.0, "done"))
                else:
                    stop(process, members, "done")
    if ending == 0:
        for who, got in answers.items():
            if got != list(range(1, wanted["goal"] + 1)):
                raise AttemptFailed(f"{who} answered {got}")
    return 0 if ending is None else ending


def stop(process: RoleProcess, members: list[tuple[str, int]], reason: str) -> None:
    for who in members:
        process.bus.send(m.inbox(*who), m.Stop(reason))


if __name__ == "__main__":
    sys.exit(main("controller", body))
