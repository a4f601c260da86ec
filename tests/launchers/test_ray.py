"""The Ray launcher with real Ray: few starts, because each takes many seconds.

Two runs on a simulated cluster of two nodes, one of them refused; on an embedded Ray one that fails twice, one
whose worker is killed, one that is interrupted and one whose driver is killed.
"""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from ray.train import ControllerError, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from support import listening

from moesys.errors import LaunchError
from moesys.launchers import outcome, ray_cluster, ray_placement, ray_trainer
from moesys.launchers.address import ray_address
from moesys.launchers.lock import locked
from moesys.launchers.ray import RayWorkers
from moesys.launchers.ray_cluster import Node
from moesys.launchers.ray_errors import outcome_of
from moesys.launchers.spec import RunSpec
from moesys.train.failure import Failure, FailureKind


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The address of a cluster of two nodes that asks for a token, and the file that holds it."""
    token = tmp_path / "token"
    token.write_text("0123456789" * 4)
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    for _ in range(3):  # Ray gives a node that starts 30 seconds, which a busy machine exceeds
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("cluster.py"))],
            env={**os.environ, **settings}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        lines = iter(process.stdout.readline, "")
        if address := next((line.split()[-1] for line in lines if ":" in line), ""):
            break
    assert address, "the cluster did not start"
    yield address, str(token)
    process.communicate()


def test_ranks_lie_on_their_nodes_with_their_environment(launched, cluster, tmp_path):
    """Left to itself Ray would pack all four workers on one node. The cluster asks for a token."""
    address, token = cluster
    stranger = launched("ray", 2, f"launch.ray_address={address}", RAY_AUTH_TOKEN_PATH="/nowhere", HOME=str(tmp_path))
    code, _, err = stranger.finish()
    assert code == 1 and "InvalidAuthToken" not in err
    assert err.startswith(f"moesys: the Ray cluster at {address} asks for a token, and RAY_AUTH_MODE is not set\n")
    assert "    remedy: export RAY_AUTH_MODE=token, with the cluster's token in RAY_AUTH_TOKEN or in ~/.ray" in err
    settings = [f"launch.ray_address={address}", "cluster.nodes=2", "launch.env={FROM_LAUNCH_ENV: yes please}"]
    settings += ["data.kind=text", "data.path=corpus"]
    run = launched("ray", 2, *settings, NCCL_DEBUG="WARN", UNRELATED="too", RAY_AUTH_TOKEN_PATH=token)
    code, out, err = run.finish()
    assert (code, err) == (0, "")
    assert "starting Ray …" in out and "starting 4 workers …" in out
    assert "hello from rank 0" in out and "hello from rank 1" not in out
    assert "step 5/5  loss 1.0000" in out and "held-out loss" in out
    seen = run.seen()
    assert [worker["RANK"] for worker in seen] == ["0", "1", "2", "3"]
    assert {worker["WORLD_SIZE"] for worker in seen} == {"4"}
    nodes = [worker["node"] for worker in seen]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    assert {worker["FROM_LAUNCH_ENV"] for worker in seen} == {"yes please"}
    assert {worker["NCCL_DEBUG"] for worker in seen} == {"WARN"}
    assert all(worker["MOESYS_NODE_IP"] == worker["MASTER_ADDR"] for worker in seen)
    assert {worker["UNRELATED"] for worker in seen} == {None}
    assert {worker["OMP_NUM_THREADS"] for worker in seen} == {"4"}
    assert {worker["cwd"] for worker in seen} == {os.getcwd()}
    assert {worker["path"] for worker in seen} == {f"{os.getcwd()}/corpus"}
    assert (run.run_dir / "logs" / "rank-3.log").read_text().endswith("hello from rank 3\n")
    assert not run.alive() and not (run.run_dir / "ray").exists()


def test_a_failing_worker_is_restarted_then_its_error_shown_once(launched):
    run = launched("ray", 2, "launch.max_failures=1", MOESYS_TOY="fail", TORCHELASTIC_USE_AGENT_STORE="True")
    code, out, err = run.finish()
    assert code == 2
    assert err.startswith("moesys: rank 1 (pid ") and " failed:\nthe corpus is empty\n" in err
    assert "Traceback" not in out + err and "ray." not in err
    log = (run.run_dir / "logs" / "rank-1.log").read_text()
    assert log.count("hello from rank 1") == 2 and "=== attempt 1, " in log and "=== attempt 2, " in log
    assert not run.alive()


def folder_of(processes: dict[int, str]) -> Path:
    """The temporary folder of the Ray that these processes, by their command lines, are."""
    (folder,) = set(re.findall(r"/tmp/moesys-\d+/ray-\w+", " ".join(processes.values())))
    return Path(folder)


def test_sigkill_of_a_worker_ends_the_run_that_nobody_could_reach_or_read(launched):
    settings = "launch.env={MY_PASSWORD: hunter2, PLAIN: shown}"
    run = launched("ray", 2, settings, MOESYS_TOY="wait", HF_TOKEN="hunter3", WANDB_API_KEY="hunter4")
    pids = run.wait_until_training()
    assert {worker["GLOO_SOCKET_IFNAME"] for worker in run.seen()} == {"lo"}
    assert {worker["HF_TOKEN"] for worker in run.seen()} == {"hunter3"}
    processes = run.descendants()
    found = listening([run.process.pid, *processes])
    assert found.keys() == {"127.0.0.1"} and len(found["127.0.0.1"]) > 5
    folder = folder_of(processes)
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    (token,) = {token_of(pid) for pid in processes} - {""}
    written = [path for path in folder.rglob("*") if path.is_file()]
    text = b"".join(path.read_bytes() for path in written)
    assert b"PLAIN" in text and b"hunter" not in text and len(token) > 30 and token.encode() not in text
    assert "hunter" not in " ".join(processes.values())
    os.kill(pids[1], signal.SIGKILL)
    code, out, err = run.finish()
    assert code == 1
    assert err.startswith(f"moesys: rank 1 (pid {pids[1]}, node {os.uname().nodename}) died: its process was killed")
    assert "Traceback" not in out + err and "raylet" not in out + err
    assert not run.alive()


def test_ctrl_c_leaves_nothing(launched):
    run = launched("ray", 2, MOESYS_TOY="wait")
    run.wait_until_training()
    processes = run.descendants()
    folder = folder_of(processes)
    assert len(processes) > 5 and folder.is_dir()
    run.process.send_signal(signal.SIGINT)
    code, _, err = run.finish()
    assert code == 130 and err.startswith("moesys: stopped by SIGINT\nthe run got to step ")
    run.wait_until_gone(processes)
    assert not folder.exists()


def test_the_next_start_removes_what_a_killed_driver_left(launched, tmp_path):
    run = launched("ray", 2, MOESYS_TOY="wait")
    run.wait_until_training()
    processes = run.descendants()
    folder = folder_of(processes)
    run.process.kill()
    run.process.wait()
    assert folder.is_dir()
    with locked(tmp_path / "another"):
        assert not folder.exists() and not (run.run_dir / "ray").exists()
    run.wait_until_gone(processes)


def token_of(pid: int) -> str:
    """The token in a process's environment, "" if it has none or is gone."""
    with suppress(OSError):
        found = re.search(rb"RAY_AUTH_TOKEN=([^\0]*)", Path(f"/proc/{pid}/environ").read_bytes())
        return found[1].decode() if found else ""
    return ""


def test_a_missing_ray_is_told_with_its_remedy(config, tmp_path, monkeypatch):
    for module in ("ray", "moesys.launchers.ray_cluster"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("moesys.launchers.ray_cluster")
    monkeypatch.setattr("sys.path", [path for path in sys.path if "site-packages" not in path])
    with pytest.raises(LaunchError, match=r"Ray is not installed \(No module named 'ray'\)\n    remedy: pip install"):
        RayWorkers(RunSpec.of(config(), tmp_path)).start(print)


def test_no_cluster_is_told_at_once(launched):
    code, _, err = launched("ray", 2, "launch.ray_address=127.0.0.1:9").finish()
    assert code == 1 and err.startswith("moesys: no Ray cluster answers at 127.0.0.1:9: ")


def test_what_ray_says_while_it_fails_to_start_is_in_a_log(config, tmp_path, monkeypatch, capfd):
    attempts = []

    def init(**settings):
        attempts.append(settings["_temp_dir"])
        dying = threading.Thread(target=lambda: 1 / 0)
        dying.start()
        dying.join()
        os.write(2, b"[2026-11-27] gcs_client.cc:210: InvalidAuthToken\n")
        os.write(1, b"You have likely discovered a bug in Ray. Please report this issue at https://github.com\n")
        raise RuntimeError("The current node timed out during startup.\nPlease report this at https://github.com/ray")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(ray_cluster, "import_slow_libraries", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    workers = RayWorkers(RunSpec.of(config(), tmp_path))
    before = dict(os.environ), threading.excepthook
    with pytest.raises(LaunchError) as error:
        workers.start(lambda phase: None)
    workers.stop()
    assert str(error.value).startswith(
        "Ray could not be started on this machine: The current node timed out during startup.\n    remedy: try again"
    )
    assert capfd.readouterr() == ("", "") and len(attempts) == 3
    log = (tmp_path / "logs" / "ray.log").read_text()
    assert "ZeroDivisionError" in log and "InvalidAuthToken" in log and "likely discovered a bug" in log
    assert (dict(os.environ), threading.excepthook) == before


def test_several_nodes_need_an_address(config, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    workers = RayWorkers(RunSpec.of(config(cluster={"nodes": 2}), tmp_path))
    with pytest.raises(LaunchError, match=r"cluster\.nodes is 2, but Ray would be started on this machine alone"):
        workers.start(print)
    workers.stop()


@pytest.mark.parametrize(
    ("configured", "env", "address"),
    [
        ("head:6379", {"RAY_ADDRESS": "other:6379"}, "head:6379"),
        (None, {"RAY_ADDRESS": "other:6379"}, "other:6379"),
        (None, {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "auto"),
        (None, {}, None),
    ],
)
def test_the_cluster_is_the_one_asked_for(configured, env, address):
    assert ray_address(configured, env) == address


def test_ray_client_is_refused():
    with pytest.raises(LaunchError, match="Ray Client"):
        ray_cluster.check_reachable("ray://head:10001")


def nodes(*sizes: tuple[float, int], busy: tuple[int, ...] = ()) -> list[Node]:
    return [Node(f"n{i}", f"10.0.0.{i}", cpus, gpus, i not in busy) for i, (cpus, gpus) in enumerate(sizes)]


def test_ranks_are_pinned_to_free_nodes_in_order(config):
    made = config(cluster={"nodes": 2, "ranks_per_node": 2, "device": "cuda"})
    placement = ray_placement.choose(made, 4, nodes((8, 2), (8, 0), (8, 2), (8, 4), busy=(0,)), "here")
    assert [label["ray.io/node-id"] for label in placement.labels] == ["n2", "n2", "n3", "n3"]
    assert placement.resources == {"CPU": 1.0, "GPU": 1.0} and placement.device == "cuda"


def test_more_workers_than_cores_share_them(config):
    made = config(cluster={"ranks_per_node": 4})
    placement = ray_placement.choose(made, 4, nodes((2, 0)), "here")
    assert placement.resources == {"CPU": 0.5} and placement.labels is None
    assert placement.strategy == "STRICT_PACK" and placement.cores == 2


def test_restarts_leave_ranks_free(config):
    made = config(cluster={"nodes": 2, "ranks_per_node": 2}, launch={"max_failures": 1})
    placement = ray_placement.choose(made, 4, nodes((2, 0), (2, 0), (2, 0)), "here")
    assert placement.labels is None and placement.strategy == "PACK"


def test_too_few_nodes_are_told_in_numbers(config):
    made = config(cluster={"nodes": 3, "ranks_per_node": 2})
    with pytest.raises(
        LaunchError, match=r"needs 3 nodes for 2 ranks each; the Ray cluster at h:1 has 1 node with CPUs"
    ):
        ray_placement.choose(made, 6, nodes((0, 0), (4, 0)), "the Ray cluster at h:1")


def raised(failure: Failure) -> RuntimeError:
    """What a worker's failure reaches the driver as."""
    return RuntimeError(failure.text, failure.json)


def test_a_death_comes_before_the_errors_it_caused(tmp_path):
    lost = raised(Failure(0, FailureKind.LOST, "Connection closed by peer"))
    error = WorkerGroupError("", {0: lost, 1: ValueError("Worker info: hostname='gpu-3', pid=17")})
    found = outcome_of(error, tmp_path, "here", 60.0)
    assert found.message.startswith("rank 1 (pid 17, node gpu-3) died: ")


def test_of_several_errors_the_first_is_shown(tmp_path):
    failures = [Failure(0, FailureKind.USER, "first", exit_code=3, at=1), Failure(1, FailureKind.USER, "second", at=2)]
    error = WorkerGroupError("", {one.rank: raised(one) for one in failures})
    assert outcome_of(error, tmp_path, "here", 60.0) == outcome.Outcome(3, "rank 0 failed:\nfirst", FailureKind.USER)


def test_rays_own_failures_are_told_in_a_line(tmp_path):
    found = outcome_of(ControllerError(OSError("disk full")), tmp_path, "here", 60.0)
    assert found == outcome.Outcome(1, "Ray failed: OSError: disk full")


def test_no_autoscaler_is_asked_for_nodes(monkeypatch):
    """That would be a process more, which Ray Train waits for."""
    monkeypatch.setattr(TorchTrainer, "_initialize_and_run_controller", lambda self, **arguments: arguments)
    trainer = object.__new__(ray_trainer.LeanTorchTrainer)
    given = FixedScalingPolicy(ScalingConfig(num_workers=3))
    policy = trainer._initialize_and_run_controller(scaling_policy=given)["scaling_policy"]
    policy.after_controller_start(None)
    policy.before_controller_abort()
    assert policy._coordinator_client is None
    assert policy.make_decision_for_non_running_worker_group().num_workers == 3
