"""Every gate under every dispatcher, with experts over four ranks: equal to one process, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from all_gates import traces
from planned import Table, counted, planned
from ran import Ran
from support import changed

from moesys.config import Config
from moesys.config.schema import DispatchConfig, GateConfig
from moesys.data import routing_files
from moesys.parallel import dimension
from moesys.train import verify

EXPERTS, LAYERS, WORLD, STEPS = 4, 1, 4, 2
KINDS = get_args(GateConfig.model_fields["kind"].annotation)
DISPATCHERS = get_args(DispatchConfig.model_fields["kind"].annotation)

PAIR = {"experts": 2 * WORLD}
"""Two experts on each rank, whose rows arrive by rank and are sorted by expert."""

GATES: dict[str, dict] = {
    "top_k": {"gate": "top_k", "global_balance_loss": 0.05} | PAIR,
    "cosine": {"gate": "cosine"},
    "prototype": {"gate": "prototype"},
    "sparsemixer": {"gate": {"kind": "sparsemixer", "threshold": 0.3}},
    "expert_choice": {"gate": "expert_choice", "z_loss": 0.001} | PAIR,
    "expert_choice causal": {"gate": {"kind": "expert_choice", "causal": True}, "capacity_factor": 1.5},
    "sinkhorn": {"gate": "sinkhorn", "z_loss": 0.001},
    "base": {"gate": "base", "top_k": 1},
    "hash": {"gate": "hash"} | PAIR,
    "hash balanced": {"gate": {"kind": "hash", "table": "balanced"}},
    "random": {"gate": "random"},
    "dense": {"gate": "dense"} | PAIR,
    "soft": {"gate": {"kind": "soft", "slots": 3}},
    "smear": {"gate": "smear"},
    "replay": {"gate": {"kind": "replay"}},
    "balanced by force": {"gate": {"kind": "top_k", "force": "balanced"}},
    "skewed by force": {"gate": {"kind": "sinkhorn", "force": "skewed", "skew": 2.0}},
}
"""Changes to model.moe, by the gate's kind and more."""

LAYOUTS: dict[str, dict] = {kind: {"ep": 4, "dispatch": kind} for kind in DISPATCHERS}
LAYOUTS["spread"] = {"ep": 4, "cp": 2, "tp": 2}
LAYOUTS["sharded"] = {"dp_shard": "full"}
"""Each dispatcher; each micro-batch over all four ranks; and, for gates that merge experts, these sharded."""

ILLEGAL: dict[tuple[str, str], dict[str, str]] = {
    ("soft", "spread"): {
        "parallel.cp": "gate soft computes over whole sequences, which cp(2) splits",
        "parallel.tp": "gate soft computes over whole sequences, which tp(2) splits",
    },
    ("smear", "spread"): {
        "parallel.cp": "gate smear computes over whole sequences, which cp(2) splits",
        "parallel.tp": "gate smear computes over whole sequences, which tp(2) splits",
        "parallel.ep": "gate smear merges the weights of all experts, which ep(4) splits",
    },
    **{
        ("smear", kind): {"parallel.ep": "gate smear merges the weights of all experts, which ep(4) splits"}
        for kind in DISPATCHERS
    },
}
PAIRS = [
    (gate, layout)
    for gate in GATES
    for layout in LAYOUTS
    if (gate, layout) not in ILLEGAL and (layout != "sharded" or gate == "smear")
]
LIKE = {"spread": "spread"} | dict.fromkeys(set(LAYOUTS) - {"spread"}, "all_to_all")
"""The layout whose micro-batches a layout has."""

BATCHES = {"spread": {"global_batch": 4, "micro_batch": 4}, "all_to_all": {"global_batch": 8, "micro_batch": 2}}
"""One pass for each data rank."""


def config(small: dict, gate: str, layout: str, folder: Path) -> Config:
    raw = changed(
        small,
        {
            "model": {"hidden": 32, "layers": LAYERS, "attention": {"heads": 2, "kv_heads": 2}},
            "train": BATCHES[LIKE[layout]],
            "parallel": LAYOUTS[layout],
            "cluster": {"nodes": 2, "ranks_per_node": 2},
        },
    )
    raw["model"]["moe"] = changed({"experts": EXPERTS, "ffn_hidden": 16}, GATES[gate])
    if gate == "replay":
        raw["model"]["moe"]["gate"] = {"kind": "replay", "path": str(folder)}
    return Config.model_validate(raw)


def record(folder: Path, tokens: int) -> None:
    """Any routing, with one to three experts per token, in a file for every layer."""
    generator = np.random.default_rng(0)
    expert = generator.permuted(np.tile(np.arange(EXPERTS), (tokens, 1)), axis=1)[:, :3].astype(np.int16)
    expert[generator.random(expert.shape) < [0, 0.5, 0.5]] = -1
    parts = (np.arange(tokens), expert, np.zeros(expert.shape, dtype=np.float16))
    routing_files.write(folder, 1, 0, {layer: parts for layer in range(LAYERS)}, EXPERTS)


@pytest.fixture(scope="module")
def ran() -> dict[str, Ran]:
    return {}


@pytest.fixture(scope="module")
def configs(small, tmp_path_factory) -> dict[str, Config]:
    """Every legal pair's configuration."""
    folder = tmp_path_factory.mktemp("routing")
    record(folder, tokens=100)
    made = {f"{gate} {layout}": config(small, gate, layout, folder) for gate, layout in PAIRS}
    for c in made.values():
        assert dimension.check(c) == []
    return made


@pytest.fixture(scope="module")
def found(configs, tmp_path_factory, ran) -> dict[str, verify.Trace]:
    """Every legal pair's trace, and for each gate and size of micro-batch that of one process."""
    folder = tmp_path_factory.mktemp("gates")
    alone = {f"{gate} {LIKE[layout]}": verify.reference(configs[f"{gate} {layout}"]) for gate, layout in PAIRS}
    expected = traces(alone, 1, STEPS, folder / "alone")
    return traces(configs, WORLD, STEPS, folder / "together", ran) | {
        f"{name} alone": t for name, t in expected.items()
    }


@pytest.mark.parametrize(("gate", "layout"), PAIRS)
def test_equals_one_process(found, gate, layout):
    # Gradients of sharded parameters are summed in float32.
    tolerance = verify.TOLERANCES["float32" if layout == "sharded" else "float64"]
    report = verify.compare(found[f"{gate} {layout}"], found[f"{gate} {LIKE[layout]} alone"], WORLD, tolerance)
    assert report.passed, report


@pytest.mark.parametrize(("gate", "layout"), PAIRS)
def test_does_what_its_budget_says(found, ran, gate, layout, budgets):
    # Collectives are those of the layout; what differs from gate to gate is what the host must know.
    budgets.check(f"gate {gate}, {layout}", replace(ran[f"{gate} {layout}"], collectives={}))


def calls(table: Table) -> dict:
    """Calls of each kind over each group, by pipeline rank."""
    found = {key: {rank: n for rank, n in moved.calls.items() if n} for key, moved in table.items()}
    return {key: by_rank for key, by_rank in found.items() if by_rank}


@pytest.mark.parametrize(("gate", "layout"), PAIRS)
def test_makes_the_collectives_that_are_planned(found, ran, configs, gate, layout):
    """Kinds, groups and calls; the sizes are those of float64 here, and of the routing."""
    name = f"{gate} {layout}"
    plan, count = calls(planned(configs[name])), calls(counted(configs[name], ran[name]))
    assert plan == count


@pytest.mark.parametrize(("gate", "layout"), ILLEGAL)
def test_others_are_refused(small, tmp_path, gate, layout):
    problems = dimension.check(config(small, gate, layout, tmp_path))
    assert {problem.key: problem.rule for problem in problems} == ILLEGAL[gate, layout]


def test_every_gate_is_here():
    assert {gate.split()[0] for gate in GATES} >= set(KINDS)
