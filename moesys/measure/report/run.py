"""The report of a run."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from moesys.files import write_whole
from moesys.measure.report import facts, figures
from moesys.measure.report.communication import sections
from moesys.measure.report.contents import Run
from moesys.measure.report.figures import Curve
from moesys.measure.report.page import figure, folded, page, section, sentence, table
from moesys.measure.report.run_files import is_number

CURVES = (
    ("loss, nats per token", {"loss": "loss", "heldout_loss": "held-out loss"}),
    ("tokens per second", {"tokens_per_second": "tokens per second"}),
    ("load: largest / mean", {"imbalance": "of experts", "rank_imbalance": "of ranks"}),
    ("share of assignments dropped", {"dropped": "dropped"}),
    ("exposed all-to-all, share of the step", {"all_to_all_share": "exposed all-to-all"}),
)
"""Title, and metrics with their names, of each picture of curves."""


def write(folder: Path, summary: dict[str, Any] | None = None, profile: Path | None = None) -> Path:
    """Write report.html into a run's folder; returns its path. The arguments are those of `Run.read`."""
    run = Run.read(folder, summary, profile)
    path = folder / "report.html"
    write_whole(path, page(f"run {folder.name}", _parts(run)))
    return path


def _parts(run: Run) -> list[str]:
    e, parts = run.explanation, []
    if e is not None:
        parts.append(sentence(e.sentence))
    if rows := facts.results(run.summary):
        parts.append(section("Results", table((), rows)))
    if e is not None:
        parts += sections(run, e)
    parts.append(section("Training", *map(figure, _curves(run))))
    if run.loads:
        parts.append(section("Load of experts over time", *_loads(run), note="Assignments of each expert / mean."))
    rows = facts.circumstances(run.folder, run.summary)
    whole = run.folder / "config.yaml"
    text = [folded("the whole configuration", whole.read_text(errors="replace"))] if whole.is_file() else []
    if rows or text:
        parts.append(section("Configuration and circumstances", table((), rows, text=True), *text))
    return parts


def _curves(run: Run) -> list[str]:
    found = []
    for title, keys in CURVES:
        named = facts.texts(run.summary) if "loss" in keys else []
        lines = {name: run.curve(key) for key, name in keys.items()}
        lines |= {name: run.curve(f"{facts.TEXTS}{name}{facts.LOSS}") for name in named}
        # A metric that is always 0, as drops of a dropless run, needs no picture.
        lines = {name: points for name, points in lines.items() if any(value for _, value in points)}
        levels = {}
        if "loss" in keys:
            known = {f"{m} model": run.summary.get(f"{m}_loss") for m in ("unigram", "bigram")}
            levels = {name: loss for name, loss in known.items() if loss is not None and is_number(loss)}
        if lines:
            dots = ("held-out loss", *named)
            drawn = {name: Curve(points, dots=name in dots) for name, points in lines.items()}
            found.append(figures.curves(title, drawn, levels))
    return found


def _loads(run: Run) -> list[str]:
    steps = [r["step"] for r in run.loads]
    found = []
    layers = range(len(run.loads[0]["load"]))
    for layer in [*layers][:: max(1, len(layers) // 8)]:
        loads = [r["load"][layer] for r in run.loads]
        columns = [[value / (fmean(load) or 1) for value in load] for load in loads]
        rows = [list(row) for row in zip(*columns, strict=True)]
        found.append(figure(figures.heat(f"MoE layer {layer}", rows, steps, "step", "expert", "load / mean")))
    return found
