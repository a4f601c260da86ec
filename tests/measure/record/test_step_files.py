"""Records of ranks, summaries on rank 0, and how both grow."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from moesys.measure.explain.averages import explain
from moesys.measure.explain.step_summary import COLUMNS, DETAILED
from moesys.measure.record import step_files
from moesys.measure.record.step_files import (
    append,
    forget_after,
    rank_file,
    read_steps,
    sample,
    summaries,
    summary_file,
)
from moesys.measure.report.communication import sampled
from moesys.measure.simulated_recording import SimulatedRun, SimulationResult, measured
from moesys.measure.step import CollectiveSpan, GroupArrival, RankStep


def rank_step(rank: int, begin: float = 0.0) -> RankStep:
    rows = CollectiveSpan(
        "all_to_all", "expert", (0, 1, 2, 7), 4, begin + 0.1, begin + 0.2, begin + 0.3, 60, (10, 20, 30, 0), "layers.1",
        "combine", True, "flat", begin + 0.15,
    )  # fmt: skip
    total = CollectiveSpan("all_reduce", "data", (0, 1, 2, 7), 0, begin + 0.4, begin + 0.4, begin + 0.5, 8)
    arrivals = (
        GroupArrival(begin + 0.2, 2, True, 0.05, 60, 0.75, 0.01),
        GroupArrival(begin + 0.4, 0, False, None, 8, 1.0, None),
    )
    return RankStep(rank, "a host", begin, begin + 1.0, (rows, total), None, arrivals)


def test_a_rank_reads_back_what_it_kept(tmp_path: Path) -> None:
    for rank in (0, 2):
        for number in (3, 7):
            append(rank_file(tmp_path, rank), number, rank_step(rank, float(number)), "3 ranks (ep 3)", True)
    steps = read_steps(tmp_path)
    assert [(s.number, s.layout, s.audit, s.members) for s in steps] == [
        (n, "3 ranks (ep 3)", True, [0, 2]) for n in (3, 7)
    ]
    assert steps[1].ranks == (rank_step(0, 7.0), rank_step(2, 7.0))


def test_what_is_cut_short_or_damaged_is_left_out(tmp_path: Path) -> None:
    path = rank_file(tmp_path, 0)
    sizes = []
    for number in (1, 2, 3):
        append(path, number, rank_step(0), "", False)
        sizes.append(path.stat().st_size)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert [s.number for s in read_steps(tmp_path)] == [1, 2]
    path.write_bytes(whole[: sizes[0] + 20] + b"\xff" * 40 + whole[sizes[0] + 60 :])
    assert [s.number for s in read_steps(tmp_path)] == [1]


def test_a_resumed_run_removes_what_it_records_again(tmp_path: Path) -> None:
    """Files of ranks that no longer exist, too; other ranks cut their own files."""
    for rank in (0, 1, 7):
        for number in (1, 2, 3):
            append(rank_file(tmp_path, rank), number, rank_step(rank), "", False)
    measured(SimulatedRun(2, 1, 3, 2), tmp_path, pictures=False)  # steps 0, 1, 2
    forget_after(tmp_path, 1, rank=0, world=2)
    kept = {rank: [s.number for s in read_steps(tmp_path) for r in s.ranks if r.rank == rank] for rank in (1, 7)}
    assert kept == {1: [1, 2, 3], 7: [1]}
    assert [s.number for s in summaries(tmp_path)] == [0, 1]
    forget_after(tmp_path, 1, rank=1, world=2)
    assert [s.number for s in read_steps(tmp_path) if 1 in s.members] == [1]


def test_a_sample_of_many_ranks_keeps_its_collectives() -> None:
    assert sample(DETAILED) == list(range(DETAILED))
    for world in (65, 100, 128, 1024, 16384):
        ranks = sample(world)
        assert ranks[0] == 0 and ranks == sorted(set(ranks)) and len(ranks) == DETAILED and ranks[-1] < world
        assert max(b - a for a, b in pairwise(ranks)) < 2 * -(-world // DETAILED)
    assert {rank % 8 for rank in sample(1024)} == set(range(8))  # every place of a node


def test_the_report_names_the_ranks_that_keep_their_collectives(tmp_path: Path) -> None:
    found = measured(SimulatedRun(128, 2, 3, 8), tmp_path, pictures=False)
    e = explain(summaries(tmp_path))
    assert len(e.by_rank) == len(e.waited_for) == 128
    assert (e.block, len(e.bytes), e.phases[0].by_rank) == (2, 64, [])
    text = sampled(e)
    assert "All figures are of all 128 ranks." in text
    assert f"of 64 (ranks {', '.join(map(str, sample(128)))})" in text
    assert sampled(replace(e, recorded=e.ranks)) == ""
    assert found.records == 128 * found.collectives


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], tuple[SimulationResult, int]]:
    """By ranks and layers: the result of a simulation, and the most memory beside the own collectives."""
    found = {}
    for world, layers in ((96, 3), (384, 3), (96, 12), (384, 12)):
        folder = tmp_path_factory.mktemp("scale")
        tracemalloc.start()
        result = measured(SimulatedRun(world, layers, 2, 16), folder, pictures=False)
        found[world, layers] = result, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return found


def test_bytes_to_rank_0_do_not_grow_with_ranks_times_collectives(costs: dict) -> None:
    """Four times the ranks cost one more row for each; all their records would be far more."""
    more, steps = 384 - 96, 2
    rows = more * steps * (len(COLUMNS) + 2) * 8
    for layers in (3, 12):
        few, many = costs[96, layers][0], costs[384, layers][0]
        everything = (many.records - few.records) * 100  # bytes of a collective
        grown = many.read - few.read
        assert rows <= grown < everything / 4
    by_layers = [costs[384, layers][0].read - costs[96, layers][0].read for layers in (3, 12)]
    # Collectives of all with the same data are owned in turn, by some of them one more: no more than that.
    assert by_layers[1] < by_layers[0] + 12 * 2 * 384 / 16 * 100


def test_memory_and_files_of_rank_0_do_not_grow_with_ranks_times_collectives(costs: dict) -> None:
    def grown(layers: int, of: int) -> int:
        few, many = costs[96, layers], costs[384, layers]
        return many[1] - few[1] if of else many[0].written - few[0].written

    for of in (0, 1):
        # Four times the layers, thus collectives: what more ranks add stays as it was, and is not four times as much.
        assert grown(12, of) < 1.5 * grown(3, of) + 100_000


def test_a_summary_that_contradicts_itself_is_left_out(tmp_path: Path) -> None:
    measured(SimulatedRun(4, 2, 3, 2), tmp_path, pictures=False)
    lines = summary_file(tmp_path).read_text().splitlines()
    lines[1] = lines[1].replace('"members":[0,1,2,3]', '"members":[0,1,2]')
    summary_file(tmp_path).write_text("\n".join([*lines[:2], lines[2][:-30]]))
    assert [s.number for s in summaries(tmp_path)] == [0]
    assert step_files.recorded(tmp_path) == summaries(tmp_path)


def test_summaries_under_the_keys_of_older_versions_are_read(tmp_path: Path) -> None:
    measured(SimulatedRun(4, 2, 3, 2), tmp_path, pictures=False)
    now = summaries(tmp_path)
    text = summary_file(tmp_path).read_text()
    for old, new in {"legs": "phases", "leg_causes": "phase_causes", "untold": "unattributed"}.items():
        assert f'"{new}":' in text
        text = text.replace(f'"{new}":', f'"{old}":')
    summary_file(tmp_path).write_text(text)
    assert now and now[0].phases and summaries(tmp_path) == now
