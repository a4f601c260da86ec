"""Pictures as inline SVG that take their colours from the page, in light and dark."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moesys.measure.explanation import Breakdown
from moesys.measure.links import Line

INK = "#010203"
"""Drawn in place of the page's text colour."""

COLOURS = {
    "compute": "#4c9f70",
    "exposed all-to-all": "#d1495b",
    "data communication": "#8d6cab",
    "tensor communication": "#3d7ea6",
    "context communication": "#5fb0b7",
    "pipeline communication": "#b07d48",
    "pipeline bubble": "#d9a441",
    "idle": "#9aa0a6",
}
"""Of the parts of a step."""

SERIES = ("#3d7ea6", "#d1495b", "#4c9f70", "#d9a441", "#8d6cab", "#b07d48")


def draw(title: str, size: tuple[float, float], paint: Callable[[Any], object], label: str = "") -> str:
    """An SVG of `size` inches with one pair of axes, on which `paint` draws; `label` tells what it shows."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink = {key: INK for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")}
    style: dict[Any, Any] = {
        **ink,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "svg.hashsalt": title,
    }
    with mpl.rc_context({**style, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        axes.set_prop_cycle(color=SERIES)
        paint(axes)
        axes.set_title(title, loc="left", fontsize=10)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :].replace(INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label or title}" ', 1)


def stacked(title: str, rows: Sequence[str], breakdowns: Sequence[Breakdown]) -> str:
    """A step as stacked bars of milliseconds, one bar for each of `rows`."""

    def paint(axes: Any) -> None:
        left = [0.0] * len(rows)
        for part in breakdowns[0].parts:
            width = [b.parts.get(part, 0.0) * 1e3 for b in breakdowns]
            if max(width) > 0:
                axes.barh(range(len(rows)), width, left=left, height=0.8, color=COLOURS[part], label=part)
            left = [a + b for a, b in zip(left, width, strict=True)]
        hidden = [(b.hidden or 0.0) * 1e3 for b in breakdowns]
        if max(hidden) > 0:
            compute = [b.compute * 1e3 for b in breakdowns]
            start = [max(0.0, c - h) for c, h in zip(compute, hidden, strict=True)]
            axes.barh(
                range(len(rows)), hidden, left=start, height=0.8, fill=False, hatch="////", linewidth=0,
                edgecolor=COLOURS["exposed all-to-all"], label="all-to-all hidden behind compute",
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds")
        axes.figure.legend(loc="outside lower left", ncols=3, fontsize=8)

    return draw(title, (8, 1.4 + 0.28 * len(rows)), paint)


def heat(title: str, table: Sequence[Sequence[float]], xs: Sequence[Any], x: str, y: str, unit: str) -> str:
    """Values by colour: `table` has a row for each y; `xs` names the columns."""

    def paint(axes: Any) -> None:
        image = axes.imshow(table, aspect="auto", cmap="viridis", interpolation="nearest")
        some = range(0, len(xs), max(1, len(xs) // 8))
        axes.set_xticks(list(some), [str(xs[i]) for i in some])
        axes.set(xlabel=x, ylabel=y)
        bar = axes.figure.colorbar(image, ax=axes, label=unit)
        bar.outline.set_visible(False)

    return draw(title, (8, min(6.0, 1.5 + 0.14 * len(table))), paint)


def curves(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], levels: Mapping[str, float]) -> str:
    """Values over steps, and horizontal lines at `levels`."""

    def paint(axes: Any) -> None:
        for name, points in lines.items():
            style = {"marker": "o", "linestyle": ""} if len(points) < 3 or "held-out" in name else {"linewidth": 1.2}
            axes.plot(*zip(*points, strict=True), label=name, **style)
        for i, (name, value) in enumerate(levels.items()):
            axes.axhline(value, linestyle=(":", "--")[i % 2], color="#9aa0a6", label=name)
        axes.set_xlabel("step")
        if len(lines) + len(levels) > 1:
            axes.legend(fontsize=8)

    return draw(title, (8, 2.8), paint)


def bandwidths(title: str, points: Mapping[str, Sequence[tuple[float, float]]], lines: Mapping[str, Line]) -> str:
    """Bytes per second against bytes, measured (dots) and fitted (lines)."""

    def paint(axes: Any) -> None:
        for i, (name, measured) in enumerate(points.items()):
            colour = SERIES[i % len(SERIES)]
            axes.plot([b for b, _ in measured], [b / t / 1e9 for b, t in measured], "o", color=colour, label=name)
        for i, (name, line) in enumerate(lines.items()):
            first = max(1.0, line.smallest)
            sizes = [first * (line.largest / first) ** (n / 40) for n in range(41)]
            rates = [b / line.seconds(b) / 1e9 for b in sizes]
            known = list(points).index(name) if name in points else i
            axes.plot(sizes, rates, linewidth=1, color=SERIES[known % len(SERIES)], label=None if points else name)
        drawn = [y for artist in axes.get_lines() for y in artist.get_ydata()]
        reach = min(drawn) / 2, max(drawn) * 2  # also where all are the same
        axes.set_ylim(*reach)
        axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="10⁹ bytes per second")
        axes.legend(fontsize=8)

    return draw(title, (8, 3.2), paint)
