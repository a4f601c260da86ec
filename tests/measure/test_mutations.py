"""Reports read files with hundreds of kinds of damage: they give a result, or an error in the user's words."""

from __future__ import annotations

import copy
import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesys.data import routing_files
from moesys.errors import MoesysError
from moesys.measure.a2a_benchmark import result_file
from moesys.measure.explain.averages import explain
from moesys.measure.explain.foreign_trace.reader import read
from moesys.measure.explain.summarise import summarised
from moesys.measure.predict.links import LinkModel, Profile
from moesys.measure.record.step_files import append, rank_file, read_steps, steps_file
from moesys.measure.report import perfetto
from moesys.measure.report import run as report
from moesys.measure.step import CollectiveSpan, GroupArrival, RankStep, Step

STRANGE = (None, "N/A", "", "7", -1, 0, 2**70, 1e308, float("nan"), float("inf"), True, [], {}, [1, "x"], {"a": None})
"""What stands where something else was expected."""


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from nodes(item, (*path, key))


def changed(value: Any, draw: random.Random) -> Any:
    """A copy in which one or two values are removed or replaced."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2))):
        *way, last = draw.choice(list(nodes(value)) or [(None,)])
        owner = value
        for key in way:
            owner = owner[key]
        if last is None:
            continue
        if draw.random() < 0.2:
            del owner[last]
        else:
            owner[last] = draw.choice(STRANGE)
    return value


def spoiled(content: bytes, draw: random.Random) -> bytes:
    """The bytes, cut, with some flipped, repeated or inserted."""
    at = draw.randrange(len(content))
    kind = draw.randrange(4)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    if kind == 2:
        return content[:at] + content[max(0, at - 9) :]
    return content[:at] + draw.choice((b"\xff", b"\x00", b"\n", b"]", b"}", b'"', b"null")) + content[at:]


def survives(work: Callable[[], object]) -> bool:
    """Whether there was a result. False for an error in the user's words; other errors are raised."""
    try:
        work()
    except MoesysError as error:
        assert str(error).strip()
        return False
    return True


def kernel(name: str, begin: float, **facts: Any) -> dict[str, Any]:
    times = {"ts": begin, "dur": 40.0, "pid": 0, "tid": 7}
    return {"ph": "X", "cat": "kernel", "name": name, **times, "args": facts}


def trace() -> dict[str, Any]:
    """A trace as Kineto writes it for a GPU."""
    facts = {
        "Collective name": "all_to_allv",
        "In msg nelems": 64,
        "dtype": "BFloat16",
        "Group size": 2,
        "Process Group Name": "1",
        "Process Group Ranks": "[0, 1]",
        "In split size": "[32, 32]",
    }
    mark = {"ph": "X", "cat": "gpu_user_annotation", "ts": 0.0, "dur": 200.0, "args": {"External id": 3}}
    groups = [
        {"pg_name": "0", "pg_desc": "default_pg", "ranks": [0, 1]},
        {"pg_name": "1", "pg_desc": "ep", "ranks": []},
    ]
    return {
        "schemaVersion": 1,
        "distributedInfo": {"backend": "nccl", "rank": 0, "world_size": 2, "pg_config": groups},
        "host_name": "a",
        "baseTimeNanoseconds": 1790857026000000000,
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
            {**mark, "name": "ProfilerStep#1"},
            kernel("gemm", 0.0),
            kernel("ncclDevKernel_SendRecv(x)", 40.0, **facts),
            kernel("ncclDevKernel_SendRecv(x)", 90.0),
            kernel("ncclDevKernel_AllReduce_Sum(x)", 140.0, **{"Process Group Description": "dp"}),
        ],
    }


def test_traces(tmp_path: Path) -> None:
    draw, good, results = random.Random(0), trace(), 0
    other = tmp_path / "other.json"
    content = {**good, "distributedInfo": {**good["distributedInfo"], "rank": 1}}
    other.write_text(json.dumps(content))
    path = tmp_path / "rank0.json"
    for number in range(400):
        content = json.dumps(changed(good, draw)).encode() if number % 2 else json.dumps(good).encode()
        if number % 4 >= 2:
            content = gzip.compress(content, 1)
        path.write_bytes(content if number % 2 else spoiled(content, draw))

        def work() -> None:
            traces = read([path, other] if draw.random() < 0.5 else [path])
            json.dumps(explain(traces.steps, traces.notes).as_json(), allow_nan=False)
            list(perfetto.events(traces.steps))

        results += survives(work)
    assert results > 200


def step(number: int) -> Step:
    rows = [
        CollectiveSpan(
            "all_to_all", "expert", (0, 1), n, 0.1 + n / 4, 0.1 + n / 4, 0.2 + n / 4, 8, (4, 4), "layers.0", part
        )
        for n, part in enumerate(("dispatch", "combine"))
    ]
    ranks = tuple(RankStep(r, "a", 0.0, 1.0, tuple(rows)) for r in (0, 1))
    return Step(number, ranks, {"layers.0": [5.0, 3.0]})


def met(r: RankStep) -> RankStep:
    """The same step with group arrivals, as ranks keep it."""
    return replace(r, arrivals=tuple(GroupArrival(t.begin, 1, True, None, t.bytes, 1.0, None) for t in r.collectives))


def write_run(folder: Path, links: Path) -> dict[str, Any]:
    """A run's files. Returns the content of each JSON file by name; lists have one value a line."""
    prediction = {"name": "x", "changes": [], "step": 1.0, "exposed": 0.1, "measured": 1.1, "error": -0.1}
    return {
        "summary.json": {
            "heldout_loss": 2.0, "unigram_loss": 3.3, "parameters": 1000, "all_to_all_share": 0.2,
            "routing": "collapsed", "steps": 30, "profile": str(links), "checkpoint": None,
        },
        "ranks.json": [{"rank": r, "host": "a", "device": "cpu", "pp": r, "dp_shard": 0, "ep": 0} for r in (0, 1)],
        "launches.jsonl": [{"time": "2026-01-02", "command": "moesys launch x", "versions": {"torch": "2.13.0"}}],
        "metrics.jsonl": [{"step": n, "loss": 5.0 - n, "imbalance": 1.5} for n in (1, 2)],
        "load.jsonl": [{"step": n, "load": [[30, 10], [20, 20]]} for n in (1, 2)],
        "measure/steps.jsonl": [json.loads(step(n).to_json()) for n in (1, 2)],
        "measure/summary.jsonl": [json.loads(summarised(step(n)).to_json()) for n in (3, 4)],
        "measure/what_if.json": [prediction, {**prediction, "measured": None, "error": None}],
    }  # fmt: skip


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the drawing of pictures, which is slow. Their data is checked."""

    def numbers(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [numbers(item) for item in value]
        return f"{value:g}"

    def curves(title: str, lines: dict, levels: dict, *more: Any, **named: Any) -> str:
        numbers([list(curve.points) for curve in lines.values()])
        numbers(list(levels.values()))
        return ""

    monkeypatch.setattr(report.figures, "curves", curves)
    monkeypatch.setattr(report.figures, "stacked", lambda *a, **k: "")
    monkeypatch.setattr(report.figures, "heat", lambda title, table, *a: str(numbers(table)))
    monkeypatch.setattr(report.figures, "bandwidths", lambda *a: "")


def test_run_folders(tmp_path: Path, undrawn: None) -> None:
    draw, results = random.Random(1), 0
    links = tmp_path / "links.yaml"
    Profile({"all_to_all intra": LinkModel(0.0, 1e-5, 0.0, 0.0, 1, 1e6)}, {"backend": "gloo"}).save(links)
    folder = tmp_path / "run"
    (folder / "measure").mkdir(parents=True)
    good = write_run(folder, links)
    texts = {name: as_text(name, value).encode() for name, value in good.items()}
    for number in range(200):
        for name, text in texts.items():
            (folder / name).write_bytes(text)
        name = draw.choice(list(good))
        content = as_text(name, changed(good[name], draw)).encode() if number % 2 else spoiled(texts[name], draw)
        (folder / name).write_bytes(content)
        kept = rank_file(folder, 0)
        kept.unlink(missing_ok=True)
        append(kept, 5, met(step(5).ranks[0]), "", False)
        kept.write_bytes(spoiled(kept.read_bytes(), draw))
        results += survives(lambda: report.write(folder))
        results += survives(lambda: list(perfetto.events(read_steps(folder) or [step(1)])))
    assert 250 < results < 400
    assert steps_file(folder).exists()


def as_text(name: str, value: Any) -> str:
    lines = name.endswith(".jsonl") and isinstance(value, list)
    return "".join(json.dumps(item) + "\n" for item in value) if lines else json.dumps(value)


def test_profiles(tmp_path: Path) -> None:
    draw, path = random.Random(2), tmp_path / "links.yaml"
    Profile({"all_to_all intra": LinkModel(1e-5, 1e-9, 0.1, 0.2, 1.0, 1e6)}, {"backend": "gloo"}).save(path)
    text = path.read_bytes()
    value, results = yaml.safe_load(text), 0
    for number in range(150):
        path.write_bytes(json.dumps(changed(value, draw)).encode() if number % 2 else spoiled(text, draw))
        results += survives(lambda: Profile.load(path).exchange([[1, 2], [3, 4]], ["a", "a"]))
    assert results > 20


def test_benchmarks(tmp_path: Path) -> None:
    draw, path = random.Random(3), tmp_path / "a2a.json"
    one = {
        "size": 1024, "type": "float32", "collective": "all_to_all", "group": "intra", "also": ["world"], "ranks": 2,
        "limiting_bytes": 512, "wait_us": 1.0, "transfer_us": 2.0,
        "out_of_place": {"time": 3.0, "alg_bw": 0.1, "bus_bw": 0.05, "nwrong": 0},
        "out_of_place_per_iter": {"p50_us": 3.0, "min_us": 2.0, "p95_us": 4.0, "max_us": 5.0},
    }  # fmt: skip
    link = {"alpha": 1e-5, "per_byte": 1e-9, "error": 0.1, "worst": 0.2, "smallest": 1, "largest": 1e6}
    good = {"results": [one], "links": {"all_to_all intra": link}, "config": {"date": "2026-11-27", "ranks": 2}}
    results = 0
    for number in range(200):
        text = json.dumps(good).encode()
        path.write_bytes(json.dumps(changed(good, draw)).encode() if number % 2 else spoiled(text, draw))
        results += survives(lambda: result_file.read(path).lines)
    assert 10 < results < 190


def test_recorded_routing(tmp_path: Path) -> None:
    import numpy as np

    draw, tokens = random.Random(4), np.arange(2)
    chosen = np.array([[0, 1], [1, -1]], dtype=np.int16)
    routing_files.write(tmp_path, 1, 0, {0: (tokens, chosen, np.zeros((2, 2)))}, 4)
    path = next(tmp_path.glob("*.npz"))
    content, results = path.read_bytes(), 0
    for _ in range(150):
        path.write_bytes(spoiled(content, draw))
        results += survives(lambda: list(routing_files.assignments(tmp_path)))
    assert results < 150
