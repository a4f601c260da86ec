"""`moesys report`: reports on one run, two runs, a benchmark of collectives, or traces, on screen and in files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moesys.files import write_json, write_whole
from moesys.measure.explain.explanation import Explanation
from moesys.measure.explain.step_selection import newest_layout
from moesys.measure.record.step_files import read_steps
from moesys.measure.report import compare, run
from moesys.measure.report.contents import ReportError, Run
from moesys.measure.step import Step


def command(arguments: argparse.Namespace) -> int:
    """Write and show the report that the command line asks for."""
    if arguments.trace:
        return _traces(arguments)
    if not 1 <= len(arguments.runs) <= 2:
        raise ReportError("give one run's folder, or two to compare, or --trace FILE …")
    if len(arguments.runs) == 2:
        return _two(arguments)
    folder = arguments.runs[0]
    if folder.is_file():
        from moesys.measure.report.a2a_benchmark import page_of

        path = arguments.out or folder.with_suffix(".html")
        write_whole(path, page_of(folder))
        print(path)
        return 0
    path = run.write(folder, profile=arguments.profile)
    found = Run.read(folder).explanation
    if arguments.perfetto is not None:
        from moesys.measure.report.perfetto import write as export

        export(_recorded(folder), arguments.perfetto)
    if found is not None:
        show(found, _console())
    _json(arguments.json, None if found is None else found.as_json())
    print(path)
    return 0


def _two(arguments: argparse.Namespace) -> int:
    a, b = arguments.runs
    path = arguments.out or Path(f"report-{a.name}-vs-{b.name}.html")
    runs = compare.write(a, b, path)
    for heads, rows in compare.tables(*runs):
        _console().print(_table(heads, rows))
    named = zip(compare.names(*runs), runs, strict=True)
    _json(arguments.json, {name: None if r.explanation is None else r.explanation.as_json() for name, r in named})
    print(path)
    return 0


def _traces(arguments: argparse.Namespace) -> int:
    from moesys.measure.explain.averages import explain
    from moesys.measure.explain.foreign_trace.reader import read
    from moesys.measure.report.foreign_trace import page_of

    traces = read(arguments.trace, lambda text: print(text, flush=True), arguments.all_to_all_kernels)
    found = explain(traces.steps, traces.notes)
    show(found, _console())
    path = arguments.out or Path("report-trace.html")
    write_whole(path, page_of(found, arguments.trace))
    _json(arguments.json, found.as_json())
    print(path)
    return 0


def _console() -> Console:
    """A console to which brackets, as in a run's name, are text."""
    return Console(markup=False)


def show(e: Explanation, console: Console) -> None:
    """The sentence, and where a step goes."""
    console.print(e.sentence, highlight=False)
    whole = e.total.step
    rows = [(name, f"{s * 1e3:.2f}", f"{s / whole:.1%}") for name, s in e.total.parts.items() if s > 0]
    rows += [(f"all-to-all: {name}", f"{s * 1e3:.2f}", f"{s / whole:.1%}") for name, s in e.causes.parts.items()]
    if e.total.hidden is not None:
        rows.append(("all-to-all hidden", f"{e.total.hidden * 1e3:.2f}", f"{e.total.hidden / whole:.1%}"))
    console.print(_table((f"of a {e.unit}", "ms", "share"), rows))


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    shown = Table()
    for i, head in enumerate(heads):
        shown.add_column(head, justify="right" if i else "left")
    for row in rows:
        shown.add_row(*row)
    return shown


def _recorded(folder: Path) -> list[Step]:
    """The steps of the layout that recorded last, those that warm up included."""
    choice = newest_layout(read_steps(folder))
    if not choice.steps:
        raise ReportError(f"{folder} recorded no steps: launch it with --measure")
    return choice.steps


def _json(path: Path | None, facts: object) -> None:
    if path is not None:
        write_json(path, facts)
