"""The report of traces of another framework's run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moesys.measure.explain.explanation import Explanation
from moesys.measure.report import figures
from moesys.measure.report.communication import part_rows, rank_names
from moesys.measure.report.page import figure, page, section, sentence, table

NOTE = (
    "Compute: a kernel other than communication ran. Hidden communication ran beside such a kernel, exposed "
    "communication did not. Idle: no kernel ran. Means over ranks and steps."
)


def page_of(e: Explanation, files: Sequence[Path]) -> str:
    """The page for an explanation of traces. `files`: their paths."""
    t = e.total
    rows = part_rows(e)
    if t.hidden is not None:
        rows.append(("all-to-all hidden behind compute", f"{t.hidden * 1e3:.2f}", f"{t.hidden / t.step:.1%}"))
    ranks = figures.stacked("ranks", rank_names(e), e.by_rank)
    few = list(range(len(e.steps)))[:24]
    names = [f"step {e.steps[i]}" if e.marked else "trace" for i in few]
    steps = figures.stacked(f"{e.unit}s", names, [e.by_step[i] for i in few])
    parts = [
        sentence(e.sentence),
        section(
            f"Where a {e.unit} goes", table(("part", "ms", "share"), rows), figure(steps), figure(ranks), note=NOTE
        ),
        section("Files", table((), [(str(path),) for path in files], text=True)),
    ]
    return page("traces", parts)
