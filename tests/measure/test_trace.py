"""Traces of torch's profiler: made by hand, whose intervals are known, and a real one. Times in microseconds."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moesys.measure.explain import explain
from moesys.measure.report import perfetto
from moesys.measure.report.trace import page_of
from moesys.measure.step import Step
from moesys.measure.trace import TraceError, kind_of, purpose_of, read


def kernel(name: str, begin: float, end: float, **facts) -> dict:
    return {
        "ph": "X",
        "cat": "kernel",
        "name": name,
        "ts": begin,
        "dur": end - begin,
        "pid": 0,
        "tid": 7,
        "args": facts,
    }


def nccl(collective: str, begin: float, end: float, group: str = "", ranks: str = "[0, 1]", elements: int = 10) -> dict:
    facts = {"Collective name": collective, "Process Group Ranks": ranks, "Process Group Description": group}
    return kernel("ncclDevKernel_SendRecv(x)", begin, end, **facts, **{"In msg nelems": elements, "dtype": "BFloat16"})


def annotation(number: int, begin: float, end: float) -> dict:
    name = f"ProfilerStep#{number}"
    return {"ph": "X", "cat": "gpu_user_annotation", "name": name, "ts": begin, "dur": end - begin, "pid": 0, "tid": 7}


def write(path: Path, rank: int, events: list[dict], base: int | None = 10**9) -> Path:
    told = {"traceEvents": events, "distributedInfo": {"backend": "nccl", "rank": rank, "world_size": 2}}
    text = json.dumps(told | ({} if base is None else {"baseTimeNanoseconds": base})).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def test_one_gpu_trace_is_taken_apart_exactly(tmp_path: Path) -> None:
    """Of 1000: compute 0–400 and 500–700; all-to-all 300–500; gradients 650–800; nothing after that."""
    events = [
        annotation(3, 0, 1000),
        kernel("gemm", 0, 400),
        nccl("all_to_allv", 300, 500),
        kernel("gemm", 500, 700),
        nccl("allreduce", 650, 800, "dp_group"),
    ]
    e = explain(read([write(tmp_path / "trace.json", 0, events)]))
    assert e.steps == [3]
    assert e.total.step == pytest.approx(1000e-6)
    assert e.total.parts == pytest.approx(
        {
            "compute": 600e-6,
            "exposed all-to-all": 100e-6,
            "data communication": 100e-6,
            "pipeline bubble": 0.0,
            "idle": 200e-6,
        }
    )
    assert e.total.hidden == pytest.approx(100e-6)
    assert e.causes.transfer == pytest.approx(200e-6)


def test_of_several_ranks_the_late_one_is_found(tmp_path: Path) -> None:
    """Rank 1's clock began 50 µs later, and it came 300 µs late."""
    first = [annotation(1, 0, 900), kernel("gemm", 0, 100), nccl("all_to_all", 100, 500)]
    second = [annotation(1, -50, 850), kernel("gemm", -50, 350), nccl("all_to_all", 350, 450)]
    paths = [write(tmp_path / "a.json.gz", 0, first), write(tmp_path / "b.json", 1, second, 10**9 + 50_000)]
    e = explain(read(paths))
    assert e.by_rank[0].exposed == pytest.approx(400e-6)
    assert e.waited_for[1] == pytest.approx(300e-6 / 2)
    assert e.causes.late == pytest.approx(300e-6 / 2)
    assert e.causes.transfer == pytest.approx((100e-6 + 100e-6) / 2)
    assert "rank 1" in e.sentence
    assert "All-to-all is" in page_of(e, paths)


def test_clocks_that_cannot_be_compared_tell_no_waits(tmp_path: Path) -> None:
    events = [annotation(1, 0, 900), nccl("all_to_all", 100, 500)]
    told: list[str] = []
    paths = [write(tmp_path / f"{rank}.json", rank, events, None) for rank in (0, 1)]
    e = explain(read(paths, told.append))
    assert e.causes.late == 0
    assert any("baseTimeNanoseconds" in line for line in told)


@pytest.mark.parametrize(
    ("name", "facts", "kind", "purpose"),
    [
        ("void deep_ep::intranode::dispatch<8, 768>(x)", {}, "", "expert"),
        ("void deep_ep::internode_ll::combine<7168>(x)", {}, "", "expert"),
        ("void deep_ep::internode::notify_dispatch<false>(x)", {}, "", "expert"),
        ("ncclDevKernel_AllGather_RING_LL(x)", {"Process Group Description": "mesh_dp_shard"}, "all_gather", "data"),
        (
            "ncclDevKernel_AllGather_RING_LL(x)",
            {"Process Group Description": "EXPERT_MODEL_PARALLEL_GROUP"},
            "all_gather",
            "expert",
        ),
        ("ncclDevKernel_ReduceScatter(x)", {"Process Group Description": "mesh_tp"}, "reduce_scatter", "tensor"),
        ("ncclDevKernel_SendRecv(x)", {"Collective name": "all_to_allv"}, "all_to_all", "expert"),
        ("ncclDevKernel_SendRecv(x)", {"Collective name": "send"}, "send", "pipeline"),
        ("ncclKernel_AllReduce_RING_LL_Sum_float(x)", {}, "all_reduce", "data"),
    ],
)
def test_kernels_are_told_apart(name: str, facts: dict, kind: str, purpose: str) -> None:
    assert kind_of(name, facts) == kind
    assert purpose_of(kind, name, facts) == purpose


def test_what_is_no_trace_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(TraceError, match="No such file"):
        read([path])
    path.write_text("{")
    with pytest.raises(TraceError, match="no JSON trace"):
        read([path])
    with pytest.raises(TraceError, match="holds no kernels"):
        read([write(path, 0, [annotation(1, 0, 5)])])
    same = [write(tmp_path / f"{i}.json", 0, [kernel("gemm", 0, 1)]) for i in (1, 2)]
    with pytest.raises(TraceError, match="two of the traces are of rank 0"):
        read(same)


REAL = """
import sys, torch, torch.distributed as dist
from torch.profiler import profile, record_function
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
x, out = torch.randn(512, 512), torch.empty(512, 512)
with profile() as profiler:
    for number in range(2):
        with record_function(f"ProfilerStep#{number}"):
            x = x @ x
            dist.all_to_all_single(out, x)
profiler.export_chrome_trace(sys.argv[1])
"""


def test_a_real_trace_of_this_machine(tmp_path: Path) -> None:
    """A gloo group of one process: what torch writes today is read."""
    path = tmp_path / "trace.json"
    subprocess.run([sys.executable, "-c", REAL, str(path)], check=True, capture_output=True)
    steps = read([path])
    assert [step.number for step in steps] == [0, 1]
    total = explain(steps).total
    assert total.compute > 0
    assert sum(total.parts.values()) == pytest.approx(total.step)
    assert any(t.kind == "all_to_all" and t.purpose == "expert" for step in steps for t in step.ranks[0].travels)


def test_perfetto_shows_what_was_recorded(tmp_path: Path) -> None:
    first = [annotation(1, 0, 900), kernel("gemm", 0, 100), nccl("all_to_all", 100, 500)]
    second = [annotation(1, 0, 900), kernel("gemm", 0, 400), nccl("all_to_all", 400, 500)]
    steps: list[Step] = read([write(tmp_path / f"{i}.json", i, events) for i, events in enumerate((first, second))])
    path = tmp_path / "out.json.gz"
    perfetto.write(steps, path)
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"rank 0 · ", "rank 1 · "}
    computed = {e["pid"]: e["dur"] for e in spans if e["name"] == "compute"}
    assert computed == {0: pytest.approx(100), 1: pytest.approx(400)}
    moved = {e["pid"]: e for e in spans if e["tid"] == 1}
    assert moved[0]["dur"] == pytest.approx(400)
    assert moved[0]["args"]["late ms"] == pytest.approx(0.3)
    assert moved[1]["args"]["late ms"] == pytest.approx(0)
