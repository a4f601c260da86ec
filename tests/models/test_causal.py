"""What a position predicts depends on the tokens before it, whatever the gate; else the page of gates says so."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from support import changed

from moesys.config import Config
from moesys.config.schema import GateConfig
from moesys.models.decoder import Decoder

SEES_OTHERS = {"expert_choice", "sinkhorn", "base", "soft", "smear"}
"""Gates that assign or merge over many tokens at once."""
NEEDS_A_RECORD = {"replay"}
VOCAB, SEQUENCE, FROM = 64, 32, 20


def logits(model: dict, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of two texts that differ from position `FROM` on, under one random model in training mode."""
    torch.manual_seed(0)
    decoder = Decoder(Config.model_validate(model).model, VOCAB, torch.float64).double()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    decoder.train()
    ids = torch.randint(VOCAB, (sequences, SEQUENCE))
    other = ids.clone()
    other[:, FROM:] = (other[:, FROM:] + 1) % VOCAB
    numbers = torch.arange(ids.numel()).view_as(ids)
    with torch.no_grad():
        first, second = (decoder(x, torch.stack([numbers, x], -1)) for x in (ids, other))
    return first, second


def differs(small: dict, moe: dict, sequences: int = 2) -> tuple[bool, bool]:
    """Whether logits before, and from, the first changed token differ."""
    first, second = logits(changed(small, {"model": {"moe": moe}}), sequences)
    apart = (first - second).abs().amax((0, 2)) > 1e-9
    return bool(apart[:FROM].any()), bool(apart[FROM:].any())


@pytest.mark.parametrize("kind", sorted({*get_args(GateConfig.model_fields["kind"].annotation)} - NEEDS_A_RECORD))
def test_no_position_sees_later_tokens(small, kind):
    moe = {"gate": kind} | ({"top_k": 1} if kind == "base" else {})
    assert differs(small, moe) == (kind in SEES_OTHERS, True)


def test_causal_expert_choice_does_not_see_them(small):
    assert differs(small, {"gate": {"kind": "expert_choice", "causal": True}}) == (False, True)


@pytest.mark.parametrize("drop", ["weight", "position"])
def test_under_capacity_later_tokens_displace_earlier_ones_by_weight_alone(small, drop):
    assert differs(small, {"capacity_factor": 0.7, "drop": drop}, sequences=1)[0] == (drop == "weight")
