"""A run's report: one self-contained HTML file with its summary and curves."""

from __future__ import annotations

import html
import io
import json
from pathlib import Path
from typing import Any

from moesys.train.metrics import write_whole

CURVES = (
    ("loss", "loss, nats per token", ("loss",)),
    ("tokens_per_second", "tokens per second", ("tokens_per_second",)),
    ("imbalance", "expert load: largest / mean", ("imbalance", "rank_imbalance")),
    ("all_to_all_share", "share of time in all-to-all", ("all_to_all_share",)),
)
"""Name, title and metrics of each picture."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font-family: system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff }}
table {{ border-collapse: collapse }} td {{ padding: .2rem 1rem .2rem 0; overflow-wrap: anywhere }}
figure {{ margin: 1.5rem 0 }} svg {{ max-width: 100%; height: auto }}
</style></head><body><h1>{title}</h1><table>{rows}</table>{figures}</body></html>
"""


def write(run_dir: Path, summary: dict[str, Any]) -> Path:
    """Write report.html from the run's metrics and `summary`; returns its path."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(_text(v))}</td></tr>" for k, v in summary.items())
    figures = "".join(f"<figure>{_draw(records, title, keys, summary)}</figure>" for _, title, keys in CURVES)
    path = run_dir / "report.html"
    write_whole(path, PAGE.format(title=html.escape(run_dir.name), rows=rows, figures=figures))
    return path


def _text(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _draw(records: list[dict[str, Any]], title: str, keys: tuple[str, ...], summary: dict[str, Any]) -> str:
    """One picture as inline SVG; the loss beside the held-out losses and the n-gram models'."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    for key in keys:
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), label=key.replace("_", " "), linewidth=1)
    if "loss" in keys:
        held = [(r["step"], r["heldout_loss"]) for r in records if "heldout_loss" in r]
        axes.plot(*zip(*held, strict=True), "o", label="held-out loss")
        for name, style in (("unigram", ":"), ("bigram", "--")):
            axes.axhline(summary[f"{name}_loss"], linestyle=style, color="gray", label=f"{name} model")
    axes.set(title=title, xlabel="step")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]
