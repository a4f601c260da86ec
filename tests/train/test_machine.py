"""Where proofs and benchmarks run: on one kind of device, in as many processes as the machine carries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import changed

from moesys.config import Config
from moesys.errors import LaunchError, MoesysError
from moesys.train import device, machine, native, spawn


@pytest.fixture
def config(small: dict):
    return lambda *changes: Config.model_validate(changed(small, {"cluster": {"device": "auto"}}, *changes))


@pytest.mark.parametrize(
    ("wanted", "gpus", "world", "kind", "word"),
    [
        ("auto", 0, 4, "cpu", ""),
        ("auto", 4, 4, "cuda", ""),
        ("auto", 1, 4, "cpu", "4 processes on the CPU: this machine has 1 GPU, and none is shared"),
        ("cpu", 8, 4, "cpu", ""),
        ("cuda", 8, 4, "cuda", ""),
    ],
)
def test_all_processes_of_a_proof_get_one_kind_of_device(config, wanted, gpus, world, kind, word):
    one = config({"cluster": {"device": wanted, "nodes": 2, "ranks_per_node": 2}})
    found, said = device.placed(one, world, gpus)
    assert (found.cluster.device, said) == (kind, word)
    assert found.cluster.nodes == 2, "the layout stays"


def test_too_few_gpus_for_a_proof_are_told(config):
    with pytest.raises(
        LaunchError, match=r"needs 4 GPUs on 1 node of 4; this machine has 1 node with 2 GPUs\n    remedy"
    ):
        device.placed(config({"cluster": {"device": "cuda"}}), 4, 2)


def test_the_word_is_said_before_anything_starts(config, monkeypatch, capsys):
    monkeypatch.setattr(device, "visible_gpus", lambda: 1)
    found = spawn.resolve_device(config({"cluster": {"ranks_per_node": 2}}), 2, "verify")
    assert found.cluster.device == "cpu"
    assert capsys.readouterr().out.startswith("verify: 2 processes on the CPU: this machine has 1 GPU")


def test_gpu_tensors_over_gloo_are_refused(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(
            MoesysError, match=r"compute on GPUs, and their process group is of gloo.*\n    remedy: set"
        ):
            native.join_process_group(config({"cluster": {"device": "cuda"}}))
    finally:
        dist.destroy_process_group()


def test_worlds_that_memory_cannot_carry_are_refused_with_the_arithmetic(config, monkeypatch):
    one = config({"cluster": {"ranks_per_node": 8}, "parallel": {"ep": 2}})
    monkeypatch.setattr(machine, "available", lambda: 8 * machine.PROCESS)
    each = machine.on_host(one, 8)
    assert 0 < each < 2**24
    with pytest.raises(LaunchError) as error:
        machine.demand(one, 8, "verify")
    assert "verify would start 8 processes here of 0.2 GiB and 0.0 GiB of model each, 2.0 GiB in all" in str(
        error.value
    )
    assert "this machine has 2.0 GiB to give\n    remedy: use fewer ranks" in str(error.value)
    monkeypatch.setattr(machine, "available", lambda: round(8 * (machine.PROCESS + each)) + 1)
    machine.demand(one, 8, "verify")


def test_a_model_that_is_too_large_is_refused(config, monkeypatch):
    monkeypatch.setattr(machine, "available", lambda: 16 * 2**30)
    large = config({"model": {"hidden": 4096, "layers": 48, "attention": {"heads": 32, "kv_heads": 8}}})
    with pytest.raises(LaunchError, match=r"1 process here of 0\.2 GiB and \d\d\.\d GiB of model each"):
        machine.demand(large, 1, "verify")
    on_gpu = large.model_copy(update={"cluster": large.cluster.model_copy(update={"device": "cuda"})})
    machine.demand(on_gpu, 1, "verify")


def test_a_thousand_processes_are_refused(config, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with pytest.raises(LaunchError, match=r"verify would start 1,024 processes here: at most 32 share each of 2 cores"):
        machine.demand(config(), 1024, "verify")


def test_what_the_machine_and_the_container_give(tmp_path: Path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    3000 kB\n")
    assert machine.available(meminfo, tmp_path / "none") == 3000 * 1024
    (tmp_path / "memory.max").write_text("2000000\n")
    (tmp_path / "memory.current").write_text("500000\n")
    assert machine.available(meminfo, tmp_path) == 1_500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available(meminfo, tmp_path) == 3000 * 1024
    assert machine.available(tmp_path / "none", tmp_path / "none") is None
