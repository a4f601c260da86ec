"""Draws docs/dimensions.svg: how the dimensions of parallelism share sixteen ranks.

    python docs/generate/compose_picture.py [FILE.png ...]

The places and groups of the ranks are those that `moesys.parallel.degrees` computes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from moesys.parallel.degrees import DENSE_AXES, EXPERT_AXES, Degrees

DEGREES = Degrees(pp=2, dp_replicate=2, cp=2, tp=2, ep=4, edp_replicate=2)
EXPERTS = 8
INK, PALE, STAGE, CELL = "#1c2530", "#5b6673", "#eef1f5", "#ffffff"
COLORS = {
    "pp": "#4a5561", "dp": "#b45309", "cp": "#0f766e", "tp": "#1d4ed8",
    "edp": "#b45309", "ep": "#7e22ce",
}  # fmt: skip
WIDTH, HEIGHT = 1240, 925
PANELS = {"dense": 150, "experts": 748}
COLUMNS, ROWS, STAGES = (0, 96, 216, 312), (0, 124), (196, 474)
"""Offsets of ranks in a panel, of data rows in a stage, and where stages begin; in pixels."""
CELL_WIDTH, CELL_HEIGHT = 80, 54
LEGEND = (
    ("tp", "tensor", "parts of every layer's weights", "parts of the residual stream, in every layer"),
    ("cp", "context", "parts of every sequence", "keys and values, in every attention"),
    ("dp", "data", "different sequences", "gradients of all but experts, summed over dp · cp once per step"),
    ("pp", "pipeline", "different layers", "the residual stream, and back its gradient, per micro-batch"),
    ("ep", "expert", "different experts of every layer", "tokens to their experts and back: all-to-all"),
    ("edp", "data of experts", "the same experts for different tokens", "gradients of experts, summed once per step"),
)
"""Axis, its name, what the ranks of one of its groups hold, and what they send each other."""


def text(axes: Axes, x: float, y: float, words: str, size: float = 11, **style: object) -> None:
    axes.text(x, y, words, fontsize=size, **{"color": INK, "ha": "center", "va": "center", **style})  # type: ignore[arg-type]


def box(axes: Axes, x: float, y: float, width: float, height: float, **style: object) -> None:
    style = {"facecolor": "none", "edgecolor": "none", "linewidth": 1.8, **style}
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=9", **style))  # type: ignore[arg-type]


def arrow(
    axes: Axes, a: tuple[float, float], b: tuple[float, float], color: str, bend: float = 0, **style: object
) -> None:
    settings = {"arrowstyle": "<|-|>", "mutation_scale": 11, "linewidth": 1.7, "shrinkA": 0, "shrinkB": 0, **style}
    shape = f"arc3,rad={bend}"
    axes.add_patch(FancyArrowPatch(a, b, connectionstyle=shape, color=color, **settings))  # type: ignore[arg-type]


def place(rank: int, panel: str) -> tuple[float, float]:
    """Upper left corner of a rank's cell: the same in both panels, by its dense coordinates."""
    at = DEGREES.coordinates(rank, DENSE_AXES)
    x = PANELS[panel] + COLUMNS[at["cp"] * DEGREES.tp + at["tp"]]
    return x, STAGES[at["pp"]] + ROWS[at["dp_replicate"]]


def around(axes: Axes, ranks: list[int], panel: str, color: str, margin: float) -> None:
    """An outline around a group of neighbours."""
    (x, y), (last, _) = place(ranks[0], panel), place(ranks[-1], panel)
    width = last + CELL_WIDTH - x
    box(axes, x - margin, y - margin, width + 2 * margin, CELL_HEIGHT + 2 * margin, edgecolor=color, zorder=3)


def vertical(axes: Axes, ranks: list[int], panel: str, color: str) -> None:
    """A link from the upper to the lower rank of a data group."""
    (x, y), (_, below) = place(ranks[0], panel), place(ranks[1], panel)
    arrow(axes, (x + CELL_WIDTH / 2, y + CELL_HEIGHT + 7), (x + CELL_WIDTH / 2, below - 7), color)


def stages(axes: Axes, panel: str) -> None:
    """The boxes of both stages, and the arrows between them."""
    left, width = PANELS[panel] - 22, COLUMNS[-1] + CELL_WIDTH + 44
    height = ROWS[-1] + CELL_HEIGHT + 62
    for top in STAGES:
        box(axes, left, top - 31, width, height, facecolor=STAGE, zorder=0)
    for column in COLUMNS:
        x = PANELS[panel] + column + CELL_WIDTH / 2
        arrow(axes, (x, STAGES[0] - 31 + height + 2), (x, STAGES[1] - 33), COLORS["pp"])
    text(axes, left + width / 2, (STAGES[0] + STAGES[1] + height) / 2 - 31, "pp", 12, color=COLORS["pp"], weight="bold")


def cells(axes: Axes, panel: str) -> None:
    for rank in range(DEGREES.world):
        x, y = place(rank, panel)
        box(axes, x, y, CELL_WIDTH, CELL_HEIGHT, facecolor=CELL, edgecolor="#c3cad3", linewidth=1, zorder=2)
        middle = x + CELL_WIDTH / 2
        if panel == "dense":
            text(axes, middle, y + CELL_HEIGHT / 2, str(rank), 15, weight="bold", zorder=4)
            continue
        each = EXPERTS // DEGREES.ep
        first = DEGREES.coordinates(rank, EXPERT_AXES)["ep"] * each
        text(axes, middle, y + 19, str(rank), 15, weight="bold", zorder=4)
        text(axes, middle, y + 40, f"experts {first}, {first + 1}", 8.6, color=PALE, zorder=4)


def dense(axes: Axes) -> None:
    left = PANELS["dense"]
    for ranks in DEGREES.groups(("tp",)):
        around(axes, ranks, "dense", COLORS["tp"], 6)
    for ranks in DEGREES.groups(("dp_replicate",)):
        vertical(axes, ranks, "dense", COLORS["dp"])
    for first, second in DEGREES.groups(("cp",)):
        upper = DEGREES.coordinates(first, DENSE_AXES)["dp_replicate"] == 0
        (x, y), (other, _) = place(first, "dense"), place(second, "dense")
        edge = y - 7 if upper else y + CELL_HEIGHT + 7
        ends = ((x + CELL_WIDTH / 2, edge), (other + CELL_WIDTH / 2, edge))
        arrow(axes, *ends, COLORS["cp"], bend=-0.11 if upper else 0.11, zorder=5)
    for stage, layers in enumerate(("embedding,\nlayers 0, 1", "layers 2, 3,\nhead")):
        middle = STAGES[stage] + (ROWS[-1] + CELL_HEIGHT) / 2
        text(axes, 68, middle - 20, f"stage {stage}", 12.5, weight="bold")
        text(axes, 68, middle + 12, layers, 9.5, color=PALE)
    for pair, chunks in enumerate(("0 and 3", "1 and 2")):
        x = left + COLUMNS[2 * pair] + (COLUMNS[1] + CELL_WIDTH) / 2
        text(axes, x, 142, f"cp {pair}: chunks {chunks}", 8.8, color=COLORS["cp"])
    for data, top in enumerate(ROWS):
        x = left + COLUMNS[-1] + CELL_WIDTH + 37
        words = f"dp {data}: sequences {'AB'[data]}"
        for stage in STAGES:
            text(axes, x, stage + top + CELL_HEIGHT / 2, words, 8.8, color=COLORS["dp"], rotation=-90)


def experts(axes: Axes) -> None:
    for ranks in DEGREES.groups(("ep", "etp"), EXPERT_AXES):
        around(axes, ranks, "experts", COLORS["ep"], 8)
    for ranks in DEGREES.groups(("edp_replicate", "edp_shard"), EXPERT_AXES):
        vertical(axes, ranks, "experts", COLORS["edp"])
    x = PANELS["experts"] + (COLUMNS[-1] + CELL_WIDTH) / 2
    text(axes, x, 142, "a token goes to its experts inside one of these groups", 8.8, color=COLORS["ep"])
    for data, top in enumerate(ROWS):
        x = PANELS["experts"] + COLUMNS[-1] + CELL_WIDTH + 37
        for stage in STAGES:
            words = f"edp {data}: all experts"
            text(axes, x, stage + top + CELL_HEIGHT / 2, words, 8.8, color=COLORS["edp"], rotation=-90)


def legend(axes: Axes) -> None:
    columns, top = (128, 182, 330, 640), 724
    for x, title in zip(columns[2:], ("the ranks of a group hold", "what they send each other"), strict=True):
        text(axes, x, top, title, 10, ha="left", color=PALE)
    for number, (axis, *words) in enumerate(LEGEND, 1):
        y = top + 28 * number
        box(axes, columns[0], y - 10, 40, 20, facecolor=COLORS[axis])
        text(axes, columns[0] + 20, y, axis, 9.5, color="#ffffff", weight="bold")
        for x, word in zip(columns[1:], words, strict=True):
            text(axes, x, y, word, 10, ha="left", weight="bold" if x == columns[1] else "normal")


def draw() -> Figure:
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor="#ffffff")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.set_axis_off()
    text(axes, WIDTH / 2, 34, "The same 16 ranks carry two meshes", 17, weight="bold")
    rule = "in each stage  dp 2 · cp 2 · tp 2  =  edp 2 · ep 4 · etp 1  =  8 ranks"
    text(axes, WIDTH / 2, 66, rule, 11.5, color=PALE)
    middle = (COLUMNS[-1] + CELL_WIDTH) / 2
    text(axes, PANELS["dense"] + middle, 112, "attention, dense feed-forward, embedding, head", 12.5, weight="bold")
    text(axes, PANELS["experts"] + middle, 112, "routed experts", 12.5, weight="bold")
    for panel in PANELS:
        stages(axes, panel)
        cells(axes, panel)
    dense(axes)
    experts(axes)
    legend(axes)
    return figure


if __name__ == "__main__":
    # Text as outlines: the picture looks the same whatever fonts are installed.
    rcParams.update({"svg.hashsalt": "moesys", "svg.fonttype": "path", "font.family": "DejaVu Sans"})
    figure = draw()
    figure.savefig(Path(__file__).parents[1] / "dimensions.svg", facecolor="#ffffff", metadata={"Date": None})
    for file in sys.argv[1:]:
        figure.savefig(file, facecolor="#ffffff", dpi=150)
