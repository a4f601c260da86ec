"""The sections of a report that explain a run's communication."""

from __future__ import annotations

from moesys.errors import FileError
from moesys.measure.explain.explanation import Explanation
from moesys.measure.report import facts, figures
from moesys.measure.report.contents import Run
from moesys.measure.report.page import figure, section, table
from moesys.measure.report.run_files import predictions, share_of_links


def sections(run: Run, e: Explanation) -> list[str]:
    """The sections on a run's communication."""
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
    """A note on the ranks whose single collectives are kept; "" if all are."""
    if not e.recorded or len(e.recorded) == len(e.ranks):
        return ""
    names = ", ".join(map(str, e.recorded))
    return (
        f" All figures are of all {len(e.ranks)} ranks. Single collectives, which the trace for Perfetto shows, are "
        f"kept of {len(e.recorded)} (ranks {names}): one of each run of neighbours."
    )


def untried(run: Run) -> str:
    """A caution about times measured on GPUs; "" for a run on CPU."""
    if all(rank.get("device") == "cpu" for rank in facts.placed(run.folder)):
        return ""
    return (
        " On GPUs a collective is exposed for as long as the computing stream waited for it. This was tested on "
        "simulated streams, and has not been compared with a GPU's own trace yet: compare with torch's profiler "
        "before you rely on it."
    )


def rank_names(e: Explanation) -> list[str]:
    """The name of each rank, with its node if there are several."""
    if len(set(e.hosts)) == 1:
        return [f"rank {rank}" for rank in e.ranks]
    return [f"rank {rank}, node {host}" for rank, host in zip(e.ranks, e.hosts, strict=True)]


PHASES = (
    "Milliseconds per step, mean over the ranks that hold the layer. Exposed = transfer + late + uneven: moving bytes, "
    "waiting for a late rank, and waiting for a rank whose experts had more tokens. GB/s: bytes of the busiest rank / "
    "seconds from the last arrival on. Of links: seconds that the fitted links need / seconds that it took."
)


def _step_table(e: Explanation) -> str:
    return table(("part", "ms", "of step"), [*part_rows(e), ("step", _ms(e.total.step), "")])


def part_rows(e: Explanation) -> list[tuple[str, str, str]]:
    """The parts of a step that are not 0, in milliseconds and as shares, with the causes below exposed all-to-all."""

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
    heads = ("phase", "exposed", "transfer", "late", "uneven", "MiB inside", "MiB between", "GB/s", "of links")
    return table(heads, rows)


def _links(run: Run) -> list[str]:
    """The link model that the run names, if its file exists."""
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
        return [section("What if", note=str(error))]  # the end of a run must not fail for it
    rows = []
    for p in found:
        measured = "" if p.measured is None or p.error is None else f"{_ms(p.measured)} ({p.error:+.0%})"
        rows.append((p.name, _ms(p.step), _ms(p.exposed), measured))
    heads = ("setting", "step, ms", "exposed all-to-all, ms", "measured, ms (error)")
    return [section("What if", table(heads, rows), note="Predictions, from the recorded steps and the fitted links.")]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
