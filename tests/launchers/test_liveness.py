"""The rank that does not answer, found by the signs of life of all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from moesys.files import json_objects, write_json
from moesys.launchers.liveness import LivenessMonitor
from moesys.launchers.outcome import Outcome
from moesys.train import heartbeat
from moesys.train.failure import FailureKind

TIMEOUT = Outcome(1, "rank 0 failed: waited", FailureKind.TIMEOUT)


class Run:
    """Signs of four ranks that wait 100 s for each other, and a clock that is set."""

    def __init__(self, run_dir: Path):
        self.now, self.run_dir = 0.0, run_dir
        self.monitor = LivenessMonitor(run_dir, 4, 100.0, lambda: self.now)

    def sign(self, *ranks: int, **said: Any) -> None:
        for rank in ranks:
            path = heartbeat.heartbeat_file(self.run_dir, rank)
            path.parent.mkdir(exist_ok=True)
            facts = {"rank": rank, "pid": 4711 + rank, "host": f"gpu-{rank}", "step": 7, "at": "training", "where": "w"}
            write_json(path, facts | {"waits": True, "count": self.now} | said, indent=None)

    def at(self, seconds: float) -> list[str]:
        self.now = seconds
        return self.monitor.poll()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def live(run: Run, *ranks: int, until: int, **said: Any) -> list[str]:
    """These ranks give signs every ten seconds until then."""
    news = []
    for second in range(10, until + 1, 10):
        run.now = second
        run.sign(*ranks, **said)
        news += run.at(second)
    return news


def test_a_rank_that_has_done_its_part_is_not_missed(run):
    """While rank 0 writes the report."""
    run.sign(1, 2, 3, ended=True)
    assert live(run, 0, until=100, at="writing the report") == []


def test_a_rank_without_signs_is_told_of_once_and_then_blamed(run):
    run.sign(0, 1, 2, 3, at="saving a checkpoint")
    assert run.at(0) == []
    (news,) = live(run, 0, 1, 3, until=100)
    assert news == "rank 2 (pid 4713, node gpu-2) has not answered for 30 s, since step 7, saving a checkpoint, w"
    told = run.monitor.explain(TIMEOUT)
    assert told.message == (
        "rank 2 (pid 4713, node gpu-2) does not answer since step 7, saving a checkpoint, w; "
        "the other ranks waited 100 s for it (launch.timeout_s)"
    )
    assert told.exit_code == 1 and run.monitor.explain(Outcome(1, "", FailureKind.LOST)).message == told.message


def test_a_rank_that_runs_and_is_elsewhere_did_not_come(run):
    run.sign(3, waits=False, where="moesys/data/samples.py:5 in read")
    run.at(0)
    live(run, 0, 1, 2, until=50)
    run.now = 60
    run.sign(3, waits=False, where="moesys/data/samples.py:5 in read")
    run.at(60)
    live(run, 0, 1, 2, until=100)
    message = run.monitor.explain(TIMEOUT).message
    assert message.startswith("rank 3 (pid 4714, node gpu-3) did not come: it was at step 7, moesys/data/samples.py:5")


def test_a_rank_that_never_started_is_named(run):
    live(run, 0, 1, 3, until=100)
    assert run.monitor.explain(TIMEOUT).message.startswith("rank 2 did not start; the other ranks waited 100 s")


def test_where_all_answer_and_wait_the_network_is_suspected(run):
    assert live(run, 0, 1, 2, 3, until=100) == []
    message = run.monitor.explain(TIMEOUT).message
    assert "the network between gpu-0, gpu-1, gpu-2, gpu-3 is cut or too slow" in message
    assert "\n  rank 3: step 7, w" in message


def test_a_pause_of_the_whole_machine_is_nobodys(run):
    live(run, 0, 1, 2, 3, until=10)
    assert run.at(90) == []


@pytest.mark.parametrize(
    "outcome", [Outcome(0), Outcome(2, "no data", FailureKind.USER), Outcome(137, "killed", FailureKind.CRASH)]
)
def test_other_outcomes_stay(run, outcome):
    live(run, 0, 1, until=100)
    assert run.monitor.explain(outcome) is outcome


def test_a_rank_gives_signs_of_where_it_is(tmp_path):
    path = heartbeat.heartbeat_file(tmp_path, 3)
    with heartbeat.Heartbeat(tmp_path, 3):
        heartbeat.step(5)
        heartbeat.phase("saving a checkpoint")
        (said,) = json_objects(path)
    assert said["rank"] == 3 and said["pid"] == os.getpid() and said["step"] == 5 and said["count"] == 2
    assert said["at"] == "saving a checkpoint" and not said["waits"] and not said["shown"]
    assert path.stat().st_size == heartbeat.BYTES
    heartbeat.phase("afterwards")
    assert list(json_objects(path)) == [said | {"count": 3, "ended": True}]
