"""What workers are told: environment, folders, paths."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import moesys
from moesys.errors import LaunchError
from moesys.launchers import spec
from moesys.train import device

ROOT = str(Path(moesys.__file__).parents[1])


def test_the_callers_variables_travel_and_launch_env_wins(config):
    caller = {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0", "HOME": "/root", "CUDA_VISIBLE_DEVICES": "3"}
    env = spec.worker_environment(config(launch={"env": {"NCCL_DEBUG": "WARN", "MINE": "1"}}), caller)
    assert env["NCCL_DEBUG"] == "WARN" and env["GLOO_SOCKET_IFNAME"] == "eth0" and env["MINE"] == "1"
    assert "HOME" not in env and "CUDA_VISIBLE_DEVICES" not in env


def test_logs_are_utf8_whatever_the_terminal_is(config):
    env = spec.worker_environment(config(), {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (env["PYTHONIOENCODING"], env["PYTHONUTF8"]) == ("utf-8:backslashreplace", "1")


@pytest.mark.parametrize(
    ("launch", "caller", "threads"),
    [
        ({"threads": 3}, {"OMP_NUM_THREADS": "5"}, "3"),
        ({"threads": 3, "env": {"OMP_NUM_THREADS": "7"}}, {}, "7"),
        ({}, {"OMP_NUM_THREADS": "5"}, "5"),
        ({}, {}, str(max(1, len(os.sched_getaffinity(0)) // 2))),
    ],
)
def test_threads(config, launch, caller, threads):
    made = config(launch=launch, cluster={"ranks_per_node": 2})
    assert spec.worker_environment(made, caller)["OMP_NUM_THREADS"] == threads


def test_every_worker_has_a_thread():
    assert [spec.default_threads(cores, 4) for cores in (2, 4, 9, 64)] == [1, 1, 2, 16]


def test_the_package_can_be_imported_from_a_checkout():
    assert spec.python_path("") == ROOT
    assert spec.python_path("/a:/b") == os.pathsep.join([ROOT, "/a", "/b"])
    assert spec.python_path(f"/a:{ROOT}") == f"/a:{ROOT}"


def test_paths_become_absolute(config, tmp_path):
    (tmp_path / "local").mkdir()
    data = {"kind": "text", "path": "corpus", "tokenizer": "t.json", "cache": "/c"}
    base = config(data=data, output={"runs": "r"}, train={"init": "released"})
    made = spec.with_absolute_paths(base, tmp_path)
    assert made.data.path == f"{tmp_path}/corpus" and made.data.tokenizer == f"{tmp_path}/t.json"
    assert made.train.init == f"{tmp_path}/released"
    assert made.data.cache == "/c" and made.output.runs == f"{tmp_path}/r"
    for path, expected in (("wikitext", "wikitext"), ("local", f"{tmp_path}/local")):
        hub = config(data={"kind": "huggingface", "path": path})
        assert spec.with_absolute_paths(hub, tmp_path).data.path == expected
    assert spec.with_absolute_paths(config(), tmp_path).data == config().data


def test_a_spec_counts_all_ranks(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = spec.RunSpec.of(config(name="mine", cluster={"nodes": 2, "ranks_per_node": 8}))
    assert made.world == 16 and made.run_dir == tmp_path / "runs" / "mine"


def test_gpus_are_counted_without_torch(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidia11", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    for visible, count in ((None, 3), ("0,1", 2), ("", 0), ("-1", 0), ("0,1,2,3", 3)):
        env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        assert device.visible_gpus(env, tmp_path) == count


@pytest.mark.parametrize(
    ("wanted", "gpus", "chosen"),
    [("auto", [8, 8], "cuda"), ("auto", [8, 4], "cpu"), ("auto", [0, 0], "cpu"), ("cpu", [8, 8], "cpu")],
)
def test_a_gpu_is_never_shared(config, wanted, gpus, chosen):
    cluster = config(cluster={"nodes": 2, "ranks_per_node": 8, "device": wanted}).cluster
    assert device.choose(cluster, gpus, 8, "here") == chosen


def test_too_few_gpus_are_told_in_numbers(config):
    cluster = config(cluster={"nodes": 2, "ranks_per_node": 8, "device": "cuda"}).cluster
    with pytest.raises(LaunchError) as error:
        device.choose(cluster, [4, 8, 4], 8, "the Ray cluster at head:6379")
    assert "the run needs 16 GPUs on 2 nodes of 8; the Ray cluster at head:6379 has " in str(error.value)
    assert "has 1 node with 8 GPUs and 2 nodes with 4 GPUs" in str(error.value)
