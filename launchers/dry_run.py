"""The plan of a run, without starting it: ranks, meshes, groups, parameters, memory, traffic."""

from __future__ import annotations

from math import prod
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from moesys.config.schema import Config
from moesys.data.corpus import vocab_size
from moesys.launchers import placement
from moesys.models.size import active_parameters, parameters, prediction_parameters
from moesys.parallel.cost import Stage, StepShape
from moesys.parallel.data import summed_over_shards
from moesys.parallel.degrees import DENSE_AXES, EXPERT_AXES, Degrees, resolve
from moesys.parallel.dimension import step_shape, traffic
from moesys.parallel.gradient_sync import SYNCS, Settled, fullest, settle, with_sync
from moesys.parallel.memory import estimate
from moesys.words import plural, size_text, unit_of

MEGATRON_TRAFFIC = (
    "Dispatch, sends and sums of gradients are those of Megatron-Core. Its tensor ranks make more collectives than the "
    "native engine's, which are shown, and its distributed optimizer pads and gathers more."
)
"""Limits of the planned traffic of `engine: megatron`."""

SHOWN = 4
"""Groups and nodes listed of each kind before the rest is only counted."""

KINDS = ("weights", "gradients", "optimizer", "activations", "gathered")
"""Fields of `parallel.memory.Memory`, in the order of the table."""

GROUPS = {
    "pipeline": (("pp",), DENSE_AXES),
    "data (dense)": (("dp_replicate", "dp_shard", "cp"), DENSE_AXES),
    "data shards": (("dp_shard", "cp"), DENSE_AXES),
    "context": (("cp",), DENSE_AXES),
    "tensor": (("tp",), DENSE_AXES),
    "experts (ep · etp)": (("ep", "etp"), EXPERT_AXES),
    "data of experts": (("edp_replicate", "edp_shard"), EXPERT_AXES),
}
"""Every kind of process group: its axes, and the mesh they belong to."""


def plan(config: Config) -> dict[str, Any]:
    """The plan as JSON: the facts that `show` prints. `config` must be legal."""
    degrees, problems = resolve(config)
    assert degrees is not None, problems
    vocabulary = vocab_size(config)
    total, active = parameters(config.model, vocabulary)
    found = settle(config, degrees, vocabulary)
    as_run = config if found is None else with_sync(config, found.sync)
    facts = {
        "world_size": degrees.world,
        "nodes": placement.place(degrees, config.cluster),
        "dense_mesh": dict(zip(DENSE_AXES, degrees.sizes(DENSE_AXES), strict=True)),
        "expert_mesh": dict(zip(EXPERT_AXES, degrees.sizes(EXPERT_AXES), strict=True)),
        "groups": groups(degrees),
        "crossings": [str(crossing) for crossing in placement.check(degrees, config.cluster)],
        "parameters": total,
        "active_parameters": active,
        "prediction_parameters": prediction_parameters(config.model, vocabulary)[0],
        "pipeline_ranks": [_rank(step_shape(as_run, degrees, vocabulary, rank)) for rank in range(degrees.pp)],
        "sync_gradients": None if found is None else _sync_gradients(config, degrees, vocabulary, found),
    }
    if config.engine == "megatron":
        facts["traffic_note"] = MEGATRON_TRAFFIC
    limit = config.cluster.memory_gib
    return {**facts, "fits": None if limit is None else _fullest(config, facts)[1] <= limit * 2**30}


def _sync_gradients(config: Config, degrees: Degrees, vocabulary: int, found: Settled) -> dict[str, Any]:
    """Both ways to sum gradients over shards, and which of them is chosen.

    For each way: the most bytes of gradients that a rank holds and sends, and the most memory of a rank (on CPU: of a
    node).
    """
    facts: dict[str, Any] = {"chosen": found.sync, "why": found.why}
    for sync in SYNCS:
        one = with_sync(config, sync)
        ranks = [step_shape(one, degrees, vocabulary, rank) for rank in range(degrees.pp)]
        facts[sync] = {
            "gradient_bytes": round(max(estimate(shapes).gradients for shapes in ranks)),
            "moved_bytes": round(max(sum(map(summed_over_shards, shapes)) for shapes in ranks)),
            "memory_bytes": round(found.needs[sync]),
        }
    return facts


def verdict(config: Config, facts: dict[str, Any]) -> str:
    """A sentence that compares the memory needed and given: "memory of the fullest rank: 43% of 80 GiB"."""
    limit = config.cluster.memory_gib
    if limit is None:
        return "cluster.memory_gib is not given: it is unknown whether the run fits"
    what, size = _fullest(config, facts)
    text = f"memory of the fullest {what}: {size / 2**30 / limit:.0%} of {limit:g} GiB"
    return text if facts["fits"] else f"{text}: DOES NOT FIT"


def groups(degrees: Degrees) -> dict[str, list[list[int]]]:
    """All process groups with more than one rank, by kind."""
    found = {}
    for kind, (along, axes) in GROUPS.items():
        # Context ranks share the shards of weights, if weights are sharded at all.
        unused = kind == "data shards" and degrees.dp_shard == 1
        if prod(degrees.sizes(along)) > 1 and not unused:
            found[kind] = degrees.groups(along, axes)
    return found


def _rank(shapes: list[StepShape]) -> dict[str, Any]:
    """Memory and traffic of each rank at one pipeline rank; ranks of a stage are alike."""
    memory = estimate(shapes)
    moved: dict[str, dict[str, float]] = {}
    for shape in shapes:
        for move in traffic(shape):
            axes = [axis for axis in move.axes if getattr(shape.degrees, axis) > 1]
            kind = f"{move.kind} {move.level}".rstrip()
            entry = moved.setdefault(f"{kind} over {'·'.join(axes)}", {"bytes": 0.0, "calls": 0})
            entry["bytes"] += move.bytes * move.calls
            entry["calls"] += move.calls
    return {
        "stages": [_stage(shape.stage) for shape in shapes],
        "parameters": round(sum(s.held(unsharded=s.config.engine == "megatron") for s in shapes)),
        "active_parameters": round(sum(_active(s) for s in shapes)),
        "memory_bytes": {**{k: round(v) for k, v in vars(memory).items()}, "total": round(memory.total)},
        "traffic_per_step": moved,
    }


def _active(shape: StepShape) -> float:
    model, d = shape.config.model, shape.degrees
    ways = {w.name: shape.model_shards(w, d) * shape.data_shards(w, d) for w in shape.weights()}
    every = active_parameters(model, shape.vocab_size)
    return sum(active / ways[w.name] for w, active in every if w.name in ways)


def _stage(stage: Stage) -> str:
    parts = [
        f"layers {stage.layers.start}–{stage.layers.stop - 1}"
        if len(stage.layers) > 1
        else f"layer {stage.layers.start}"
    ]
    return " + ".join((["embedding"] if stage.first else []) + parts + (["head"] if stage.last else []))


def show(config: Config, console: Console, facts: dict[str, Any] | None = None) -> None:
    """Print the plan of `config`; `facts` are `plan`'s, where the caller has them."""
    facts = plan(config) if facts is None else facts
    console.print(
        Group(
            *_heading(config, facts),
            _nodes(facts),
            _groups(facts),
            _ranks(config, facts),
            *_ways(facts),
            _traffic(facts),
        )
    )
    for line in (*filter(None, [facts.get("traffic_note")]), *facts["crossings"]):
        console.print(line)
    console.print("nothing was started (dry run)")


def _heading(config: Config, facts: dict[str, Any]) -> list[Text]:
    def mesh(axes: dict[str, int]) -> str:
        return " × ".join(f"{axis} {size}" for axis, size in axes.items())

    total, active, ahead = facts["parameters"], facts["active_parameters"], facts["prediction_parameters"]
    nodes = plural(len(facts["nodes"]), "node")
    return [
        Text(f"{config.name}: {plural(facts['world_size'], 'rank')} on {nodes}, launcher {config.launch.launcher}"),
        Text(f"model        {total:,} parameters, {active:,} active per token ({active / total:.1%})"),
        *([Text(f"             {ahead:,} of them for multi-token prediction, in training alone")] if ahead else []),
        Text(f"dense mesh   {mesh(facts['dense_mesh'])}"),
        Text(f"expert mesh  {mesh(facts['expert_mesh'])}\n"),
    ]


def _few(items: list[str]) -> str:
    rest = f"  … {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return "  ".join(items[:SHOWN]) + rest


def _span(ranks: list[int]) -> str:
    """[0-3] for a run of ranks, [0,4,8,12] or [0,8…56] otherwise."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    regular = ranks == list(range(ranks[0], ranks[-1] + 1, step))
    if regular and step == 1 and len(ranks) > 2:
        return f"[{ranks[0]}-{ranks[-1]}]"
    if regular and len(ranks) > 6:
        return f"[{ranks[0]},{ranks[1]}…{ranks[-1]}]"
    return "[" + ",".join(map(str, ranks[:12])) + ("…]" if len(ranks) > 12 else "]")


def _nodes(facts: dict[str, Any]) -> Table:
    table = Table("node", "ranks", title="placement", title_justify="left")
    for number, ranks in enumerate(facts["nodes"][:SHOWN]):
        table.add_row(str(number), _span(ranks))
    if len(facts["nodes"]) > SHOWN:
        table.add_row("…", f"{len(facts['nodes']) - SHOWN} more nodes")
    return table


def _groups(facts: dict[str, Any]) -> Table:
    table = Table("group", "number", "ranks each", "members", title="process groups", title_justify="left")
    for kind, members in facts["groups"].items():
        table.add_row(kind, str(len(members)), str(len(members[0])), _few([_span(ranks) for ranks in members]))
    return table


def _ranks(config: Config, facts: dict[str, Any]) -> Group:
    """A table of what the ranks of each stage hold; stages that are alike share a row."""
    holds = Table("pp rank", "stages", "parameters", "active", title="held by each rank", title_justify="left")
    # One unit for all, in the title: the table of a large model fits in 80 columns.
    unit, scale = unit_of(max(rank["memory_bytes"]["total"] for rank in facts["pipeline_ranks"]))
    title = f"estimated memory of each rank, {unit}"
    memory = Table("pp rank", *KINDS, "total", title=title, title_justify="left")
    for number, rank in enumerate(facts["pipeline_ranks"]):
        size = rank["memory_bytes"]
        holds.add_row(
            str(number), "; ".join(rank["stages"]), f"{rank['parameters']:,}", f"{rank['active_parameters']:,}"
        )
        memory.add_row(str(number), *(f"{size[kind] / scale:,.1f}" for kind in (*KINDS, "total")))
    if facts["fits"] is None:
        return Group(holds, memory)
    return Group(holds, memory, Text(verdict(config, facts), style="" if facts["fits"] else "bold red"))


def _fullest(config: Config, facts: dict[str, Any]) -> tuple[str, float]:
    """The unit whose memory `cluster.memory_gib` gives ("rank", "node"), and the most bytes that one of them needs."""
    needs = [rank["memory_bytes"]["total"] for rank in facts["pipeline_ranks"]]
    return fullest(config, needs, facts["world_size"])


def _ways(facts: dict[str, Any]) -> list[Any]:
    """The two ways to sum gradients over shards."""
    found = facts["sync_gradients"]
    if found is None:
        return []
    heads = ("", "gradients", "summed over shards", "memory of the fullest")
    table = Table(*heads, title="parallel.sync_gradients", title_justify="left")
    for sync in SYNCS:
        sizes = [size_text(found[sync][key]) for key in ("gradient_bytes", "moved_bytes", "memory_bytes")]
        table.add_row(sync, *sizes)
    return [table, Text(f"{found['chosen']} is chosen: {found['why']}")]


def _traffic(facts: dict[str, Any]) -> Table:
    table = Table(
        "pipeline rank", "collective", "calls", "size", title="sent by each rank in one step", title_justify="left"
    )
    for number, rank in enumerate(facts["pipeline_ranks"]):
        if number >= SHOWN:
            table.add_row("…", f"{len(facts['pipeline_ranks']) - SHOWN} more", "", "")
            break
        for kind, entry in rank["traffic_per_step"].items():
            table.add_row(str(number), kind, f"{entry['calls']:,}", size_text(entry["bytes"]))
    return table
