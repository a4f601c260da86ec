"""The local launcher with real processes: success, every way to fail, and nothing left behind."""

from __future__ import annotations

import os
import signal
import time

import pytest
from support import listening

from moesys.errors import LaunchError
from moesys.launchers.failure import WorkerError
from moesys.launchers.local import LocalWorkers, culprit
from moesys.launchers.processes import Ended
from moesys.launchers.spec import RunSpec


def test_a_run_ends_with_its_summary(launched):
    run = launched("local", 4, "launch.env={FROM_LAUNCH_ENV: yes please}", NCCL_DEBUG="WARN", UNRELATED="too")
    code, out, err = run.finish()
    assert (code, err) == (0, "")
    assert "starting 4 workers" in out and "hello from rank 0" in out and "hello from rank 1" not in out
    assert "step 5/5  loss 1.0000  tokens/s 1,234  left 1:05" in out
    assert "held-out loss" in out and "1.2500" in out and "unigram" in out
    seen = run.seen()
    assert [worker["RANK"] for worker in seen] == ["0", "1", "2", "3"]
    assert [worker["LOCAL_RANK"] for worker in seen] == ["0", "1", "2", "3"]
    assert {worker["WORLD_SIZE"] for worker in seen} == {worker["LOCAL_WORLD_SIZE"] for worker in seen} == {"4"}
    assert {worker["FROM_LAUNCH_ENV"] for worker in seen} == {"yes please"}
    assert {worker["NCCL_DEBUG"] for worker in seen} == {"WARN"}
    assert {worker["CUDA_VISIBLE_DEVICES"] for worker in seen} == {""}
    assert (run.run_dir / "logs" / "rank-3.log").read_text() == "hello from rank 3\n"


def test_the_first_error_is_shown_once_and_its_code_returned(launched):
    run = launched("local", 4, MOESYS_TOY="fail")
    code, out, err = run.finish()
    assert code == 2
    assert err.startswith("moesys: rank 1 (pid ") and err.count("the corpus is empty") == 1
    assert "Traceback" not in out + err
    assert not run.alive()


def test_a_silent_exit_is_told_with_the_end_of_the_log(launched):
    code, _, err = launched("local", 2, MOESYS_TOY="quit").finish()
    assert code == 7
    assert "exited with code 7" in err and "  hello from rank 1" in err


def test_sigkill_of_a_worker_ends_the_run(launched):
    run = launched("local", 4, MOESYS_TOY="wait")
    pids = run.wait_until_training()
    os.kill(pids[2], signal.SIGKILL)
    begin = time.monotonic()
    code, _, err = run.finish()
    assert time.monotonic() - begin < 5
    assert code == 128 + signal.SIGKILL
    assert err.startswith(f"moesys: rank 2 (pid {pids[2]}, node {os.uname().nodename}) was killed by SIGKILL")
    assert not run.alive()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_stops_all_workers(launched, number):
    run = launched("local", 2, MOESYS_TOY="wait")
    run.wait_until_training()
    run.process.send_signal(number)
    code, _, err = run.finish()
    assert code == 130
    assert err == f"moesys: stopped by {number.name}\n"
    assert not run.alive()


def test_workers_deaf_to_sigterm_are_killed(launched):
    run = launched("local", 2, MOESYS_TOY="stubborn")
    run.wait_until_training()
    run.process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    assert run.finish()[0] == 130
    assert 4 < time.monotonic() - begin < 9
    assert not run.alive()


def test_workers_die_with_a_killed_driver(launched):
    run = launched("local", 2, MOESYS_TOY="wait")
    pids = run.wait_until_training()
    assert listening(pids).keys() == {"127.0.0.1"}
    run.process.kill()
    run.wait_until_gone(pids, timeout=5)


def test_several_nodes_are_refused(config, tmp_path):
    spec = RunSpec.of(config(cluster={"nodes": 2, "ranks_per_node": 2}), tmp_path)
    with pytest.raises(LaunchError, match=r"cluster\.nodes is 2, but the local launcher runs on this machine alone"):
        LocalWorkers(spec).start(print)


KILLED, ABORTED, FAILED = Ended(137, signal.SIGKILL), Ended(134, signal.SIGABRT), Ended(1)
LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40862"


@pytest.mark.parametrize(
    ("ended", "errors", "rank"),
    [
        ({0: FAILED, 2: KILLED}, [(0, LOST)], 2),
        ({0: ABORTED, 1: FAILED}, [(1, "ValueError: no")], 1),
        ({0: ABORTED, 2: KILLED}, [], 2),
        ({0: FAILED, 1: FAILED}, [(0, LOST), (1, "ValueError: no")], 1),
        ({0: FAILED, 1: FAILED}, [(1, "ValueError: no"), (0, "KeyError: 'x'")], 1),
        ({0: FAILED, 1: ABORTED}, [(0, LOST)], 1),
        ({0: FAILED, 1: Ended(7)}, [(0, LOST)], 1),
        ({3: Ended(5)}, [], 3),
        ({3: FAILED}, [(3, LOST)], 3),
    ],
)
def test_the_culprit_is_the_one_that_failed_first(ended, errors, rank):
    written = [WorkerError(number, text, time) for time, (number, text) in enumerate(errors)]
    assert culprit(ended, written) == rank
