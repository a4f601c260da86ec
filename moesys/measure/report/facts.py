"""The circumstances and results of a run, as rows of a table: label and text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

import yaml

from moesys.files import json_objects
from moesys.measure.report.run_files import is_number

Row = tuple[str, str]

RESULTS = (
    ("held-out loss", "heldout_loss", "{:.4f} nats per token"),
    ("  in bits per byte", "heldout_bits_per_byte", "{:.4f}"),
    ("  unigram model", "unigram_loss", "{:.4f} nats per token"),
    ("  bigram model", "bigram_loss", "{:.4f} nats per token"),
    ("speed", "tokens_per_second", "{:,.0f} tokens/s"),
    ("exposed all-to-all", "all_to_all_share", "{:.1%} of logged steps' time"),
    ("parameters", "parameters", "{:,}"),
    ("  active per token", "active_parameters", "{:,}"),
    ("steps", "steps", "{:,}"),
    ("tokens trained on", "tokens", "{:,}"),
    ("steps skipped", "skipped_steps", "{:,}, not finite"),
    ("routing", "routing", "{}"),
    ("workers", "world_size", "{:,}"),
)
"""Label, key in summary.json and format of each result. A label that begins with blanks belongs to the row above."""

AXES = (
    ("pp", ("pp",)),
    ("dp", ("dp_replicate", "dp_shard")),
    ("cp", ("cp",)),
    ("tp", ("tp",)),
)
"""Names of degrees, and the mesh axes in ranks.json whose sizes multiply to each."""
EXPERT_AXES = (("edp", ("edp_replicate", "edp_shard")), ("ep", ("ep",)), ("etp", ("etp",)))
"""The same for the mesh of experts."""


def results(summary: Mapping[str, Any]) -> list[Row]:
    """The results that the run has. Skipped steps are left out if there were none."""
    rows = [(label, text) for label, key, form in RESULTS if (text := shown(summary, key, form))]
    place = next((at for at, row in enumerate(rows) if not row[0].startswith(("held-out", " "))), len(rows))
    return [*rows[:place], *_of_texts(summary), *rows[place:]]


TEXTS, LOSS = "eval/", "/loss"
"""Beginning of the keys of held-out texts with names (`train.eval`), and end of that of a text's loss."""


def texts(figures: Iterable[str]) -> list[str]:
    """The names of the held-out texts whose losses are among the keys of some figures."""
    keys = (key for key in figures if key.startswith(TEXTS) and key.endswith(LOSS))
    return [key.removeprefix(TEXTS).removesuffix(LOSS) for key in keys]


def _of_texts(summary: Mapping[str, Any]) -> Iterator[Row]:
    for name in texts(summary):
        loss = summary[f"{TEXTS}{name}{LOSS}"]
        yield f"loss of {name}", f"{loss:.4f} nats per token" if is_number(loss) else "not finite"
        if bits := shown(summary, f"{TEXTS}{name}/bits_per_byte", "{:.4f}"):
            yield "  in bits per byte", bits


def shown(summary: Mapping[str, Any], key: str, form: str) -> str:
    """A figure of summary.json as text; "" without one."""
    value = summary.get(key)
    if key == "heldout_loss" and key in summary and value is None:
        return "not finite"
    if key == "skipped_steps" and not value:
        return ""
    if form == "{}":
        return value if isinstance(value, str) else ""
    return form.format(value) if is_number(value) else ""


def circumstances(folder: Path, summary: Mapping[str, Any]) -> list[Row]:
    """The time, place, software and layout of a run, as far as its folder records them."""
    launches = list(json_objects(folder / "launches.jsonl"))
    rows = [(label, str(value)) for label, value in _launched(launches)]
    if ranks := placed(folder):
        hosts = sorted({str(rank.get("host")) for rank in ranks})
        few = ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")
        rows.append(("hosts", few))
        rows.append(("device", ", ".join(sorted({str(rank.get("device")) for rank in ranks}))))
        rows.append(("layout", layout(ranks)))
    kept = (("checkpoint", "checkpoint"), ("links", "profile"))
    return rows + [(label, str(summary[key])) for label, key in kept if summary.get(key)]


def placed(folder: Path) -> list[dict[str, Any]]:
    """The entries of the run's ranks.json: each rank's host, device and coordinates in both meshes."""
    try:
        value = json.loads((folder / "ranks.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    return [rank for rank in value if isinstance(rank, dict)] if isinstance(value, list) else []


def _launched(launches: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, object]]:
    if not launches:
        return
    last = launches[-1]
    again = f", launch {len(launches)} of this run" if len(launches) > 1 else ""
    yield "launched", f"{last.get('time')}{again}"
    yield "command", last.get("command")
    versions = last.get("versions")
    if isinstance(versions, dict):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def layout(ranks: Sequence[Mapping[str, Any]]) -> str:
    """The degrees of parallelism in ranks.json: "pp 2 × dp 2; experts: ep 2"."""

    def degrees(axes: Sequence[tuple[str, tuple[str, ...]]]) -> list[str]:
        sizes = []
        for name, parts in axes:
            size = len({tuple(str(rank.get(part, 0)) for part in parts) for rank in ranks})
            sizes += [f"{name} {size}"] * (size > 1)
        return sizes

    dense, experts = degrees(AXES), degrees(EXPERT_AXES)
    return (" × ".join(dense) or "one rank") + (f"; experts: {' × '.join(experts)}" if experts else "")


def configuration(folder: Path) -> dict[str, Any]:
    """The run's configuration by dotted keys; empty if config.yaml is missing or damaged."""
    try:
        return flat(yaml.safe_load((folder / "config.yaml").read_bytes()))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}


def flat(tree: object, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by dotted keys."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {key: leaf for name, sub in tree.items() for key, leaf in flat(sub, f"{prefix}{name}.").items()}


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """A loss that does not depend on the tokenizer: bits per byte of text, as in The Pile (arXiv 2101.00027)."""
    return nats_per_token / (log(2) * bytes_per_token)
