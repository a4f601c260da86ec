"""A gradient or a loss that is not finite on one rank: every rank skips the step, and the run goes on without it."""

from __future__ import annotations

from math import isfinite, isnan
from typing import Any

import pytest
from poison import BAD, STEPS, TARGET, WEIGHT, observed
from support import changed

from moesys.config import Config

MODEL = {"hidden": 32, "layers": 2, "moe": {"bias_rate": 0.01, "global_balance_loss": 0.02}}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ep": ("native", {"ep": 2}),
    "shard, ep": ("native", {"dp_shard": "full", "ep": 2}),
    "tp, ep": ("native", {"tp": 2, "ep": 2}),
    "pp, ep": ("native", {"pp": 2, "ep": 2}),
    "cp, etp": ("native", {"cp": 2, "etp": 2}),
    "Megatron: pp, ep": ("megatron", {"pp": 2, "ep": 2}),
    "Megatron: distributed optimizer": ("megatron", {"ep": 2, "dp_shard": "full"}),
}


@pytest.fixture(scope="module")
def found(small: dict, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank, of each layout what happened."""
    base = changed(
        small, {"cluster": {"ranks_per_node": 4}, "model": MODEL, "train": {"seq_len": 8, "global_batch": 4}}
    )
    unclipped = {"train": {"optimizer": {"clip": None}}}
    raw = {name: changed(base, {"engine": engine, "parallel": p}) for name, (engine, p) in LAYOUTS.items()}
    raw["ep"] = changed(raw["ep"], unclipped)
    raw["Megatron: pp, ep"] = changed(raw["Megatron: pp, ep"], unclipped)
    configs = {name: Config.model_validate(one) for name, one in raw.items()}
    return observed(configs, 4, tmp_path_factory.mktemp("skips"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_skips_the_step_and_the_run_goes_on_as_if_it_were_left_out(layout, found):
    for rank in (by_layout[layout] for by_layout in found):
        assert rank["kept"] == [True] * len(BAD), "weights and biases of gates are what they were"
        assert rank["equal"] and rank["moved"]
        records = rank["records"]
        assert [r["skipped"] for r in records] == [1, 1, 2, 3, 3, 3]
        assert [isfinite(r["grad_norm"]) for r in records] == [step not in BAD for step in range(1, STEPS + 1)]
        assert [isnan(r["loss"]) for r in records] == [BAD.get(step) == "loss" for step in range(1, STEPS + 1)]
        assert rank["checkpoints"] == [(1, 1), (1, 2), (2, 3)], "resumption counts on"


def test_a_healthy_step_costs_what_it_did(found):
    """Two numbers that all ranks share, the norm and the metrics; Megatron reduces the norm itself."""
    for layout, (engine, _) in LAYOUTS.items():
        assert {rank[layout]["shared"] for rank in found} == {2 if engine == "native" else 1}, layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_names_the_one_bad_tensor(layout, found):
    for rank in (by_layout[layout] for by_layout in found):
        one, _, everything = rank["skips"]
        assert one.gradients == [TARGET] and one.state == []
        assert f"norm of the gradients inf, first in the gradient of {TARGET}" in str(one)
        assert everything.gradients[0] == "embed.weight" and len(everything.gradients) > 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_that_is_not_finite_is_named_and_neither_saved_nor_trained(layout, found):
    for rank in (by_layout[layout] for by_layout in found):
        saving, training, loading = rank["state"]
        assert f"no checkpoint is written: not finite: {WEIGHT}" in saving and "remedy" in saving
        assert training.startswith(f"step {STEPS + 1}: not finite: {WEIGHT}")
        assert "the run goes on from " in training and "step-00000004, or from further back" in training
        assert f"step-0000000{STEPS + 1}: not finite: {WEIGHT}" in loading and "remove it" in loading
