"""Draws docs/data-flow.svg, the way of the data through a run, and docs/floors.svg, the floors of imports.

    python docs/generate/architecture_picture.py

The floors are those of pyproject.toml, which import-linter holds.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from compose_picture import INK, PALE, STAGE, arrow, box, text
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
BLUE, GREEN, PURPLE, GREY = "#1d4ed8", "#0f766e", "#7e22ce", "#4a5561"
FLOW = (
    ("YAML", "configs/", GREY),
    ("Config", "moesys/config", BLUE),
    ("meshes", "parallel/mesh.py", GREEN),
    ("plain model", "moesys/models, moe", GREEN),
    ("compose", "parallel/compose.py", GREEN),
    ("trainer", "moesys/train", PURPLE),
    ("records", "runs/NAME", PURPLE),
    ("report", "moesys/measure", PURPLE),
)
"""Stations of a run, their homes, and a colour: of the command, of a rank before its first step, of training."""
SAYS = {
    "cli": "the command",
    "launchers": "Ray, processes, hosts, Slurm; the dry run",
    "megatron": "the plug-in and the engine",
    "train": "loop, optimizer, checkpoints, verify",
    "measure": "record, explain, predict, report; benchmarks",
    "parallel": "meshes, dimensions, dispatchers, compose",
    "models": "the plain decoder and its parts",
    "moe": "the MoE layer on one device: gates, experts",
    "data": "text, tokens, samples",
    "kernels": "one operation a file",
    "config": "the YAML",
    "errors": "messages to the user",
    "plan": "what a combination will cost",
    "hub": "weights of other formats",
}


def canvas(width: int, height: int) -> tuple[Figure, Axes]:
    """An empty picture whose axes count pixels from its upper left corner."""
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="#ffffff")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def flow() -> Figure:
    """The stations of a run, from left to right in two rows."""
    width, height, cell, gap = 900, 300, (178, 84), 44
    figure, axes = canvas(width, height)
    for number, (name, home, color) in enumerate(FLOW):
        row, column = divmod(number, 4)
        x, y = 28 + column * (cell[0] + gap), 34 + row * (cell[1] + 64)
        box(axes, x, y, *cell, facecolor=STAGE, edgecolor=color)
        text(axes, x + cell[0] / 2, y + 34, name, 14, weight="bold")
        text(axes, x + cell[0] / 2, y + 60, home, 9.5, color=PALE)
        if number and column:
            arrow(axes, (x - gap + 4, y + cell[1] / 2), (x - 4, y + cell[1] / 2), INK, arrowstyle="-|>")
        if number == 4:
            last = 28 + 3 * (cell[0] + gap) + cell[0] / 2
            middle = y - 32
            axes.plot([last, last, x + cell[0] / 2], [y - 62, middle, middle], color=INK, linewidth=1.7)
            arrow(axes, (x + cell[0] / 2, middle), (x + cell[0] / 2, y - 3), INK, arrowstyle="-|>")
    return figure


def floors() -> list[list[str]]:
    """The packages of each floor, from the highest to the lowest; single modules below `config` count as one."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    named = [[part.strip().removeprefix("moesys.") for part in layer.split("|")] for layer in layers]
    known = [[name for name in names if name in SAYS] for names in named]
    return [names for names in known if names]


def tower() -> Figure:
    """The floors, one above the other."""
    rows = floors()
    width, height = 900, 46 * len(rows) + 54
    figure, axes = canvas(width, height)
    text(axes, width / 2, 22, "a module imports from its own floor or one below", 11, color=PALE)
    for number, names in enumerate(rows):
        y, each = 44 + 46 * number, (width - 80) / len(names)
        for column, name in enumerate(names):
            x = 40 + column * each
            box(axes, x, y, each - 6, 38, facecolor=STAGE, edgecolor="#c3cad3", linewidth=1)
            text(axes, x + 16, y + 20, name, 12, ha="left", weight="bold")
            text(axes, x + 130, y + 20, SAYS[name], 10, ha="left", color=PALE)
    return figure


if __name__ == "__main__":
    rcParams.update({"svg.hashsalt": "moesys", "svg.fonttype": "path", "font.family": "DejaVu Sans"})
    for name, figure in (("data-flow.svg", flow()), ("floors.svg", tower())):
        figure.savefig(ROOT / "docs" / name, facecolor="#ffffff", metadata={"Date": None})
