"""The report of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from moesys.errors import FileError, MoesysError
from moesys.files import json_objects, write_whole
from moesys.measure.explain.averages import explain_run
from moesys.measure.explain.explanation import Explanation
from moesys.measure.predict.links import Profile
from moesys.measure.record.step_files import recorded
from moesys.measure.report import facts, figures
from moesys.measure.report.figures import Curve
from moesys.measure.report.page import figure, folded, page, section, sentence, table
from moesys.measure.report.run_files import is_number, loads, predictions, profile_of, share_of_links, summary_of

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
            ReportError: there is no run, or it ended before its first step.
        """
        records = list(json_objects(folder / "metrics.jsonl"))
        if not records and (config := folder / "config.yaml").is_file():
            raise ReportError(
                f"{folder}: the run has no step yet: there is nothing to report\n    remedy: moesys launch {config}"
            )
        if not records:
            raise ReportError(f"{folder} holds no metrics.jsonl of a run: give the folder that moesys launch made")
        if summary is None:
            summary = summary_of(folder)
        links = profile_of(profile, summary)
        return cls(folder, records, loads(folder / "load.jsonl"), summary, explain_run(recorded(folder)), links)

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a metric."""
        return [(r["step"], r[key]) for r in self.records if is_number(r.get(key)) and is_number(r.get("step"))]


def write(folder: Path, summary: dict[str, Any] | None = None, profile: Path | None = None) -> Path:
    """Write report.html into a run's folder; returns its path. Arguments as of `Run.read`."""
    run = Run.read(folder, summary, profile)
    path = folder / "report.html"
    write_whole(path, page(f"run {folder.name}", _parts(run)))
    return path


def _parts(run: Run) -> list[str]:
    e, parts = run.explanation, []
    if e is not None:
        parts.append(sentence(e.sentence))
    if rows := facts.results(run.summary):
        parts.append(section("What came out", table((), rows)))
    if e is not None:
        parts += _communication(run, e)
    parts.append(section("Training", *map(figure, _curves(run))))
    if run.loads:
        parts.append(section("Load of experts over time", *_loads(run), note="Assignments of each expert / mean."))
    rows = facts.circumstances(run.folder, run.summary)
    whole = run.folder / "config.yaml"
    text = [folded("the whole configuration", whole.read_text(errors="replace"))] if whole.is_file() else []
    if rows or text:
        parts.append(section("How it was made", table((), rows, text=True), *text))
    return parts


def _communication(run: Run, e: Explanation) -> list[str]:
    names = rank_names(e)
    few = range(0, len(e.steps), max(1, len(e.steps) // 12))
    audit = " Audited: ranks met before each dispatch and combine, so nothing was hidden." if e.audit else ""
    note = "Mean over ranks and recorded steps; the parts add up to the step." + audit + sampled(e) + untried(run)
    shown = [f"step {e.steps[i]}" for i in few], [e.by_step[i] for i in few]
    steps = figures.stacked("recorded steps, mean over ranks", *shown)
    ranks = figures.stacked("ranks, mean over recorded steps", names[:64], e.by_rank[:64])
    parts = [section("Where a step goes", _step_table(e), figure(steps), figure(ranks), note=note)]
    parts.append(section("All-to-all of each layer", _layer_table(e), _phase_table(e, run), note=PHASES))
    if sum(map(sum, e.bytes)):
        sizes = [[value / 2**20 for value in row] for row in e.bytes]
        what = "rank" if e.block == 1 else f"{e.block} ranks"
        svg = figures.heat(f"bytes per step from {what} to {what}", sizes, range(len(sizes)), f"to {what}",
                           f"from {what}", "MiB")  # fmt: skip
        parts.append(section("Who sends how much to whom", figure(svg)))
    return parts + _links(run) + _what_if(run)


def sampled(e: Explanation) -> str:
    """What is kept of some ranks only, and of which; "" if everything is kept of all."""
    if not e.recorded or len(e.recorded) == len(e.ranks):
        return ""
    names = ", ".join(map(str, e.recorded))
    return (
        f" All figures are of all {len(e.ranks)} ranks. Their single collectives, which the trace for Perfetto shows, are "
        f"kept of {len(e.recorded)} (ranks {names}): one of each run of neighbours."
    )


def untried(run: Run) -> str:
    """A caution about times that were taken on GPUs; "" for a run on CPU."""
    if all(rank.get("device") == "cpu" for rank in facts.placed(run.folder)):
        return ""
    return (
        " On GPUs a collective counts as exposed for as long as the computing stream waited for it. This way of "
        "counting was tested on pretended streams, and has not been compared with a GPU's own trace yet: compare with "
        "torch's profiler before you rely on it."
    )


def rank_names(e: Explanation) -> list[str]:
    """Each rank with its node, where there are several."""
    if len(set(e.hosts)) == 1:
        return [f"rank {rank}" for rank in e.ranks]
    return [f"rank {rank}, node {host}" for rank, host in zip(e.ranks, e.hosts, strict=True)]


PHASES = (
    "Milliseconds per step, mean over the ranks that hold the layer. Exposed = transfer + late + uneven: bytes moving, "
    "waiting for a rank that had not arrived, and for one whose experts had more tokens. GB/s: what the busiest rank "
    "sent, from the last arrival on; of links: the time that the fitted links need / the time it took."
)


def _step_table(e: Explanation) -> str:
    return table(("part", "ms", "of step"), [*part_rows(e), ("step", _ms(e.total.step), "")])


def part_rows(e: Explanation) -> list[tuple[str, str, str]]:
    """The parts of a step that are not 0, in milliseconds and as shares, below exposed all-to-all its causes."""

    def row(name: str, seconds: float) -> tuple[str, str, str]:
        return name, _ms(seconds), f"{seconds / e.total.step:.1%}"

    rows = []
    for name, seconds in e.total.parts.items():
        if seconds > 0:
            rows.append(row(name, seconds))
            if name == "exposed all-to-all":
                rows += [row(f"  of all-to-all: {cause}", s) for cause, s in e.causes.parts.items()]
    return rows


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


def _phase_table(e: Explanation, run: Run) -> str:
    rows = []
    for phase in e.phases:
        c = phase.causes
        rate = "" if phase.bandwidth is None else f"{phase.bandwidth / 1e9:.3f}"
        sizes = f"{phase.bytes_intra / 2**20:.2f}", f"{phase.bytes_inter / 2**20:.2f}"
        direction = "backward" if phase.backward else "forward"
        times = (c.exposed, c.transfer, c.late, c.uneven)
        links = ""
        if run.profile is not None and phase.each is not None:
            links = share_of_links(run.profile, phase)
        rows.append((f"{phase.layer} {phase.part} {direction}", *map(_ms, times), *sizes, rate, links))
    heads = ("way", "exposed", "transfer", "late", "uneven", "MiB inside", "MiB between", "GB/s", "of links")
    return table(heads, rows)


def _links(run: Run) -> list[str]:
    """The link model that the run names, if its file is there."""
    if run.profile is None:
        return []
    lines = {
        name: line
        for name, line in run.profile.lines.items()
        if name.startswith("all_to_all") and line.largest >= 1 and line.seconds(1) > 0
    }
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


def _curves(run: Run) -> list[str]:
    found = []
    for title, keys in CURVES:
        lines = {name: run.curve(key) for key, name in keys.items()}
        # What is 0 throughout, as drops of a dropless run, needs no picture.
        lines = {name: points for name, points in lines.items() if any(value for _, value in points)}
        levels = {}
        if "loss" in keys:
            known = {f"{m} model": run.summary.get(f"{m}_loss") for m in ("unigram", "bigram")}
            levels = {name: loss for name, loss in known.items() if loss is not None and is_number(loss)}
        if lines:
            drawn = {name: Curve(points, dots=name == "held-out loss") for name, points in lines.items()}
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


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
