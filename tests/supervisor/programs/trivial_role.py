"""A small real role: answers every `ReceiveWeights`; misbehaves once as a file in `control/` says."""

from __future__ import annotations

import os
import subprocess
import time

from hpc_rl.bus import messages as m
from hpc_rl.roles import RoleProcess


def body(process: RoleProcess) -> None:
    process.register(colour="red")
    process.phase("work")
    helper = subprocess.Popen(["sleep", "300"]) if os.environ.get("TRIVIAL_HELPER") else None
    while True:
        for message in process.inbox.poll(1.0):
            match message:
                case m.ReceiveWeights():
                    misbehave(process, message.version)
                    process.step = message.version
                    answer(process, message.version)
                case m.Stop():
                    process.send(m.RoleStopped(process.role, process.index))
                    if helper is not None:
                        process.log.info("helper %d is left behind", helper.pid)
                    return


def answer(process: RoleProcess, version: int) -> None:
    if process.role == "policy":
        process.send(m.PolicyReady(process.index, version))
    else:
        process.send(m.WeightsApplied(process.index, process.incarnation, version, 0))


def misbehave(process: RoleProcess, version: int) -> None:
    order = process.run_dir.control / f"{process.role}_{process.index}_{version}"
    try:
        words = order.read_text()
        order.unlink()
    except FileNotFoundError:
        return
    answer(process, version)
    match words:
        case "raise":
            raise RuntimeError(f"the disk is full, token {os.environ.get('TRIVIAL_SECRET')}")
        case "exit":
            os._exit(7)
        case "stubborn":
            import signal

            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(300)
