"""`optimizer.kind: apex` under several layouts: what torch's AdamW computes, and resumption to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from apex_ranks import observed
from support import changed

from moesys.config import Config

STEPS = 2
SHARDED = {"dp_shard": "full", "ep": 2}
SPLIT = {"tp": 2, "ep": 4}
PIPED = {"pp": 2, "dp_shard": "full"}


@pytest.fixture(scope="module")
def found(small: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    # 33 is no multiple of four ranks: FSDP replaces the padded tensors that parameters are views of.
    change = {
        "cluster": {"ranks_per_node": 4},
        "model": {"layers": 2, "hidden": 33, "attention": {"head_dim": 8}, "moe": {"bias_rate": 0.01}},
        "train": {"seq_len": 8, "global_batch": 4},
    }
    base = changed(small, change)

    def station(parallel: dict[str, Any], kind: str = "apex") -> Config:
        return Config.model_validate(changed(base, {"parallel": parallel, "train": {"optimizer": {"kind": kind}}}))

    journeys = {
        "torch": [station(SHARDED, "adamw"), station(SHARDED, "adamw")],
        "apex": [station(SHARDED), station(SHARDED)],
        "other layouts": [station(SPLIT), station(PIPED)],
        "torch to apex": [station(PIPED, "adamw"), station(SHARDED)],
    }
    traces = observed(list(journeys.values()), STEPS, 4, tmp_path_factory.mktemp("apex"))
    long = observed([[station(SHARDED)]], 2 * STEPS, 4, tmp_path_factory.mktemp("apex-long"))
    return dict(zip(journeys, traces, strict=True)) | {"long": long[0]}


def largest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a tensor."""
    return max(float((a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-30)) for name in a.keys() & b.keys())


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(found):
    assert found["apex"]["losses"] == found["long"]["losses"]
    assert largest(found["apex"]["weights"], found["long"]["weights"]) == 0
    assert set(found["apex"]["counts"]) == {2 * STEPS}


@pytest.mark.parametrize("name", ["apex", "other layouts", "torch to apex"])
def test_it_computes_what_torchs_adamw_does_whatever_the_layout(name, found):
    assert found[name]["losses"] == pytest.approx(found["torch"]["losses"], rel=1e-5)
    assert largest(found[name]["weights"], found["torch"]["weights"]) < 1e-5
    assert set(found[name]["counts"]) == {2 * STEPS}
