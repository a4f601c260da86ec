"""Traces of torch's profiler: hand-made ones with known intervals, and a real one. Times are in microseconds."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moesys.measure.explain.averages import explain
from moesys.measure.explain.foreign_trace.chrome_json import TraceError
from moesys.measure.explain.foreign_trace.kernels import kind_of, purpose_of
from moesys.measure.explain.foreign_trace.reader import read
from moesys.measure.report import perfetto
from moesys.measure.report.foreign_trace import page_of


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
    content = {"traceEvents": events, "distributedInfo": {"backend": "nccl", "rank": rank, "world_size": 2}}
    text = json.dumps(content | ({} if base is None else {"baseTimeNanoseconds": base})).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def test_one_gpu_trace_is_taken_apart_exactly(tmp_path: Path) -> None:
    """1000 in all: compute 0–400 and 500–700, all-to-all 300–500, gradients 650–800, nothing after that."""
    events = [
        annotation(3, 0, 1000),
        kernel("gemm", 0, 400),
        nccl("all_to_allv", 300, 500),
        kernel("gemm", 500, 700),
        nccl("allreduce", 650, 800, "dp_group"),
    ]
    e = explain(read([write(tmp_path / "trace.json", 0, events)]).steps)
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
    assert e.causes.parts == pytest.approx({"transfer": 0, "late": 0, "uneven": 0, "unattributed": 200e-6})
    assert (
        "The exposed time cannot be divided into waiting and moving bytes: this is the trace of one rank" in e.sentence
    )


def test_of_several_ranks_the_late_one_is_found(tmp_path: Path) -> None:
    """Rank 1's clock began 50 µs later, and rank 1 came 300 µs late."""
    first = [annotation(1, 0, 900), kernel("gemm", 0, 100), nccl("all_to_all", 100, 500)]
    second = [annotation(1, -50, 850), kernel("gemm", -50, 350), nccl("all_to_all", 350, 450)]
    paths = [write(tmp_path / "a.json.gz", 0, first), write(tmp_path / "b.json", 1, second, 10**9 + 50_000)]
    e = explain(read(paths).steps)
    assert e.by_rank[0].exposed == pytest.approx(400e-6)
    assert e.waited_for[1] == pytest.approx(300e-6 / 2)
    assert e.causes.late == pytest.approx(300e-6 / 2)
    assert e.causes.transfer == pytest.approx((100e-6 + 100e-6) / 2)
    assert "rank 1" in e.sentence
    assert e.sentence in page_of(e, paths)


def test_clocks_that_cannot_be_compared_tell_no_waits(tmp_path: Path) -> None:
    events = [annotation(1, 0, 900), nccl("all_to_all", 100, 500)]
    paths = [write(tmp_path / f"{rank}.json", rank, events, None) for rank in (0, 1)]
    traces = read(paths)
    e = explain(traces.steps, traces.notes)
    assert (e.causes.late, e.causes.transfer, e.wait_share) == (0, 0, None)
    assert "baseTimeNanoseconds" in e.sentence


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
    with pytest.raises(TraceError, match=r"is no JSON trace|holds no kernels"):
        read([path])
    with pytest.raises(TraceError, match="holds no kernels"):
        read([write(path, 0, [annotation(1, 0, 5)])])
    same = [write(tmp_path / f"{i}.json", 0, [kernel("gemm", 0, 1)]) for i in (1, 2)]
    with pytest.raises(TraceError, match="two of the traces are of rank 0"):
        read(same)


def explained(*paths: Path, **more):
    traces = read(paths, **more)
    return explain(traces.steps, traces.notes)


def test_a_trace_without_marks_is_one_trace_and_not_one_step(tmp_path: Path) -> None:
    """Five steps of 100 without marks."""
    events = [e for n in range(5) for e in (kernel("gemm", 100 * n, 100 * n + 80), nccl("all_to_all", *span(n)))]
    e = explained(write(tmp_path / "t.json", 0, events))
    assert (e.marked, e.unit) == (False, "trace")
    assert "Exposed all-to-all is 20% of the trace of 0.5 ms, which does not mark its steps." in e.sentence
    assert "Where a trace goes" in page_of(e, [])
    assert "of the step" not in e.sentence


def span(n: int) -> tuple[float, float]:
    return 100 * n + 80, 100 * n + 100


def test_a_step_that_is_marked_on_every_stream_is_one(tmp_path: Path) -> None:
    events = [annotation(1, 0, 500), annotation(1, 10, 480), kernel("gemm", 20, 100), nccl("all_to_all", 200, 300)]
    e = explained(write(tmp_path / "t.json", 0, events))
    assert e.total.parts["exposed all-to-all"] == pytest.approx(100e-6)
    assert e.total.step == pytest.approx(500e-6)


SEND_RECV = [annotation(1, 0, 100), kernel("gemm", 0, 50), kernel("ncclDevKernel_SendRecv(x)", 50, 90)]


@pytest.mark.parametrize(
    ("described", "asked", "purpose", "said"),
    [
        (
            "moe_ep",
            None,
            "expert",
            "Counted as all-to-all, since no group is named a pipeline's: 1 kernel",
        ),
        ("pp_group", None, "pipeline", "Counted as messages, since there is a pipeline group (pp_group)"),
        ("pp_group", "SendRecv", "expert", ""),
        ("moe_ep", "none", "pipeline", ""),
    ],
)
def test_messages_without_metadata(tmp_path: Path, described: str, asked: str | None, purpose: str, said: str) -> None:
    path = write(tmp_path / "t.json", 0, SEND_RECV)
    content = json.loads(path.read_text())
    content["distributedInfo"]["pg_config"] = [{"pg_name": "1", "pg_desc": described, "pg_size": 2, "ranks": [0, 1]}]
    path.write_text(json.dumps(content))
    traces = read([path], all_to_all=asked)
    assert [t.purpose for t in traces.steps[0].ranks[0].collectives] == [purpose]
    assert said in " ".join(traces.notes)
    assert ("--all-to-all-kernels" in " ".join(traces.notes)) == (asked is None)


def test_a_pattern_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"(?s)--all-to-all-kernels \(.*remedy"):
        read([write(tmp_path / "t.json", 0, SEND_RECV)], all_to_all="(")


def test_kernels_that_the_user_names_are_all_to_all(tmp_path: Path) -> None:
    """RCCL calls every kernel Generic; kernels of other libraries are unknown."""
    events = [annotation(1, 0, 100), kernel("ncclDevKernel_Generic_1(x)", 0, 40), kernel("mori::EpDispatch", 50, 90)]
    path = write(tmp_path / "t.json", 0, events)
    traces = read([path])
    assert [t.purpose for t in traces.steps[0].ranks[0].collectives] == ["data"]
    assert "their collective is unknown: 1 kernel as ncclDevKernel_Generic_1(x)" in " ".join(traces.notes)
    named = read([path], all_to_all="Generic|mori")
    assert [t.purpose for t in named.steps[0].ranks[0].collectives] == ["expert", "expert"]
    assert named.notes == []
    assert explain(named.steps).total.compute == 0


@pytest.mark.parametrize(
    ("facts", "config"),
    [
        ({"Process Group Name": "7", "Process Group Ranks": "[0, 1, ...]"}, [{"pg_name": "7", "ranks": [0, 1]}]),
        ({"Group size": 2}, None),
        ({}, [{"pg_name": "0", "ranks": [0, 1]}, {"pg_name": "1", "ranks": "[0, 1]"}, {"pg_name": "2", "ranks": [0]}]),
    ],
)
def test_groups_are_found_in_what_the_trace_says_of_them(tmp_path: Path, facts: dict, config: list | None) -> None:
    """The list of ranks is cut short, or missing. Rank 1 came 300 late in any case."""
    paths = []
    for rank, begin in ((0, 100), (1, 400)):
        events = [annotation(1, 0, 900), kernel("ncclDevKernel_AllToAll", begin, 500, **facts)]
        path = write(tmp_path / f"{rank}.json", rank, events)
        content = json.loads(path.read_text())
        content["distributedInfo"]["pg_config"] = config
        path.write_text(json.dumps(content))
        paths.append(path)
    e = explained(*paths)
    assert e.causes.late == pytest.approx(150e-6)
    assert e.causes.unattributed == 0


def test_a_rank_with_fewer_collectives_was_cut_short(tmp_path: Path) -> None:
    first = [annotation(1, 0, 900), nccl("all_to_all", 100, 500), nccl("all_to_all", 600, 700)]
    second = [annotation(1, 0, 900), nccl("all_to_all", 600, 700)]
    e = explained(*(write(tmp_path / f"{i}.json", i, events) for i, events in enumerate((first, second))))
    assert (e.causes.late, e.causes.transfer) == (0, 0)
    assert "unequal numbers of collectives in 1 step" in e.sentence


def test_deep_ep_waits_inside_its_kernels(tmp_path: Path) -> None:
    name = "void deep_ep::intranode::notify_dispatch<8>(x)"
    paths = [write(tmp_path / f"{i}.json", i, [annotation(1, 0, 900), kernel(name, 100, 500)]) for i in (0, 1)]
    e = explained(*paths)
    assert e.wait_share is None
    assert "DeepEP's kernels wait inside themselves" in e.sentence


def test_an_all_gather_counts_what_all_gather(tmp_path: Path) -> None:
    facts = {"Collective name": "_allgather_base", "In msg nelems": "10", "Out msg nelems": 20, "dtype": "BFloat16"}
    events = [kernel("ncclDevKernel_AllGather", 0, 10, **facts)]
    assert read([write(tmp_path / "t.json", 0, events)]).steps[0].ranks[0].collectives[0].bytes == 40


GOOD = [annotation(3, 0, 1000), kernel("gemm", 0, 400), nccl("all_to_all", 400, 600)]


def unusual() -> dict[str, bytes]:
    """Unusual files that other programs read: name and bytes."""
    content = {"traceEvents": GOOD, "distributedInfo": {"rank": 0, "world_size": 1}, "baseTimeNanoseconds": 10**18}
    text, events = json.dumps(content), json.dumps(GOOD)
    odd = [{"ph": "X", "name": None, "cat": None, "ts": None, "args": None}, 7, None, {"ph": "M", "ts": "N/A"}]
    return {
        "a list without its end": (events[:-1] + ",\n").encode(),
        "a bare list": events.encode(),
        "bytes that are no UTF-8": text.replace("gemm", "g\xe9mm").encode("latin-1"),
        "a byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "control characters": text.replace("gemm", "ge\tm\x01\n").encode(),
        "numbers as text": re.sub(r'("ts"|"dur"): ([\d.]+)', r'\1: "\2"', text).encode(),
        "numbers that are none": text.replace('"rank": 0', '"rank": "N/A"').replace(": 1}", ": NaN}").encode(),
        "events of other kinds": json.dumps({**content, "traceEvents": [*GOOD, *odd]}).encode(),
        "several members": gzip.compress(text[:300].encode()) + gzip.compress(text[300:].encode()),
    }


@pytest.mark.parametrize("name", unusual())
def test_what_others_read_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(unusual()[name])
    e = explained(path)
    assert e.steps == [3]
    assert (e.total.step, e.total.exposed) == (pytest.approx(1e-3), pytest.approx(2e-4))
    assert ("1 event without readable times is left out" in e.sentence) == (name == "events of other kinds")
    assert "damaged" not in e.sentence


@pytest.mark.parametrize("packed", [False, True])
def test_what_was_cut_short_is_read_up_to_there(tmp_path: Path, packed: bool) -> None:
    events = [annotation(1, 0, 1000), *(kernel("gemm", n, n + 1, noise=str(hash(str(n)))) for n in range(2000))]
    text = json.dumps({"traceEvents": events}).encode()
    content = gzip.compress(text) if packed else text
    path = tmp_path / "trace.json"
    path.write_bytes(content[: len(content) * 3 // 4])
    e = explained(path)
    assert 1e-3 < e.total.compute < 1.9e-3
    assert "trace.json: it is damaged or cut short" in e.sentence


def test_damage_in_the_middle_costs_what_is_damaged(tmp_path: Path) -> None:
    text = json.dumps({"traceEvents": [annotation(1, 0, 100), *(kernel("gemm", n, n + 1) for n in range(100))]})
    path = tmp_path / "trace.json"
    path.write_text(text.replace('"ts": 50,', '"ts": !,'))
    e = explained(path)
    assert e.total.compute == pytest.approx(99e-6)
    assert "100 events could be read" in e.sentence


@pytest.mark.parametrize(
    "content", [b"null", b"7", b'{"traceEvents": null}', b'{"traceEvents": {}}', b"\x1f\x8b\x08", b""]
)
def test_what_holds_no_events_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(TraceError, match=r"(?s)x.json.*remedy: give what torch.profiler"):
        read([tmp_path / "x.json"])


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
    """A gloo group of one process: today's torch writes a readable trace."""
    path = tmp_path / "trace.json"
    subprocess.run([sys.executable, "-c", REAL, str(path)], check=True, capture_output=True)
    steps = read([path]).steps
    assert [step.number for step in steps] == [0, 1]
    total = explain(steps).total
    assert total.compute > 0
    assert sum(total.parts.values()) == pytest.approx(total.step)
    assert any(t.kind == "all_to_all" and t.purpose == "expert" for step in steps for t in step.ranks[0].collectives)


def test_perfetto_shows_what_was_recorded(tmp_path: Path) -> None:
    first = [annotation(1, 0, 900), kernel("gemm", 0, 100), nccl("all_to_all", 100, 500)]
    second = [annotation(1, 0, 900), kernel("gemm", 0, 400), nccl("all_to_all", 400, 500)]
    steps = read([write(tmp_path / f"{i}.json", i, events) for i, events in enumerate((first, second))]).steps
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
