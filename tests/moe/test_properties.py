"""What every gate must keep, whatever the shape: searched for by hypothesis."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import get_args

import pytest
import torch
from gate_cases import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesys.config.schema import GateConfig, MoEConfig
from moesys.models.moe import build_moe
from moesys.moe import MoELayer, Routing, Tokens
from moesys.moe.gates.expert_choice import CausalExpertChoiceGate
from moesys.moe.gates.hash import HashGate
from moesys.moe.gates.replay import ReplayGate

H, VOCABULARY = 6, 11
KINDS = get_args(GateConfig.model_fields["kind"].annotation)
LEARNED_WEIGHTS = {"top_k", "cosine", "prototype"}

OPTIONS: dict[str, list[dict]] = {
    "top_k": [
        {},
        {"normalize": False, "scale": 2.5, "sequence_balance_loss": 0.1, "importance_loss": 0.1, "z_loss": 0.1},
        {"capacity_factor": 0.5},
        {"capacity_factor": 0.7, "drop": "priority", "pad_to_capacity": True},
        {"gate": {"score": "sigmoid", "noise": "gaussian", "jitter": 0.1}, "bias_rate": 0.1},
        {"gate": {"force": "balanced"}},
        {"gate": {"force": "skewed"}, "global_balance_loss": 0.1},
        {"zero_experts": 1, "copy_experts": 1, "constant_experts": 1},
        {"top_k": 2, "gate": {"second": "random"}, "capacity_factor": 0.5},
        {"balance_counts": "first", "global_balance_loss": 0.1, "bias_rate": 0.1},
    ],
    "expert_choice": [{}, {"capacity_factor": 2.0, "z_loss": 0.1}, {"gate": {"causal": True}}],
    "hash": [{}, {"gate": {"table": "balanced"}}],
    "soft": [{}, {"gate": {"slots": 3}}],
    "dense": [{"z_loss": 0.1}],
}


@dataclass(frozen=True)
class Case:
    """A layer and its input: B sequences of S tokens; how logits look, whether tokens are alike."""

    kind: str
    option: dict
    experts: int
    top_k: int
    sequences: int
    length: int
    logits: str
    alike: bool

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    def config(self) -> MoEConfig:
        top_k = {"top_k": self.top_k} if self.kind not in ("dense", "soft", "smear") else {}
        gate = {"kind": self.kind, **self.option.get("gate", {})}
        return MoEConfig(
            **{"experts": self.experts, "ffn_hidden": 4, **top_k, **self.option, "gate": GateConfig(**gate)}
        )

    def layer(self) -> MoELayer:
        built = drawn(build_moe(self.config(), H, layer=0))
        if self.logits != "drawn":
            # Equal scores of all experts, or one that is far ahead where the first element is positive.
            for name, parameter in built.gate.named_parameters():
                torch.nn.init.zeros_(parameter) if not name.endswith("temperature") else None
                if self.logits == "one" and name == "projection.weight":
                    parameter.data[-1, 0] = 50.0
        if isinstance(built.gate, CausalExpertChoiceGate) and self.alike:
            built.gate.threshold_E.fill_(0.9 / self.experts)
        else:
            built.gate.reset_state()
        if isinstance(built.gate, HashGate):
            built.gate.fit(torch.arange(VOCABULARY)) if built.gate.balanced else None
        if isinstance(built.gate, ReplayGate):
            table = torch.arange(8 * self.top_k).view(8, -1) % (self.experts + 1) - 1
            built.gate.load(0, table.to(torch.int16))
        return built

    def input(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.tokens)
        x = torch.randn(self.tokens, H, dtype=torch.float64, generator=generator)
        x[:, 0] = x[:, 0].abs()
        if self.alike:
            x = x[:1].expand(self.tokens, H).clone()
        number = torch.arange(self.tokens) + 100
        marks = torch.stack([number, number % VOCABULARY], -1)
        return x.view(self.sequences, self.length, H), marks.view(self.sequences, self.length, 2)


@st.composite
def cases(draw: st.DrawFn, kind: str) -> Case:
    experts = draw(st.integers(1, 7))
    top_k = draw(st.integers(1, experts))
    if kind == "base":
        top_k = 1
    if kind == "prototype":
        top_k = draw(st.sampled_from([k for k in range(1, experts + 1) if experts % k == 0]))
    option = draw(st.sampled_from(OPTIONS.get(kind, [{}])))
    if "top_k" in option:
        top_k = option["top_k"]
        experts = max(experts, top_k)
    return Case(
        kind,
        option,
        experts,
        top_k,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 6)),
        draw(st.sampled_from(["drawn", "equal", "one"])),
        draw(st.booleans()),
    )


def searched(test):
    """Few cases, the same every time."""
    return settings(max_examples=30, derandomize=True, deadline=None, database=None)(test)


@pytest.mark.parametrize("kind", KINDS)
@searched
@given(data=st.data())
def test_outputs_and_gradients_are_finite(kind, data):
    case = data.draw(cases(kind))
    layer, (x, marks) = case.layer(), case.input()
    x.requires_grad_()
    for training in (True, False):
        layer.train(training)
        out = layer(x, marks)
        assert out.shape == x.shape and out.isfinite().all()
    layer.train()
    layer(x, marks).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
    for name, parameter in layer.experts.named_parameters():
        assert parameter.grad is not None, name
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("soft", "smear")])
@searched
@given(data=st.data())
def test_routings_are_well_formed(kind, data):
    case = data.draw(cases(kind))
    layer, (x, marks) = case.layer(), case.input()
    number, identity = marks.flatten(0, 1).unbind(-1)
    m, t, e, k = case.config(), case.tokens, case.experts, case.top_k
    routing = layer.gate(x.flatten(0, 1), Tokens(number, case.sequences, identity), layer.scope)
    assert isinstance(routing, Routing) and routing.load_E is not None
    assert len(routing.token_A) == len(routing.expert_A) == len(routing.weight_A)
    assert (routing.token_A.diff() >= 0).all()
    for index, limit in ((routing.token_A, t), (routing.expert_A, e)):
        assert index.dtype == torch.int64 and ((index >= 0) & (index < limit)).all()
    assert routing.weight_A.isfinite().all() and (routing.weight_A >= 0).all()
    assert all(loss.ndim == 0 and loss.isfinite() for loss in routing.losses.values())
    load = routing.expert_A.bincount(minlength=e)
    assert int(routing.load_E.sum()) - int(routing.dropped) <= len(routing.token_A)
    if not m.pad_to_capacity:
        assert int(routing.load_E.sum()) - int(routing.dropped) == len(routing.token_A)
        pairs = routing.token_A * e + routing.expert_A
        assert len(pairs.unique()) == len(pairs), "an expert gets a token once"
    if (
        kind in LEARNED_WEIGHTS | {"sinkhorn", "base", "hash", "random"}
        and not m.zero_computation
        and m.gate.second == "always"
    ):
        assert routing.load_E.sum() == t * k
    if m.capacity_factor is not None and kind in LEARNED_WEIGHTS:
        assert load.max() <= ceil(m.capacity_factor * t * k / e)
    if kind == "expert_choice" and not m.gate.causal:
        assert load.tolist() == [min(t, ceil((m.capacity_factor or 1.0) * t * k / e))] * e
    if kind == "base":
        assert load.max() <= ceil(t / e)
    if kind == "dense":
        assert load.tolist() == [t] * e
    if m.gate.force == "balanced":
        assert load.max() - load.min() <= 1


@pytest.mark.parametrize("kind", KINDS)
@searched
@given(data=st.data())
def test_the_order_of_sequences_does_not_matter(kind, data):
    case = data.draw(cases(kind))
    layer, (x, marks) = case.layer(), case.input()
    order = torch.tensor(data.draw(st.permutations(range(case.sequences))))
    plain = layer(x, marks)
    torch.testing.assert_close(layer(x[order], marks[order]), plain[order], rtol=1e-9, atol=1e-12)
