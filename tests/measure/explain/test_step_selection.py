"""The selection of the recorded steps to explain."""

from __future__ import annotations

import json
from pathlib import Path

from moesys.measure.explain.averages import explain_run
from moesys.measure.explain.step_selection import newest_layout, steps_to_explain
from moesys.measure.record.step_files import read_steps, steps_file
from moesys.measure.step import CollectiveSpan, RankStep, Step


def step(number: int, ranks: int, layout: str = "", audit: bool = False) -> Step:
    group = tuple(range(ranks))
    rows = CollectiveSpan("all_to_all", "expert", group, 0, 0.1, 0.1, 0.2, ranks, (1,) * ranks, "layers.0", "dispatch")
    return Step(number, tuple(RankStep(r, "a", 0.0, 1.0, (rows,)) for r in group), {}, audit, layout)


def numbers(steps: list[Step]) -> list[int]:
    return [s.number for s in steps]


def test_the_first_two_of_many_are_left_out() -> None:
    assert numbers(steps_to_explain([step(n, 2) for n in range(4)]).steps) == [0, 1, 2, 3]
    assert numbers(steps_to_explain([step(n, 2) for n in range(5)]).steps) == [2, 3, 4]
    assert steps_to_explain([step(n, 2) for n in range(5)]).note == ""
    assert steps_to_explain([]).steps == []


def test_of_several_layouts_the_newest_counts_and_is_named() -> None:
    steps = [step(n, 4, "4 ranks (ep 4, 8 × 16 tokens)") for n in range(6)]
    steps += [step(n, 2, "2 ranks (ep 2, 8 × 16 tokens)") for n in range(6, 9)]
    choice = steps_to_explain(steps)
    assert numbers(choice.steps) == [6, 7, 8]
    assert choice.note == "This is of 2 ranks, ep 2; 6 recorded steps with 4 ranks, ep 4 are left out."
    e = explain_run(steps)
    assert e is not None
    assert e.sentence.endswith(choice.note)
    assert len(e.by_rank) == 2


def test_equal_ranks_with_another_layout_are_not_averaged() -> None:
    choice = newest_layout(
        [step(1, 2, "2 ranks (ep 2)"), step(2, 2, "2 ranks (tp 2)"), step(3, 2, "2 ranks (tp 2)", True)]
    )
    assert numbers(choice.steps) == [3]
    assert choice.note == "This is of tp 2, audited; 2 recorded steps with ep 2 and with tp 2 are left out."


def test_records_without_a_layout_differ_by_their_ranks(tmp_path: Path) -> None:
    """Older records name no layout: the same ranks count as the same layout."""
    steps_file(tmp_path).parent.mkdir()
    old = [json.loads(step(n, ranks).to_json()) for n, ranks in ((1, 4), (2, 2), (3, 2))]
    lines = [json.dumps({k: v for k, v in value.items() if k not in ("layout", "marked")}) for value in old]
    steps_file(tmp_path).write_text("\n".join([*lines, step(4, 2, "2 ranks (ep 2)").to_json(), '{"cut']))
    choice = newest_layout(read_steps(tmp_path))
    assert numbers(choice.steps) == [2, 3, 4]
    assert choice.note == "This is of 2 ranks, ep 2; 1 recorded step with 4 ranks is left out."
