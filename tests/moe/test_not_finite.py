"""Tokens that are not finite pass every gate: the step that sees them is skipped, not broken off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gate_cases import H, drawn
from support import changed

from moesys.config.schema import MoEConfig
from moesys.models.moe import build_moe

BASE: dict[str, Any] = {"experts": 4, "top_k": 2, "ffn_hidden": 8, "z_loss": 0.01}
GATES: dict[str, dict[str, Any]] = {
    "top_k": {"bias_rate": 0.1, "global_balance_loss": 0.1},
    "top_k, capacity by weight": {"capacity_factor": 1.0},
    "top_k, priority": {"capacity_factor": 1.0, "drop": "priority", "pad_to_capacity": True},
    "groups": {"gate": {"score": "sigmoid", "groups": 2, "groups_kept": 1, "noise": "gaussian"}, "load_loss": 0.0},
    "second": {"gate": {"second": "random"}},
    "zero": {"zero_experts": 1, "copy_experts": 1, "constant_experts": 1},
    "cosine": {"gate": "cosine"},
    "prototype": {"gate": "prototype"},
    "expert_choice": {"gate": "expert_choice"},
    "causal": {"gate": {"kind": "expert_choice", "causal": True}},
    "sinkhorn": {"gate": "sinkhorn"},
    "base": {"gate": "base", "top_k": 1},
    "hash": {"gate": "hash"},
    "random": {"gate": "random"},
    "dense": {"gate": "dense"},
    "soft": {"gate": "soft"},
    "smear": {"gate": "smear"},
}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", GATES)
def test_a_step_that_is_not_finite_ends_and_moves_no_gate(name, bad):
    config = MoEConfig.model_validate(changed(BASE, GATES[name]))
    layer = drawn(build_moe(config, H, 0))
    layer.gate.reset_state()
    state = {key: value.clone() for key, value in layer.gate.state_dict_buffers()}
    x_BSH = torch.randn(2, 8, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_BSH[1, 3:] = bad
    x_BSH.requires_grad_()
    tokens_BS2 = torch.stack((torch.arange(16).view(2, 8), torch.arange(16).view(2, 8)), -1)
    out = layer(x_BSH, tokens_BS2)
    out.sum().backward()
    assert not out.isfinite().all() or not all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    layer.gate.skip_step()
    statistics = layer.gate.step_statistics()
    assert statistics is None or not statistics.any(), "the step is forgotten"
    assert all(torch.equal(value, state[key]) for key, value in layer.gate.state_dict_buffers())
