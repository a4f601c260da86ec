"""Whatever a forward pass counts is counted once per token, however often the pass runs."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from counts import counted
from support import changed

from moesys.config.schema import Config

LAYERS, TOP_K, TOKENS = 2, 2, 8 * 16

RECOMPUTED = ("none", "selective", "full")
LAYOUTS: dict[str, dict[str, Any]] = {"ep 2": {"ep": 2}, "pp 2": {"pp": 2}}
PASSES: dict[str, dict[str, Any]] = {
    "no counting pass": {"balance_loss": 0.02, "z_loss": 0.001, "bias_rate": 0.01},
    "counting pass": {"global_balance_loss": 0.02, "z_loss": 0.001, "bias_rate": 0.01},
}
NATIVE = {f"{p}, {c}, {r}": (LAYOUTS[p], PASSES[c], r) for p, c, r in product(LAYOUTS, PASSES, RECOMPUTED)}
MEGATRON = {f"megatron, {c}, {r}": (LAYOUTS["ep 2"], PASSES[c], r) for c, r in product(PASSES, ("none", "full"))}
CASES = NATIVE | MEGATRON


@pytest.fixture(scope="module")
def found(small: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    configs = {}
    for name, (parallel, moe, recompute) in CASES.items():
        model = {"hidden": 16, "layers": LAYERS, "attention": {"heads": 2, "kv_heads": 2}, "moe": {"ffn_hidden": 8}}
        raw = changed(small, {"model": model}, {"train": {"micro_batch": 2, "recompute": recompute}})
        raw["model"]["moe"] = {"experts": 4, "top_k": TOP_K, "ffn_hidden": 8} | moe
        more = {"engine": "megatron"} if name in MEGATRON else {}
        configs[name] = Config.model_validate(
            changed(raw, {"parallel": parallel, "cluster": {"ranks_per_node": 2}}, more)
        )
    return counted(configs, 2, tmp_path_factory.mktemp("counts"))


@pytest.mark.parametrize("name", CASES)
def test_every_token_counts_once(found: dict[str, dict[str, Any]], name: str) -> None:
    load = found[name]["load"]
    assert [sum(layer) for layer in load] == [TOKENS * TOP_K] * LAYERS
    for place, counted_twice in ((0, 1 + (name.split(", ")[1] == "counting pass")), (1, 1)):
        total: dict[str, float] = {}
        for rank in found[name]["ranks"]:
            for layer, count in rank[place].items():
                total[layer] = total.get(layer, 0) + count
        # The global loss and the selection bias each have their own counts.
        assert total == {f"layers.{i}.ffn": TOKENS * TOP_K * counted_twice for i in range(LAYERS)}


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("none")])
def test_recomputation_changes_no_metric(found: dict[str, dict[str, Any]], name: str) -> None:
    expected = found[", ".join([*name.split(", ")[:-1], "none"])]["record"]
    record = found[name]["record"]
    assert record.keys() == expected.keys() and {"z", "dropped", "imbalance"} <= record.keys()
    same = [key for key in record if not key.endswith(("seconds", "second", "share"))]
    assert {key: record[key] for key in same} == pytest.approx({key: expected[key] for key in same}, rel=1e-5)
    assert record["z"] > 0
