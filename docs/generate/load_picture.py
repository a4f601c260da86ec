"""Draws docs/expert-load.svg: how evenly the gates of a sweep load their experts while they learn.

    moesys sweep configs/sweeps/gates.yaml
    python docs/generate/load_picture.py runs/gates [FILE.svg]

One row of panels per run: the experts of its second MoE layer from top to bottom, steps from left to
right, and how many assignments each expert got, as a multiple of an equal share.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

LAYER = 1
INK = "#1c2530"


def history(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """(steps [N], loads [N, E] as multiples of an equal share) of one layer."""
    records = [json.loads(line) for line in (run / "load.jsonl").read_text().splitlines()]
    loads = np.array([record["load"][min(LAYER, len(record["load"]) - 1)] for record in records])
    return np.array([record["step"] for record in records]), loads / loads.mean(1, keepdims=True)


def draw(sweep: Path) -> Figure:
    """All runs of the sweep whose table lies in `sweep`, in its order."""
    rows = json.loads((sweep / "sweep.json").read_text())
    rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "svg.hashsalt": "moesys"})
    columns = 3
    figure = Figure(figsize=(9.6, 0.5 + 1.75 * -(-len(rows) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(rows) // columns), columns, sharex=True, squeeze=False).flatten()
    for panel in panels[len(rows) :]:
        panel.axis("off")
    for panel, (name, figures) in zip(panels, rows.items(), strict=False):
        steps, loads = history(sweep.parent / f"{sweep.name}-{name}")
        extent = (steps[0], steps[-1], loads.shape[1] - 0.5, -0.5)
        norm = TwoSlopeNorm(1.0, 0.0, 2.5)
        image = panel.imshow(loads.T, aspect="auto", extent=extent, cmap="PuOr_r", norm=norm, interpolation="nearest")
        said = f"held-out {figures['heldout_loss']:.3f}, max/mean {figures['imbalance']:.2f}"
        panel.set_title(f"{name}\n", loc="left", color=INK, fontweight="bold", fontsize=9)
        panel.text(0, 1.03, said, transform=panel.transAxes, fontsize=7.5, color=INK)
        panel.set_yticks(range(loads.shape[1]))
        panel.tick_params(labelsize=7, colors=INK)
    figure.supxlabel("step", fontsize=9, color=INK)
    figure.supylabel("expert", fontsize=9, color=INK)
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.8, pad=0.01)
    bar.set_label("load / equal share", color=INK)
    return figure


if __name__ == "__main__":
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parents[1] / "expert-load.svg"
    draw(Path(sys.argv[1])).savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
