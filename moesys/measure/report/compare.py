"""The report that compares two runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from moesys.files import write_whole
from moesys.measure.explain.explanation import Explanation
from moesys.measure.report import figures
from moesys.measure.report.contents import Run
from moesys.measure.report.facts import RESULTS, bits_per_byte, configuration, shown
from moesys.measure.report.figures import Curve
from moesys.measure.report.page import figure, page, section, sentence, table
from moesys.measure.report.run import CURVES
from moesys.measure.report.run_files import is_number

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]

OWN = ("name", "output.runs", "measure.metrics_port")
"""Keys that differ between any two runs."""


def write(a: Path, b: Path, path: Path) -> tuple[Run, Run]:
    """Write a page that compares two runs; returns both."""
    runs = Run.read(a), Run.read(b)
    write_whole(path, page(f"{names(*runs)[0]} and {names(*runs)[1]}", _parts(*runs)))
    return runs


def tables(a: Run, b: Run) -> list[Table]:
    """The tables for screen and page: results, keys that differ, parts of a step."""
    return [found for found in (outcome(a, b), differences(a, b), steps(a, b)) if found[1]]


def outcome(a: Run, b: Run) -> Table:
    """The results of each run, and the difference."""
    rows: list[tuple[str, ...]] = []
    for label, key, form in RESULTS:
        x, y = (r.summary.get(key) for r in (a, b))
        texts = [shown(run.summary, key, form) for run in (a, b)]
        if any(texts):
            rows.append((label, *texts, _change(x, y, form)))
    return ("result", *names(a, b), "difference"), rows


def _change(x: object, y: object, form: str) -> str:
    """The change from x to y: in points for shares, else relative to x. "" if either is unknown or both are equal."""
    if not (is_number(x) and is_number(y)) or x == y:
        return ""
    if "%}" in form:
        return f"{100 * (y - x):+.1f} points"
    return f"{y / x - 1:+.1%}" if x else ""


def differences(a: Run, b: Run) -> Table:
    """The configuration keys with different values."""
    x, y = configuration(a.folder), configuration(b.folder)
    keys = [key for key in dict.fromkeys([*x, *y]) if x.get(key) != y.get(key) and key not in OWN] if x and y else []
    rows: list[tuple[str, ...]] = [(key, *(str(c[key]) if key in c else "not there" for c in (x, y))) for key in keys]
    return ("key", *names(a, b)), rows


def steps(a: Run, b: Run) -> Table:
    """The parts of a step in each run, in milliseconds, and their difference; empty unless both runs recorded steps."""
    heads = ("ms per step", *names(a, b), "difference")
    if a.explanation is None or b.explanation is None:
        return heads, []
    rows: list[tuple[str, ...]] = [
        (name, f"{x * 1e3:.2f}", f"{y * 1e3:.2f}", f"{(y - x) * 1e3:+.2f}")
        for name, x, y in _seconds(a.explanation, b.explanation)
        if x or y
    ]
    return heads, rows


def _seconds(a: Explanation, b: Explanation) -> Iterator[tuple[str, float, float]]:
    s, t = a.total, b.total
    for name in dict.fromkeys([*s.parts, *t.parts]):
        yield name, s.parts.get(name, 0.0), t.parts.get(name, 0.0)
        if name == "exposed all-to-all":
            yield from _phases(a, b)
    yield "step", s.step, t.step


def _phases(a: Explanation, b: Explanation) -> Iterator[tuple[str, float, float]]:
    """Exposed seconds of each phase of each layer."""
    seconds = [{(phase.layer, phase.part, phase.backward): phase.causes.exposed for phase in e.phases} for e in (a, b)]
    for phase in dict.fromkeys([*seconds[0], *seconds[1]]):
        layer, part, backward = phase
        name = f"  {layer} {part} {'backward' if backward else 'forward'}"
        yield name, seconds[0].get(phase, 0.0), seconds[1].get(phase, 0.0)


def names(a: Run, b: Run) -> tuple[str, str]:
    """The names of the two folders, with as much of their paths as distinguishes them."""
    x, y = a.folder.resolve().parts, b.folder.resolve().parts
    count = next((n for n in range(1, max(len(x), len(y))) if x[-n:] != y[-n:]), 1)
    return "/".join(x[-count:]), "/".join(y[-count:])


def _parts(a: Run, b: Run) -> list[str]:
    both = names(a, b)
    parts = []
    for name, run in zip(both, (a, b), strict=True):
        if run.explanation is not None:
            parts.append(sentence(f"{name}: {run.explanation.sentence}"))
    parts.append(section("Results", table(*outcome(a, b))))
    heads, rows = differences(a, b)
    if configuration(a.folder) and configuration(b.folder):
        shown_keys = table(heads, rows) if rows else "<p>No key of the configuration differs.</p>"
        parts.append(section("Keys that differ", shown_keys))
    if a.explanation is not None and b.explanation is not None:
        totals = [a.explanation.total, b.explanation.total]
        bars = figures.stacked("a step of each, mean over ranks", both, totals)
        parts.append(section("Where a step goes", table(*steps(a, b)), figure(bars)))
    pictures, note = _curves((a, b), both)
    parts.append(section("Training", *map(figure, pictures), note=note))
    return parts


def _curves(runs: Sequence[Run], names: Sequence[str]) -> tuple[list[str], str]:
    """Pictures in which a run keeps one colour, and a note on the unit of the loss."""
    sizes = [_bytes_per_token(run) for run in runs]
    named = [configuration(run.folder).get("data.tokenizer") for run in runs]
    same = named[0] == named[1] and (sizes[0] == sizes[1] or not all(sizes))
    note = ""
    if not same and all(sizes):
        note = "The tokenizers differ: losses are in bits per byte, at the bytes per token of each run's held-out text."
    elif not same:
        note = "The tokenizers differ, and bytes per token are not known: nats per token of the two do not compare."
    found = []
    for title, keys in CURVES:
        per_byte = "loss" in keys and not same and all(sizes)
        lines = {}
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            for n, (key, label) in enumerate(keys.items()):
                points = run.curve(key)
                if per_byte:
                    points = [(step, bits_per_byte(value, sizes[i] or 1)) for step, value in points]
                if any(value for _, value in points):
                    lines[f"{name}: {label}"] = Curve(points, i, dashed=n > 0, dots=key == "heldout_loss")
        if lines:
            found.append(figures.curves("loss, bits per byte" if per_byte else title, lines, {}))
    return found, note


def _bytes_per_token(run: Run) -> float | None:
    value = run.summary.get("heldout_bytes_per_token")
    return value if is_number(value) and value > 0 else None
