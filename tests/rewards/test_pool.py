"""The scorer pool with real processes: plugins, hangs, crashes, noise on stdout."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from hpc_rl.rewards.base import RewardError, SampleInfo, reward_specs
from hpc_rl.rewards.pool import Scored, ScorerPool

pytestmark = pytest.mark.timeout(120)

PLUGIN = """
import os, subprocess, threading, time
from hpc_rl.recipe.extensions import register

leaks = []

def naughty(prompt, response, answer, fields):
    print("noise on stdout", flush=True)
    if response == "hang":
        subprocess.Popen(["sleep", "1000"])
        while True:
            time.sleep(1)
    if response == "crash":
        os._exit(11)
    if response == "raise":
        raise KeyError("column")
    if response == "exit":
        raise SystemExit(3)
    if response == "eat":
        eaten = bytearray(4 << 30)
    if response == "leak":
        leaks.append(bytearray(700 << 20))
        for i in range(0, len(leaks[-1]), 4096):
            leaks[-1][i] = 1
    if response == "later":
        threading.Timer(0.2, os._exit, [7]).start()
    if response == "nan":
        return float("nan")
    return len(response) + fields.get("bonus", 0)

async def patient(prompt, response, answer, fields, sample):
    import asyncio
    await asyncio.sleep(0.01)
    if response == "cancel":
        raise asyncio.CancelledError
    return float(sample.tokens)

register("rewards", "naughty", implementation="naughty_plugin:naughty")
"""


def pool(tmp_path: Path, **options: float) -> ScorerPool:
    (tmp_path / "naughty_plugin.py").write_text(PLUGIN)
    specs = reward_specs([{"name": "naughty", "weight": 2.0}, {"name": "contains", "text": "ok"}])
    return ScorerPool(specs, plugins=["naughty_plugin.py"], code=str(tmp_path), **options)  # type: ignore[arg-type]


def test_scores_failures_and_recovery(tmp_path: Path) -> None:
    async def body() -> None:
        scorers = pool(tmp_path, size=2, limit_s=3.0)
        await scorers.start()
        try:
            good = await scorers.score("p", "ok then", None, {"bonus": 1})
            assert good == Scored({"naughty": 8.0, "contains": 1.0}, 17.0)
            began = time.monotonic()
            texts = ["hang", "crash", "raise", "nan", "ok", "fine"]
            results = await asyncio.gather(*(scorers.score("p", text, None) for text in texts))
            assert time.monotonic() - began < 30
            errors = [result.error for result in results]
            assert "more than 3 s" in errors[0]
            assert "ended with code 11" in errors[1]
            assert errors[2] == "reward 'naughty': KeyError: 'column'"
            assert "finite number" in errors[3]
            assert errors[4:] == ["", ""]
            assert [r.total for r in results[4:]] == [5.0, 8.0]
            assert (scorers.failures, scorers.kills) == (4, 2)
        finally:
            await scorers.close()

    asyncio.run(body())


def test_whatever_a_reward_does_costs_one_sample(tmp_path: Path) -> None:
    async def body() -> None:
        (tmp_path / "naughty_plugin.py").write_text(PLUGIN)
        specs = reward_specs([{"name": "contains", "text": "a"}, {"name": "naughty", "memory_gb": 1.0}])
        scorers = ScorerPool(specs, plugins=["naughty_plugin.py"], code=str(tmp_path), size=1)
        await scorers.start()
        try:
            for text, error in [
                ("eat", "MemoryError"),
                ("exit", "SystemExit: 3"),
                ("crash", "reward 'naughty': the scorer process ended with code 11"),
            ]:
                scored = await scorers.score("p", text, None)
                assert error in scored.error and scored.failed == ("naughty",)
                assert (await scorers.score("p", "fine", None)).error == ""
            exits = await scorers.score("p", "eat", None)
            assert exits.scores == {"contains": 1.0}, "the other rewards are known"
            for _ in range(3):  # 700 MB each, of 1 GB: the process is replaced in between
                assert (await scorers.score("p", "leak", None)).error == ""
            kills = scorers.kills
            assert (await scorers.score("p", "later", None)).error == ""
            await asyncio.sleep(1.0)  # it dies between two samples, which costs neither
            assert (await scorers.score("p", "fine", None)).error == ""
            assert scorers.kills == kills + 1
        finally:
            await scorers.close()

    asyncio.run(body())


def test_async_functions_by_reference(tmp_path: Path) -> None:
    async def body() -> None:
        (tmp_path / "naughty_plugin.py").write_text(PLUGIN)
        sections = [{"name": "python", "function": "naughty_plugin:patient", "weight": 0.5, "limit_s": 9}]
        specs = reward_specs(sections)
        assert [(spec.key, spec.limit_s) for spec in specs] == [("patient", 9.0)]
        scorers = ScorerPool(specs, plugins=["naughty_plugin.py"], code=str(tmp_path), size=1)
        await scorers.start()
        try:
            info = SampleInfo(tokens=7, finish="stop", max_tokens=8)
            assert await scorers.score("p", "r", None, {}, info) == Scored({"patient": 7.0}, 3.5)
            cancelled = await scorers.score("p", "cancel", None, {}, info)
            assert cancelled.failed == ("patient",)
            assert (await scorers.score("p", "r", None, {}, info)).total == 3.5
        finally:
            await scorers.close()

    asyncio.run(body())
    with pytest.raises(RewardError, match="module naughty_plugin has no function 'patent'"):
        bad = reward_specs([{"name": "python", "function": "naughty_plugin:patent"}])
        asyncio.run(ScorerPool(bad, plugins=["naughty_plugin.py"], code=str(tmp_path)).start())


def test_math_and_code_in_a_scorer(tmp_path: Path) -> None:
    """math-verify's alarms need the main thread, and the sandbox a process that may start others."""

    async def body() -> None:
        specs = reward_specs([{"name": "math"}, {"name": "code"}])
        scorers = ScorerPool(specs, size=1)
        await scorers.start()
        try:
            response = "\\boxed{\\frac{2}{4}}\n```python\ndef f():\n    return 1\n```"
            scored = await scorers.score("p", response, "0.5", {"tests": "assert f() == 1"})
            assert scored == Scored({"math": 1.0, "code": 1.0}, 2.0)
            no_tests = await scorers.score("p", response, "0.5", {})
            assert no_tests.failed == ("code",) and "column 'tests'" in no_tests.error
        finally:
            await scorers.close()

    asyncio.run(body())


def test_the_deadline_starts_at_execution(tmp_path: Path) -> None:
    (tmp_path / "slow_plugin.py").write_text(
        "import time\nfrom hpc_rl.recipe.extensions import register\n"
        "def slow(p, r, a, f):\n    time.sleep(0.4)\n    return 1.0\n"
        "register('rewards', 'slow', implementation='slow_plugin:slow')\n"
    )

    async def body() -> list[Scored]:
        scorers = ScorerPool(
            reward_specs([{"name": "slow"}]),
            plugins=["slow_plugin.py"],
            code=str(tmp_path),
            size=1,
            limit_s=1.0,
        )
        await scorers.start()
        try:
            return await asyncio.gather(*(scorers.score("p", "r", None) for _ in range(5)))
        finally:
            await scorers.close()

    assert [result.error for result in asyncio.run(body())] == [""] * 5  # 2 s in all, 0.4 s each


def test_a_cancelled_sample_does_not_answer_for_the_next(tmp_path: Path) -> None:
    async def body() -> None:
        scorers = pool(tmp_path, size=1, limit_s=20.0)
        await scorers.start()
        try:
            task = asyncio.create_task(scorers.score("p", "hang", None))
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await scorers.score("p", "ok", None)).total == 5.0
        finally:
            await scorers.close()

    asyncio.run(body())


def test_rewards_that_cannot_be_made_say_why(tmp_path: Path) -> None:
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('no licence file')\n")

    async def start(scorers: ScorerPool) -> None:
        await scorers.start()

    with pytest.raises(RewardError, match="no licence file"):
        asyncio.run(
            start(
                ScorerPool(
                    reward_specs([{"name": "exact"}]), plugins=["broken_plugin.py"], code=str(tmp_path)
                )
            )
        )
    with pytest.raises(RewardError, match="no rewards extension is called 'exatc'"):
        asyncio.run(start(ScorerPool(reward_specs([{"name": "exatc"}]))))


def test_scorers_die_with_their_parent(tmp_path: Path) -> None:
    """Also one that hangs and never sees the end of its stdin."""
    pid_file = tmp_path / "pid"
    (tmp_path / "stuck_plugin.py").write_text(
        "import os, time\nfrom hpc_rl.recipe.extensions import register\n"
        f"def stuck(p, r, a, f):\n    open({str(pid_file)!r}, 'w').write(str(os.getpid()))\n"
        "    while True:\n        time.sleep(1)\n"
        "register('rewards', 'stuck', implementation='stuck_plugin:stuck')\n"
    )
    child = os.fork()
    if child == 0:

        async def body() -> None:
            scorers = ScorerPool(
                reward_specs([{"name": "stuck"}]), plugins=["stuck_plugin.py"], code=str(tmp_path)
            )
            await scorers.start()
            await scorers.score("p", "r", None)

        asyncio.run(body())
        os._exit(0)
    deadline = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    scorer = int(pid_file.read_text())
    while (
        Path(f"/proc/{scorer}/stat").exists() and Path(f"/proc/{scorer}/stat").read_text().split()[2] != "Z"
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
