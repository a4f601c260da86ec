"""`moesys bench a2a` in real processes: times what a bare loop times, validates, and writes what is read elsewhere."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from support import changed

from moesys.cli import main
from moesys.config.schema import Config
from moesys.data import routing_files
from moesys.launchers.bench_a2a import routed
from moesys.measure.a2a_benchmark import collective, payload, timing
from moesys.measure.a2a_benchmark.collective import CollectiveCase
from moesys.measure.a2a_benchmark.fitted_links import flat, lines
from moesys.measure.a2a_benchmark.groups import BenchmarkGroup, divisions
from moesys.measure.a2a_benchmark.options import BenchmarkOptions
from moesys.measure.a2a_benchmark.result import CollectiveResult, RankTimes
from moesys.measure.a2a_benchmark.table import show
from moesys.measure.a2a_benchmark.timing import timed


@pytest.fixture
def config(small: dict, tmp_path: Path) -> Path:
    raw = changed(small, {"cluster": {"ranks_per_node": 2}, "parallel": {"ep": 2}, "launch": {"launcher": "local"}})
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(changed(raw, {"output": {"runs": str(tmp_path / "runs")}})))
    return path


def measure(config: Path, *words: str) -> dict:
    found = config.parent / "a2a.json"
    assert main(["bench", "a2a", str(config), *words, "--json", str(found)]) == 0
    return json.loads(found.read_text())


def test_what_is_timed_is_one_call_as_in_a_bare_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host: all meet, and between two looks at the clock is the call alone, ours as the bare one around it."""
    done: list[str] = []

    def now(device: torch.device) -> float:
        done.append("clock")
        return float(done.count("clock") - 1)

    monkeypatch.setattr(timing.dist, "barrier", lambda group: done.append("barrier"))
    monkeypatch.setattr(timing.comm, "now", now)
    own, plain = timed(
        lambda: done.append("call"), lambda: done.append("bare"), BenchmarkOptions(iterations=2, warmup=1), None, 0.0,
        torch.device("cpu"),
    )  # type: ignore[arg-type] # fmt: skip
    assert done == [word for side in ("bare", "call", "bare") * 3 for word in ("barrier", "clock", side, "clock")]
    assert own == [(8.0, 9.0), (14.0, 15.0)]
    assert plain == [(6.0, 7.0), (10.0, 11.0), (12.0, 13.0), (16.0, 17.0)]


def test_every_collective_is_right_and_its_bandwidths_are_nccl_tests(config: Path, capsys) -> None:
    content = measure(
        config, "--min", "1K", "--max", "4K", "--iterations", "3", "--skew", "1", "--plain", "--dtypes", "bfloat16"
    )
    results = content["results"]
    kinds = {"all_to_all", "all_to_all_uneven", "all_gather", "reduce_scatter", "all_reduce", "send_recv"}
    assert {r["collective"] for r in results} == kinds
    # On one node they are the same two ranks: measured once.
    assert {(r["group"], *r["also"]) for r in results} == {("intra", "expert", "world")}
    assert content["out_of_bounds"] == 0
    factor = {"all_reduce": 1.0, "send_recv": 1.0}  # 2 (n - 1) / n, and none, for two ranks
    for r in results:
        out, per = r["out_of_place"], r["out_of_place_per_iter"]
        assert out["nwrong"] == 0
        assert out["time"] == per["p50_us"]
        assert per["min_us"] <= per["p50_us"] <= per["p95_us"] <= per["max_us"]
        assert out["alg_bw"] == pytest.approx(r["size"] / out["time"] / 1e3)
        assert out["bus_bw"] == pytest.approx(out["alg_bw"] * factor.get(r["collective"], 0.5))
        assert 0 < r["transfer_us"] <= per["max_us"]
        assert len(r["rank_us"]) == 2
        assert r["collective"] != "all_to_all" or r["plain_us"] > 0 <= r["plain_noise"]
    uneven = [r for r in results if r["collective"] == "all_to_all_uneven"]
    # Both ranks send two thirds to rank 0, which receives that twice.
    assert [r["size"] for r in uneven] == pytest.approx([2 * 1024 * 2 / 3, 2 * 4096 * 2 / 3], abs=8)
    assert "all_reduce, intra = expert = world groups of 2, bfloat16" in capsys.readouterr().out
    assert main(["report", str(config.parent / "a2a.json")]) == 0
    page = (config.parent / "a2a.html").read_text()
    assert "all_reduce, intra = expert = world groups of 2, bfloat16" in page
    assert f">{uneven[0]['out_of_place']['alg_bw']:.3f}</td>" in page


TYPES = ("float8_e5m2", "float8_e4m3fn", "bfloat16", "float16", "float32")


@pytest.mark.parametrize("ranks", [2, 171, 172, 1024])
@pytest.mark.parametrize("dtype", TYPES[1:])
def test_sums_of_any_number_of_ranks_are_exact_in_any_order(ranks: int, dtype: str) -> None:
    kind, place = getattr(torch, dtype), torch.arange(3000)
    parts = torch.stack([payload.added(rank, place, ranks, kind) for rank in range(ranks)])
    exact = parts.sum(0)
    assert torch.equal(payload.totals(place, ranks, kind), exact)
    for order in (range(ranks), random.Random(0).sample(range(ranks), ranks)):
        total = torch.zeros(3000, dtype=kind)
        for rank in order:
            total = (total.float() + parts[rank].float()).to(kind)  # as on a link: rounded after each addition
        assert torch.equal(total.long(), exact)
    assert exact.unique().numel() > 1
    assert bool((parts.sum(1) > 0).all())  # a rank that is left out is missed


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_sent_is_exact_in_every_type_and_tells_its_sender(dtype: str) -> None:
    place, kind = torch.arange(600), getattr(torch, dtype)
    every = torch.stack([payload.sent(rank, place) for rank in range(1024)])
    assert torch.equal(every.float().to(kind).long(), every)
    for first in (0, 1, 2, 300, 594):
        assert len(every[:, first : first + payload.DIGITS].unique(dim=0)) == 1024


class Simulated:
    """As much of a process group as a case needs to know."""

    def __init__(self, size: int, rank: int):
        self.size, self.rank = lambda: size, lambda: rank


def arrived(case: CollectiveCase, n: int, dtype: torch.dtype) -> torch.Tensor:
    """What a right collective of `case` gives its rank, made from what all ranks send, as slow as that is."""
    grain = dtype.itemsize
    rows = []
    for sender in range(n):
        place = torch.arange(len(case.x) if case.kind == "all_gather" else sum(case.sent[sender]) // grain)
        row = payload.sent(sender, place).float().to(dtype)
        before = 0 if case.kind == "all_gather" else sum(case.sent[sender][: case.rank]) // grain
        size = len(row) if case.kind == "all_gather" else case.sent[sender][case.rank] // grain
        rows.append(row[before : before + size])
    return torch.cat(rows)


@pytest.mark.parametrize("kind", ["all_to_all", "all_to_all_uneven", "all_gather", "send_recv"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("rank", [0, 700, 1023])
def test_of_a_thousand_ranks_a_single_wrong_row_is_found_and_no_right_one(
    kind: str, dtype: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, torch_type, row = 1024, getattr(torch, dtype), 16
    monkeypatch.setattr(collective, "CHUNK", 5000)  # a check in several pieces
    group = BenchmarkGroup("world", Simulated(n, rank), [list(range(n))])  # type: ignore[arg-type]
    size = n * row * torch_type.itemsize
    case = CollectiveCase(kind, group, size, torch_type, torch.device("cpu"), BenchmarkOptions(skew=0.1))
    right = arrived(case, n, torch_type)
    assert len(right) == len(case.out)
    assert case.differing(right) == 0
    if len(right) < 4 * row:
        return
    other = right.float()
    place = len(right) // row // 2 * row
    other[place : place + 8] = right.float()[place + row : place + row + 8]  # another sender's, or later elements
    assert 0 < case.differing(other.to(torch_type)) <= 8


@pytest.mark.parametrize("kind", ["all_reduce", "reduce_scatter"])
def test_the_sums_of_a_thousand_ranks_are_checked(kind: str) -> None:
    n, dtype = 1024, torch.bfloat16
    case = CollectiveCase(
        kind, BenchmarkGroup("world", Simulated(n, 5), [[]]), 2 * 4096, dtype, torch.device("cpu"), BenchmarkOptions()
    )  # type: ignore[arg-type]
    place = torch.arange(4096) if kind == "all_reduce" else 5 * 4 + torch.arange(4)
    right = sum(payload.added(r, place, n, dtype) for r in range(n)).to(dtype)  # type: ignore[union-attr]
    assert case.differing(right) == 0
    right[2] += 1
    assert case.differing(right) == 1


def test_a_check_makes_no_more_than_what_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what every other rank sends to every other: as many elements for 1,024 ranks as for 4."""
    made = {}
    for n in (4, 1024):
        case = CollectiveCase(
            "all_to_all",
            BenchmarkGroup("world", Simulated(n, 1), [[]]),
            2**16,
            torch.float32,
            torch.device("cpu"),
            BenchmarkOptions(),
        )  # type: ignore[arg-type]
        counted: list[int] = []
        sent = payload.sent
        with monkeypatch.context() as patch:
            patch.setattr(
                payload, "sent", lambda rank, place, c=counted, s=sent: c.append(len(place)) or s(rank, place)
            )
            case.differing(case.out)
        made[n] = sum(counted)
    assert made == {4: 2**14, 1024: 2**14}


def test_on_a_gpu_streams_meet_before_each_iteration_and_only_durations_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that only keeps its order: what is timed begins after the all-reduce, in which all streams meet."""
    done: list[str] = []

    class Marker:
        clock = 0.0

        def __init__(self) -> None:
            self.at = Marker.clock

        def elapsed_time(self, later: Marker) -> float:
            return (later.at - self.at) * 1e3

    def say(word: str, seconds: float = 0.0) -> object:
        done.append(word)
        Marker.clock += seconds
        return word

    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Event", Marker)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: say("synchronise"))
    monkeypatch.setattr(timing.dist, "barrier", lambda group: say("barrier"))
    monkeypatch.setattr(timing.dist, "all_reduce", lambda x: say("meet", 0.7))
    monkeypatch.setattr(timing.comm, "now", lambda device: (say("event"), Marker())[1])
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    work = type("Work", (), {"zero_": lambda self: say("work", 0.1)})()
    monkeypatch.setattr(torch, "empty", lambda *_, **__: work)
    spans, plain = timed(
        lambda: say("call", 2.0), None, BenchmarkOptions(iterations=2, warmup=1), None, 5.0, cuda,  # type: ignore[arg-type]
    )  # fmt: skip
    assert spans == [(0.0, pytest.approx(2.0))] * 2
    assert plain == []
    once = ["synchronise", "barrier", *["work"] * 4, "meet", "event", "call", "event"]
    assert done == once * 3 + ["synchronise"] * 2


def test_groups_that_are_the_same_are_measured_once() -> None:
    every = ("intra", "inter", "expert", "world")
    assert divisions(every, ["a", "a"], 2) == [([[0, 1]], ["intra", "expert", "world"])]
    assert divisions(every, ["a", "b"], 2) == [([[0, 1]], ["inter", "expert", "world"])]
    two = divisions(every, ["a", "a", "b", "b"], 2)
    assert two == [
        ([[0, 1], [2, 3]], ["intra", "expert"]),
        ([[0, 2], [1, 3]], ["inter"]),
        ([[0, 1, 2, 3]], ["world"]),
    ]


def test_times_that_do_not_grow_make_no_line(capsys) -> None:
    """4 KiB took no longer than 1 KiB: a line through them has no bandwidth."""
    stamps = [[(0.0, 1e-3)] * 3] * 2
    sizes = (1024, 4096)
    results = [
        CollectiveResult.of("all_to_all", "intra", [[0, 1]], size, "float32", 4, [[size // 2] * 2] * 2,
                  [RankTimes(own, [], 0) for own in stamps], ["world"])
        for size in sizes
    ]  # fmt: skip
    assert lines(results) == {}
    assert set(flat(results)) == {"all_to_all intra", "all_to_all world"}
    facts = {"hosts": ["a", "a"], "ranks": 2, "backend": "gloo", "device": "cpu"}
    show(results, facts, Console(width=200))
    content = capsys.readouterr().out
    assert (
        "all_to_all intra = all_to_all world: no bandwidth can be fitted (β = ∞): up to 2 KiB took no longer than 512 B"
        in content
    )
    assert "2 ranks on 1 node" in content


def test_recorded_routing_becomes_a_byte_matrix(tmp_path: Path) -> None:
    """Rank 0's tokens chose experts 0, 0, 1 and 3, rank 1's expert 2 twice; each rank holds two experts."""
    tokens = np.arange(2), np.zeros((2, 2))
    for rank, chosen in enumerate(([[0, 0], [1, 3]], [[2, -1], [2, -1]])):
        routing_files.write(tmp_path, 1, rank, {0: (tokens[0], np.array(chosen, dtype=np.int16), tokens[1])}, 4)
    config = Config.model_validate(
        {
            "model": {"hidden": 8, "layers": 1, "attention": {"heads": 2}, "moe": {"experts": 4, "ffn_hidden": 8}},
            "parallel": {"ep": 2},
            "cluster": {"ranks_per_node": 2},
        }
    )
    assert routed(tmp_path, config) == [[3, 1], [0, 2]]


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--matrix", "absent.txt"], "--matrix absent.txt: No such file"),
        (["--min", "4K", "--max", "1K"], "--max 1024 is less than --min 4096"),
        (["--factor", "1"], "--factor must be at least 2"),
        (["cluster.ranks_per_node=1", "parallel.ep=1"], "one rank has nobody to send to"),
    ],
)
def test_what_makes_no_sense_is_said(config: Path, words: list[str], rule: str, capsys) -> None:
    assert main(["bench", "a2a", str(config), *words]) == 2
    assert rule in capsys.readouterr().err


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = BenchmarkGroup("world", dist.group.WORLD, [[0]])
        case = CollectiveCase("all_to_all", group, 64, torch.float32, torch.device("cpu"), BenchmarkOptions())
        assert case.wrong() == 0
        plain = case.call

        def spoiled() -> None:
            plain()
            case.out[3] += 1

        monkeypatch.setattr(case, "call", spoiled)
        assert case.wrong() == 1
    finally:
        dist.destroy_process_group()
