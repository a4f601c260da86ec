"""Precision, compilation and hangs, in real processes."""

from __future__ import annotations

import pytest
import torch
from sabotage import stall_the_second_rank
from support import changed

from moesys.config import Config
from moesys.errors import LaunchError
from moesys.train import verify


@pytest.mark.parametrize("parallel", [{"ep": 2}, {"dp_shard": "full", "ep": 2}, {"tp": 2, "ep": 2}], ids=str)
def test_bfloat16_keeps_float32_weights_and_the_loss(small, parallel):
    raw = changed(small, {"parallel": parallel, "cluster": {"ranks_per_node": 2}})
    config = Config.model_validate(raw)
    found = verify.trace(config, 2, 3, "bfloat16")
    exact = verify.trace(verify.reference(config), 1, 3)
    assert {p.dtype for p in found.parameters.values()} == {torch.float32}
    assert found.losses == pytest.approx(exact.losses, rel=2e-3)
    assert found.losses != exact.losses, "bfloat16 was not used"


def test_float64_agrees_far_below_float32(small):
    config = Config.model_validate(changed(small, {"parallel": {"pp": 2, "ep": 2}, "cluster": {"ranks_per_node": 4}}))
    report = verify.verify(config, 4, 2, 1e-12, "float64")
    assert report.passed, report


def test_what_is_not_finite_is_not_compared(small):
    change = {"model": {"layers": 1, "hidden": 32}, "train": {"optimizer": {"lr": 1e30}}}
    config = Config.model_validate(changed(small, change, {"name": "ruined"}))
    with pytest.raises(
        LaunchError, match=r"ruined in 1 process cannot be compared: step 2 is not finite: .*\n.*remedy"
    ):
        verify.trace(config, 1, 3)


def test_compiled_blocks_compute_the_same(small):
    change = {"model": {"layers": 1}, "train": {"compile": True, "recompute": "none"}}
    report = verify.verify(Config.model_validate(changed(small, change)), 1, 1, 1e-5)
    assert report.passed, report


def test_a_rank_that_hangs_ends_the_others_after_the_timeout(small):
    """The one that hangs would sleep for ten minutes: that process 0 fails is the timeout's work."""
    change = {"parallel": {"ep": 2}, "cluster": {"ranks_per_node": 2}, "launch": {"timeout_s": 10.0}}
    with pytest.raises(LaunchError, match=r"^process 0 failed: waited for another rank in vain: .*[Tt]im(ed )?out"):
        verify.trace(Config.model_validate(changed(small, change)), 2, 1, prepare=stall_the_second_rank)
