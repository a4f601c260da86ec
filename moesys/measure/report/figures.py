"""Pictures as inline SVG. Their colours follow the page, light or dark."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesys.measure.a2a_benchmark.sizes import human
from moesys.measure.explain.explanation import Breakdown
from moesys.measure.predict.links import LinkModel

INK = "#010203"
"""A colour that stands for the page's text colour."""

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
"""Colours of the parts of a step."""

SERIES = ("#3d7ea6", "#d1495b", "#4c9f70", "#d9a441", "#8d6cab", "#b07d48")


WIDE, NARROW = (8.0, 3), (3.9, 1)
"""Inches across, and columns of the legend, of the two drawings of a picture: for a screen and for a phone."""

Paint = Callable[[Any, int], object]
"""Draws on a pair of axes. The number is the most columns of the legend."""


def draw(title: str, height: float, paint: Paint, label: str = "", legend: int = 0) -> str:
    """Two SVGs of the same axes. The page shows the one that fits its width.

    height: inches, without the `legend` entries below. label: names the content.
    """
    drawn, text = "", html.escape(label or title)
    for name, (width, columns) in (("wide", WIDE), ("narrow", NARROW)):
        size = width, height + 0.2 * -(-legend // columns)
        drawn += _svg(title, size, paint, columns, f'class="{name}" role="img" aria-label="{text}"')
    return drawn


def _svg(title: str, size: tuple[float, float], paint: Paint, columns: int, attributes: str) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink = {key: INK for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")}
    style: dict[Any, Any] = {
        **ink,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "svg.hashsalt": attributes,
        "text.parse_math": False,  # a run's name may have $ in it
    }
    with mpl.rc_context({**style, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        axes.set_prop_cycle(color=SERIES)
        paint(axes, columns)
        axes.set_title(title, loc="left", fontsize=10)
        text = io.StringIO()
        # savefig would lay the figure out and draw it twice.
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :].replace(INK, "currentColor")
    return svg.replace("<svg ", f"<svg {attributes} ", 1)


def _legend(axes: Any, columns: int) -> None:
    """A legend below the axes, where it hides nothing."""
    axes.figure.legend(loc="outside lower left", ncols=columns, fontsize=8)


def stacked(title: str, rows: Sequence[str], breakdowns: Sequence[Breakdown]) -> str:
    """Steps as stacked bars of milliseconds, one bar for each of `rows`. Bars may have different parts."""
    parts = [name for name in COLOURS if any(b.parts.get(name, 0.0) > 0 for b in breakdowns)]

    def paint(axes: Any, columns: int) -> None:
        left = [0.0] * len(rows)
        for part in parts:
            width = [b.parts.get(part, 0.0) * 1e3 for b in breakdowns]
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
        _legend(axes, columns)

    hidden = any(map(bool, (b.hidden for b in breakdowns)))
    return draw(title, 1.0 + 0.28 * len(rows), paint, legend=len(parts) + hidden)


def heat(title: str, table: Sequence[Sequence[float]], xs: Sequence[float], x: str, y: str, unit: str) -> str:
    """Values by colour. `table` has a row for each y; `xs` are the evenly spaced places of the columns."""

    def paint(axes: Any, columns: int) -> None:
        half = (xs[-1] - xs[0]) / (2 * max(1, len(xs) - 1)) or 0.5
        extent = (xs[0] - half, xs[-1] + half, len(table) - 0.5, -0.5)
        image = axes.imshow(table, aspect="auto", cmap="viridis", interpolation="nearest", extent=extent)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        axes.set(xlabel=x, ylabel=y)
        bar = axes.figure.colorbar(image, ax=axes, label=unit)
        bar.outline.set_visible(False)

    return draw(title, min(6.0, 1.5 + 0.14 * len(table)), paint)


@dataclass(frozen=True)
class Curve:
    """A line of a picture: (step, value) `points`, and how it looks.

    Attributes:
        colour: number of its colour; None: the next one.
        dashed: drawn with dashes.
        dots: drawn as dots; also where there are fewer than three points.
    """

    points: Sequence[tuple[float, float]]
    colour: int | None = None
    dashed: bool = False
    dots: bool = False


def curves(title: str, lines: Mapping[str, Curve], levels: Mapping[str, float]) -> str:
    """Values over steps, and horizontal lines at `levels`."""

    def paint(axes: Any, columns: int) -> None:
        for i, (name, curve) in enumerate(lines.items()):
            dots = curve.dots or len(curve.points) < 3
            look = {"marker": "o", "linestyle": ""} if dots else {"linestyle": "--" if curve.dashed else "-"}
            colour = SERIES[(i if curve.colour is None else curve.colour) % len(SERIES)]
            axes.plot(*zip(*curve.points, strict=True), label=name, color=colour, linewidth=1.2, **look)
        for i, (name, value) in enumerate(levels.items()):
            axes.axhline(value, linestyle=(":", "--")[i % 2], color="#9aa0a6", label=name)
        axes.set_xlabel("step")
        if len(lines) + len(levels) > 1:
            _legend(axes, columns)

    named = len(lines) + len(levels)
    return draw(title, 2.5, paint, legend=named if named > 1 else 0)


def bandwidths(title: str, points: Mapping[str, Sequence[tuple[float, float]]], lines: Mapping[str, LinkModel]) -> str:
    """Bytes per second over bytes, measured (dots) and fitted (lines)."""

    from matplotlib.ticker import LogFormatter

    def paint(axes: Any, columns: int) -> None:
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
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel="bytes", ylabel="10⁹ bytes per second")
        axes.xaxis.set_major_formatter(lambda size, _: human(round(size)))
        axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))  # the default writes in TeX
        _legend(axes, columns)

    return draw(title, 3.0, paint, legend=len(points) or len(lines))
