"""What squeue, scontrol and sacct print, and what we make of it.

Recorded from Slurm 22.05; the variants of 20.11 to 25.05 are written after their documentation and source.
"""

from __future__ import annotations

import pytest

from hpc_rl.cluster.slurm.states import (
    explain,
    parse_sacct,
    parse_scontrol,
    parse_squeue,
    seconds,
    state_of,
    with_restarts,
)

RUNNING = """\
66+1|67|RUNNING|None|ro[1-2]|2026-11-21T01:37:43|9:56|demo:rollout|12/500 0.43
66+0|66|RUNNING|None|tr2|2026-11-21T01:37:43|9:56|demo:policy|12/500 0.43
"""
# Newer versions print nothing, older ones (null), for what is not set.
PENDING = """\
80+0|80|PENDING|Resources||2026-11-21T03:00:00|8:00:00|demo:policy|
80+1|81|PENDING|Priority||2026-11-21T04:30:00|8:00:00|demo:rollout|
"""
PLAIN = "5|5|PENDING|(PartitionTimeLimit)||N/A|2-00:00:00|demo:policy|(null)\n"
SCONTROL_22 = (
    "JobId=6 HetJobId=6 HetJobOffset=0 JobName=demo:policy HetJobIdSet=6-7 UserId=root(0) GroupId=root(0) "
    "MCS_label=N/A Priority=4294901754 Nice=0 Account=a QOS=(null) JobState=COMPLETED Reason=None "
    "Dependency=(null) Requeue=1 Restarts=1 BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:00:43 "
    "StartTime=2026-11-21T01:37:43 EndTime=2026-11-21T01:38:26 Deadline=N/A Comment=12/500 reward 0.4 "
    "ReqNodeList=(null) ExcNodeList=tr1 NodeList=tr2 BatchHost=tr2 NumNodes=1 Power=\n"
    "JobId=7 HetJobId=6 HetJobOffset=1 JobName=demo:rollout HetJobIdSet=6-7 JobState=CANCELLED Reason=None "
    "Restarts=1 ExitCode=0:15 StartTime=2026-11-21T01:37:43 ReqNodeList=(null) ExcNodeList= NodeList=ro1 \n"
)
SCONTROL_20 = (
    "JobId=9 JobName=demo JobState=PENDING Reason=BeginTime Dependency=(null) Requeue=1 Restarts=2 "
    "ExitCode=0:0 StartTime=2021-01-01T00:00:00 NodeList=(null)\n"
)
SACCT_HET = """\
66+0|66|FAILED|tr1|7:0|demo:policy
66+1|67|CANCELLED by 1000|ro[1-2]|0:15|demo:rollout
"""


def test_a_running_het_job() -> None:
    job = parse_squeue(RUNNING)["66"]
    assert job.state == "RUNNING"
    assert [c.id for c in job.components] == ["66", "67"]
    assert [c.name for c in job.components] == ["demo:policy", "demo:rollout"]
    assert job.components[1].nodes == "ro[1-2]"
    assert job.components[0].time_left_s == 596
    assert job.components[0].comment == "12/500 0.43"
    assert job.why == ""


def test_a_pending_het_job_says_why_for_each_component_and_starts_with_the_last() -> None:
    job = parse_squeue(PENDING)["80"]
    assert job.state == "PENDING"
    assert job.why == (
        "demo:policy: waiting for nodes to become free; demo:rollout: jobs of higher priority are ahead"
    )
    assert job.start == "2026-11-21T04:30:00"


def test_a_plain_job_that_can_never_start() -> None:
    job = parse_squeue(PLAIN)["5"]
    assert "never start" in job.why
    assert job.start == ""
    assert job.components[0].comment == ""


def test_between_two_attempts_the_job_waits_although_one_component_still_completes() -> None:
    text = RUNNING.replace("66+1|67|RUNNING|None|ro[1-2]", "66+1|67|PENDING|BeginTime|").replace(
        "66|RUNNING", "66|COMPLETING"
    )
    job = parse_squeue(text)["66"]
    assert job.state == "PENDING"
    assert with_restarts(job, 1).state == "REQUEUED"
    assert with_restarts(job, 0).state == "PENDING"


def test_many_jobs_in_one_answer() -> None:
    assert set(parse_squeue(RUNNING + PENDING + PLAIN)) == {"66", "80", "5"}


def test_lines_that_are_no_jobs_are_ignored() -> None:
    assert parse_squeue("slurm_load_jobs error: x\n\n") == {}


def test_scontrol_of_an_ended_het_job() -> None:
    job = parse_scontrol(SCONTROL_22)["6"]
    assert job.state == "COMPLETED"
    assert job.restarts == 1
    assert [c.state for c in job.components] == ["COMPLETED", "CANCELLED"]
    assert job.components[0].comment == "12/500 reward 0.4"
    assert job.components[0].nodes == "tr2"
    assert job.components[1].exit_code == "0:15"


def test_scontrol_of_a_requeued_plain_job() -> None:
    job = parse_scontrol(SCONTROL_20)["9"]
    assert (job.state, job.restarts) == ("REQUEUED", 2)
    assert "two minutes" in job.why


def test_pack_jobs_are_het_jobs() -> None:
    old = SCONTROL_22.replace("HetJob", "PackJob")
    assert [c.index for c in parse_scontrol(old)["6"].components] == [0, 1]


def test_sacct_of_het_jobs_with_and_without_offset() -> None:
    job = parse_sacct(SACCT_HET)["66"]
    assert job.state == "FAILED"
    assert job.components[0].exit_code == "7:0"
    assert job.components[1].state == "CANCELLED"
    assert (
        parse_sacct("61|61|RUNNING|tr1|0:0|demo\n61.batch|61.batch|RUNNING|tr1|0:0|batch\n")["61"].state
        == "RUNNING"
    )


def test_the_last_attempt_counts_in_sacct() -> None:
    text = "9|9|REQUEUED|tr1|0:0|demo\n9|9|COMPLETED|tr2|0:0|demo\n"
    assert parse_sacct(text)["9"].state == "COMPLETED"


@pytest.mark.parametrize(
    ("slurm", "ours"),
    [
        ("PENDING", "PENDING"),
        ("CONFIGURING", "PENDING"),
        ("COMPLETING", "RUNNING"),
        ("SUSPENDED", "RUNNING"),
        ("REQUEUED", "REQUEUED"),
        ("REQUEUE_HOLD", "REQUEUED"),
        ("CANCELLED by 1000", "CANCELLED"),
        ("CANCELLED+", "CANCELLED"),
        ("COMPLETED", "COMPLETED"),
        ("TIMEOUT", "FAILED"),
        ("NODE_FAIL", "FAILED"),
        ("OUT_OF_MEMORY", "FAILED"),
        ("PREEMPTED", "FAILED"),
        ("SOMETHING_NEW", "FAILED"),
    ],
)
def test_states(slurm: str, ours: str) -> None:
    assert state_of(slurm) == ours


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("QOSMaxJobsPerUserLimit", "limit of your account or qos"),
        ("AssocGrpGRES", "limit of your account or qos"),
        ("ReqNodeNotAvail, UnavailableNodes:tr[1-2]", "UnavailableNodes:tr[1-2]"),
        ("(None)", "backfill"),
        ("", "backfill"),
        ("BrandNewReason", "Slurm says BrandNewReason"),
    ],
)
def test_reasons_in_words(reason: str, words: str) -> None:
    assert words in explain(reason)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1-02:03:04", 93784),
        ("02:03:04", 7384),
        ("9:56", 596),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_durations(text: str, expected: int | None) -> None:
    assert seconds(text) == expected
