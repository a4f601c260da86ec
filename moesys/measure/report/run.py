"""The report of a run, or of two beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from moesys.errors import FileError, MoesysError
from moesys.files import json_objects, write_whole
from moesys.measure.explain import of_run
from moesys.measure.explanation import Explanation
from moesys.measure.links import Profile
from moesys.measure.report import figures
from moesys.measure.report.page import figure, page, section, sentence, table
from moesys.measure.run_files import is_number, loads, predictions, profile_of, share_of_links, summary_of
from moesys.measure.step import read_steps

CURVES = (
    ("loss, nats per token", {"loss": "loss", "heldout_loss": "held-out loss"}),
    ("tokens per second", {"tokens_per_second": "tokens per second"}),
    ("load: largest / mean", {"imbalance": "of experts", "rank_imbalance": "of ranks"}),
    ("share of assignments dropped", {"dropped": "dropped"}),
    ("exposed all-to-all, share of the step", {"all_to_all_share": "exposed all-to-all"}),
)
"""Title, and metrics with their names, of each picture of curves."""


class ReportError(MoesysError):
    """A folder holds no run."""

    exit_code = 2


@dataclass(frozen=True)
class Run:
    """What a run left in its folder; `explanation` is None if it recorded no steps."""

    folder: Path
    records: list[dict[str, Any]]
    loads: list[dict[str, Any]]
    summary: dict[str, Any]
    explanation: Explanation | None
    profile: Profile | None

    @classmethod
    def read(cls, folder: Path, summary: dict[str, Any] | None = None, profile: Path | None = None) -> Run:
        """From its folder; `summary` instead of its summary.json, `profile` instead of the run's measure.profile.

        Raises:
            ReportError: there is no run.
        """
        records = list(json_objects(folder / "metrics.jsonl"))
        if not records:
            raise ReportError(f"{folder} holds no metrics.jsonl of a run: give the folder that moesys launch made")
        if summary is None:
            summary = summary_of(folder)
        links = profile_of(profile, summary)
        return cls(folder, records, loads(folder / "load.jsonl"), summary, of_run(read_steps(folder)), links)

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a metric."""
        return [(r["step"], r[key]) for r in self.records if is_number(r.get(key)) and is_number(r.get("step"))]


def write(folder: Path, summary: dict[str, Any] | None = None, profile: Path | None = None) -> Path:
    """Write report.html into a run's folder; returns its path. Arguments as of `Run.read`."""
    run = Run.read(folder, summary, profile)
    path = folder / "report.html"
    write_whole(path, page(f"run {folder.name}", _parts(run)))
    return path


def write_comparison(a: Path, b: Path, path: Path) -> tuple[Run, Run]:
    """Write a page on two runs beside each other; returns both."""
    runs = Run.read(a), Run.read(b)
    write_whole(path, page(f"{a.name} and {b.name}", _comparison(*runs)))
    return runs


def _parts(run: Run) -> list[str]:
    e, parts = run.explanation, []
    if e is not None:
        parts += [sentence(e.sentence), *_communication(run, e)]
    parts.append(section("Training", *(figure(svg) for svg in _curves([run]))))
    if run.loads:
        parts.append(section("Load of experts over time", *_loads(run), note="Assignments of each expert / mean."))
    facts = [(k.replace("_", " "), _text(v)) for k, v in run.summary.items() if not isinstance(v, (dict, list))]
    parts.append(section("Facts", table((), facts, text=True)))
    return parts


def _communication(run: Run, e: Explanation) -> list[str]:
    names = [f"rank {rank} · {host}" for rank, host in zip(e.ranks, e.hosts, strict=True)]
    few = range(0, len(e.steps), max(1, len(e.steps) // 12))
    audit = " Audited: ranks met before each dispatch and combine, so nothing was hidden." if e.audit else ""
    note = "Mean over ranks and recorded steps; the parts add up to the step." + audit
    shown = [f"step {e.steps[i]}" for i in few], [e.by_step[i] for i in few]
    steps = figures.stacked("recorded steps, mean over ranks", *shown)
    ranks = figures.stacked("ranks, mean over recorded steps", names[:64], e.by_rank[:64])
    parts = [section("Where a step goes", _step_table(e), figure(steps), figure(ranks), note=note)]
    parts.append(section("All-to-all of each layer", _layer_table(e), _leg_table(e, run), note=LEGS))
    if sum(map(sum, e.bytes)):
        sizes, title = [[value / 2**20 for value in row] for row in e.bytes], "bytes per step from rank to rank"
        svg = figures.heat(title, sizes, range(len(e.bytes)), "to rank", "from rank", "MiB")
        parts.append(section("Who sends how much to whom", figure(svg)))
    return parts + _links(run) + _what_if(run)


LEGS = (
    "Milliseconds per step, mean over the ranks that hold the layer. Exposed = transfer + late + uneven: bytes moving, "
    "waiting for a rank that had not arrived, and for one whose experts had more tokens. GB/s: what the busiest rank "
    "sent, from the last arrival on; of links: the time that the fitted links need / the time it took."
)


def _step_table(e: Explanation) -> str:
    t = e.total
    rows = [(name, _ms(seconds), f"{seconds / t.step:.1%}") for name, seconds in t.parts.items() if seconds > 0]
    c = e.causes
    causes = [(f"  of all-to-all: {name}", _ms(s), f"{s / t.step:.1%}") for name, s in c.parts.items()]
    return table(("part", "ms", "of step"), [*rows[:2], *causes, *rows[2:], ("step", _ms(t.step), "")])


def _layer_table(e: Explanation) -> str:
    rows = [
        (
            layer.name, _ms(layer.seconds), _ms(layer.even_seconds), f"{layer.rank_imbalance:.2f}",
            "" if layer.expert_imbalance is None else f"{layer.expert_imbalance:.2f}",
            "" if layer.busiest_rank is None else str(layer.busiest_rank),
            "" if layer.busiest_expert is None else str(layer.busiest_expert),
        )
        for layer in e.layers
    ]  # fmt: skip
    heads = ("layer", "ms", "ms if even", "rank max / mean", "expert max / mean", "busiest rank", "busiest expert")
    return table(heads, rows)


def _leg_table(e: Explanation, run: Run) -> str:
    rows = []
    for leg in e.legs:
        c = leg.causes
        rate = "" if leg.bandwidth is None else f"{leg.bandwidth / 1e9:.3f}"
        sizes = f"{leg.bytes_intra / 2**20:.2f}", f"{leg.bytes_inter / 2**20:.2f}"
        direction = "backward" if leg.backward else "forward"
        times = (c.exposed, c.transfer, c.late, c.uneven)
        links = ""
        if run.profile is not None and leg.each is not None:
            links = share_of_links(run.profile, leg)
        rows.append((f"{leg.layer} {leg.part} {direction}", *map(_ms, times), *sizes, rate, links))
    heads = ("way", "exposed", "transfer", "late", "uneven", "MiB inside", "MiB between", "GB/s", "of links")
    return table(heads, rows)


def _links(run: Run) -> list[str]:
    """The link model that the run names, if its file is there."""
    if run.profile is None:
        return []
    lines = {name: line for name, line in run.profile.lines.items() if name.startswith("all_to_all")}
    return [section("Links", figure(figures.bandwidths("fitted bandwidth of all-to-all", {}, lines)))] if lines else []


def _what_if(run: Run) -> list[str]:
    path = run.folder / "measure" / "what_if.json"
    if not path.exists():
        return []
    try:
        found = predictions(path)
    except FileError as error:
        return [section("What if", note=str(error))]  # a run's end shall not fail for it
    rows = []
    for p in found:
        measured = "" if p.measured is None or p.error is None else f"{_ms(p.measured)} ({p.error:+.0%})"
        rows.append((p.name, _ms(p.step), _ms(p.exposed), measured))
    heads = ("setting", "step, ms", "exposed all-to-all, ms", "measured, ms (error)")
    return [section("What if", table(heads, rows), note="Predictions, from the recorded steps and the fitted links.")]


def _curves(runs: Sequence[Run]) -> list[str]:
    found = []
    for title, keys in CURVES:
        lines: dict[str, list[tuple[float, float]]] = {}
        for run in runs:
            prefix = f"{run.folder.name}: " if len(runs) > 1 else ""
            lines |= {prefix + name: run.curve(key) for key, name in keys.items() if run.curve(key)}
        levels = {}
        if "loss" in keys and len(runs) == 1:
            models = ("unigram", "bigram")
            told = {f"{m} model": runs[0].summary.get(f"{m}_loss") for m in models}
            levels = {name: loss for name, loss in told.items() if loss is not None and is_number(loss)}
        if lines:
            found.append(figures.curves(title, lines, levels))
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


def _comparison(a: Run, b: Run) -> list[str]:
    parts = []
    if a.explanation is not None and b.explanation is not None:
        both = (a.explanation, b.explanation)
        for run, e in zip((a, b), both, strict=True):
            parts.append(sentence(f"{run.folder.name}: {e.sentence}"))
        names = [a.folder.name, b.folder.name]
        bars = figures.stacked("a step of each, mean over ranks", names, [e.total for e in both])
        parts.append(section("Where a step goes", table(*comparison(a, b)), figure(bars)))
    parts.append(section("Training", *(figure(svg) for svg in _curves([a, b]))))
    return parts


def comparison(a: Run, b: Run) -> tuple[tuple[str, ...], Sequence[tuple[str, ...]]]:
    """Heads and rows of a table: the parts of a step of each, in milliseconds, and their difference."""
    assert a.explanation is not None
    assert b.explanation is not None
    s, t = a.explanation.total, b.explanation.total
    names = list(dict.fromkeys([*s.parts, *t.parts]))
    pairs = [(name, s.parts.get(name, 0.0), t.parts.get(name, 0.0)) for name in names]
    pairs.append(("step", s.step, t.step))
    legs = {(x.layer, x.part, x.backward): x.causes.exposed for x in b.explanation.legs}
    for leg in a.explanation.legs:
        direction = "backward" if leg.backward else "forward"
        other = legs.get((leg.layer, leg.part, leg.backward), 0.0)
        pairs.append((f"{leg.layer} {leg.part} {direction}", leg.causes.exposed, other))
    rows = [(name, _ms(x), _ms(y), f"{(y - x) * 1e3:+.2f}") for name, x, y in pairs if x or y]
    return ("ms per step", a.folder.name, b.folder.name, "difference"), rows


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _text(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
