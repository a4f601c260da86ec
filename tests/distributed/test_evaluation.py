"""Evaluation finds the loss of its sequences, whatever fills up the last batch."""

from __future__ import annotations

from typing import Any

import pytest
from counts import evaluated, exact
from support import changed

from moesys.config.schema import Config

SEQUENCES = 6
"""Less than a global batch of 8, and no multiple of a micro-batch of 4: two more than that."""

GATES: dict[str, dict[str, Any]] = {
    "capacity": {"capacity_factor": 0.5},
    "by position": {"capacity_factor": 4.0, "eval_capacity_factor": 0.5, "drop": "position", "zero_experts": 1},
    "padded": {"capacity_factor": 0.5, "pad_to_capacity": True},
    "minimum": {"capacity_factor": 0.5, "min_capacity": 36, "drop": "priority"},
    "expert choice": {"gate": "expert_choice", "capacity_factor": 0.5},
    "sinkhorn": {"gate": "sinkhorn"},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep 2": {"ep": 2},
    "all-gather": {"ep": 2, "dispatch": "all_gather"},
    "pp 2": {"pp": 2},
    "cp 2": {"cp": 2},
    "sharded": {"dp_shard": "full"},
}
MEGATRON = {"megatron ep 2": {"ep": 2}, "megatron tp 2": {"tp": 2}}
CASES = [*((gate, layout) for gate in GATES for layout in ("ep 2", "cp 2")), *(("capacity", x) for x in LAYOUTS)]
CASES = list(dict.fromkeys([*CASES, ("padded", "all-gather"), *(("capacity", layout) for layout in MEGATRON)]))


def config(small: dict, gate: str, layout: str | None = None) -> Config:
    model = {"hidden": 16, "layers": 2, "init_std": 0.4, "attention": {"heads": 2, "kv_heads": 2}}
    raw = changed(small, {"model": model}, {"train": {"micro_batch": 4, "eval_sequences": SEQUENCES}})
    raw["model"]["moe"] = {"experts": 4, "top_k": 2, "ffn_hidden": 8} | GATES[gate]
    if layout is not None:
        raw |= {"parallel": (LAYOUTS | MEGATRON)[layout], "cluster": {"device": "cpu", "ranks_per_node": 2}}
        raw["engine"] = "megatron" if layout in MEGATRON else "native"
    return Config.model_validate(raw)


@pytest.fixture(scope="module")
def expected(small: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return exact({gate: config(small, gate) for gate in GATES}, tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def found(small: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    configs = {f"{gate}, {layout}": config(small, gate, layout) for gate, layout in CASES}
    return evaluated(configs, 2, tmp_path_factory.mktemp("found"))


@pytest.mark.parametrize(("gate", "layout"), CASES)
def test_equals_the_exact_sequences(
    found: dict[str, float], expected: dict[str, float], gate: str, layout: str
) -> None:
    assert found[f"{gate}, {layout}"] == pytest.approx(expected[gate], rel=1e-5)
