"""The local launcher with real processes: success, every way to fail, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
from support import listening

from moesys.errors import LaunchError
from moesys.launchers.local import LocalWorkers
from moesys.launchers.spec import RunSpec

TORCHRUN = {
    "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "x",
    "GROUP_RANK": "3", "ROLE_RANK": "3", "RANK": "3", "WORLD_SIZE": "9", "MASTER_ADDR": "10.255.0.1",
}  # fmt: skip
"""What torchrun tells its processes. A worker that inherits the first waits for a store that nobody starts."""


def test_a_run_ends_with_its_summary(launched):
    run = launched(
        "local", 4, "launch.env={FROM_LAUNCH_ENV: yes please}", NCCL_DEBUG="WARN", UNRELATED="too", **TORCHRUN
    )
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
    head, *rest = (run.run_dir / "logs" / "rank-3.log").read_text().splitlines()
    who = rf"rank 3 of 4, host \S+, pid {seen[3]['pid']}, moesys \S+, torch \S+, Python \S+: \S+python\S* .*toy_worker"
    assert re.match(rf"=== attempt 1, \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC: {who}", head), head
    assert rest == ["hello from rank 3"]


def test_the_first_error_is_shown_once_and_its_code_returned(launched):
    run = launched("local", 4, MOESYS_TOY="fail")
    code, out, err = run.finish()
    assert code == 2
    assert err.startswith("moesys: rank 1 (pid ") and err.count("the corpus is empty") == 1
    assert "Traceback" not in out + err
    assert not run.alive()


def test_sigkill_of_a_worker_ends_the_run(launched):
    run = launched("local", 4, MOESYS_TOY="wait")
    pids = run.wait_until_training()
    os.kill(pids[2], signal.SIGKILL)
    code, _, err = run.finish()
    assert code == 128 + signal.SIGKILL
    assert err.startswith(f"moesys: rank 2 (pid {pids[2]}, node {os.uname().nodename}) was killed by SIGKILL")
    assert not run.alive()


def test_a_stopped_worker_is_named_and_not_those_that_waited_for_it(launched):
    run = launched("local", 3, "launch.timeout_s=10", MOESYS_TOY="wait", MOESYS_TOY_TIMEOUT="10")
    pids = run.wait_until_training()
    os.kill(pids[1], signal.SIGSTOP)
    code, out, err = run.finish()
    who = rf"rank 1 \(pid {pids[1]}, node \S+\)"
    why = rf"it is stopped, by SIGSTOP or Ctrl-Z: `kill -CONT {pids[1]}` lets it go on"
    assert code == 1
    assert re.search(rf"{who} has not answered for \d+ s, since .+: {why}\n", out), out
    waited = r"the other ranks waited 10 s for it \(launch\.timeout_s\)"
    assert re.match(rf"moesys: {who} does not answer since .+: {why}; {waited}\n", err), err
    assert "Traceback" not in out + err
    assert json.loads((run.run_dir / "beats" / "rank-0.json").read_text())["waits"]
    assert not run.alive()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_stops_all_workers(launched, number):
    run = launched("local", 2, MOESYS_TOY="wait")
    run.wait_until_training()
    run.process.send_signal(number)
    code, _, err = run.finish()
    assert code == 130
    stopped, got, go_on = err.splitlines()
    assert stopped == f"moesys: stopped by {number.name}"
    assert re.match(r"the run got to step \d+ of 100; no checkpoint was saved yet: set output\.checkpoint_every", got)
    assert go_on.startswith("    to start again: python ") and "drive.py local" in go_on
    assert not run.alive()


def test_workers_deaf_to_sigterm_are_killed(launched):
    run = launched("local", 2, MOESYS_TOY="stubborn")
    run.wait_until_training()
    run.process.send_signal(signal.SIGINT)
    assert run.finish()[0] == 130
    assert not run.alive()


def test_workers_die_with_a_killed_driver(launched):
    run = launched("local", 2, MOESYS_TOY="wait")
    pids = run.wait_until_training()
    assert listening(pids).keys() == {"127.0.0.1"}
    run.process.kill()
    run.wait_until_gone(pids)


def test_several_nodes_are_refused(config, tmp_path):
    spec = RunSpec.of(config(cluster={"nodes": 2, "ranks_per_node": 2}), tmp_path)
    with pytest.raises(LaunchError, match=r"cluster\.nodes is 2, but the local launcher runs on this machine alone"):
        LocalWorkers(spec).start(print)
