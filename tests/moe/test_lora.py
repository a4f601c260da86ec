"""LoRA experts against the feed-forward with the changed matrices, in float64; what is frozen."""

import re

import pytest
import torch
from torch import Tensor

from moesys.config import Config
from moesys.config.schema import MoEConfig
from moesys.kernels.permute import sort_by_expert
from moesys.models.moe import build_moe
from moesys.moe import MoELayer
from moesys.moe.lora import LoRAExperts
from moesys.parallel import dimension, freeze

H, F, E, R, T = 12, 10, 4, 3, 14


def randomised(experts: LoRAExperts) -> LoRAExperts:
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return experts.double()


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def changed(experts: LoRAExperts, e: int, factor: float) -> tuple[list[Tensor], Tensor]:
    """The inner matrices [H, F] (gate, then up) and the outer one [F, H] of expert e, formed."""
    inner = [
        w.T + factor * experts.fc1_lora_a[e, :, g] @ experts.fc1_lora_b[e, g]
        for g, w in enumerate(experts.base["fc1"].weight.split(F))
    ]
    return inner, experts.base["fc2"].weight.T + factor * experts.fc2_lora_a[e] @ experts.fc2_lora_b[e]


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("by_token", [True, False])
def test_output_and_gradients_are_those_of_the_changed_matrices(activation, by_token):
    experts = randomised(LoRAExperts(E, H, F, R, alpha=6.0, activation=activation))
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    # Expert 2 gets nothing, token 3 neither.
    token = torch.tensor([t for t in range(T) if t != 3]).repeat_interleave(2)
    expert = torch.tensor([0, 1, 3, 1]).repeat(7)[: len(token)]
    weight = torch.rand(len(token), dtype=torch.float64, requires_grad=True)
    p = sort_by_expert(token, expert, T, E)
    if by_token:
        out = experts(x, p.counts_E, weight[p.order_A], p)
    else:
        rows = experts(x[p.token_A], p.counts_E, weight[p.order_A])
        out = torch.zeros_like(x).index_add(0, p.token_A, rows)
    expected = torch.zeros_like(x)
    for t, e, w in zip(token.tolist(), expert.tolist(), weight, strict=True):
        inner, outer = changed(experts, e, 6.0 / R)
        h = [x[t] @ m for m in inner]
        y = silu(h[0]) * h[1] if activation == "swiglu" else h[0].clamp(min=0) ** 2
        expected = expected.index_add(0, torch.tensor([t]), (w * (y @ outer))[None])
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    target, inputs = torch.randn_like(x), [x, weight, *(q for q in experts.parameters() if q.requires_grad)]
    for ours, theirs in zip(
        torch.autograd.grad((out * target).sum(), inputs),
        torch.autograd.grad((expected * target).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def layer() -> MoELayer:
    raw = {"experts": E, "top_k": 2, "ffn_hidden": F, "balance_loss": 0.0, "lora_rank": R}
    built = build_moe(MoEConfig.model_validate(raw), H, 0)
    torch.nn.init.normal_(built.gate.projection.weight)
    randomised(built.experts)
    return built.double()


def test_it_starts_as_the_dense_feed_forward():
    moe = layer()
    for b in (moe.experts.fc1_lora_b, moe.experts.fc2_lora_b):
        torch.nn.init.zeros_(b)
    x = torch.randn(1, T, H, dtype=torch.float64)
    gate, up = (x @ w.T for w in moe.experts.base["fc1"].weight.split(F))
    torch.testing.assert_close(moe(x), (silu(gate) * up) @ moe.experts.base["fc2"].weight.T, rtol=1e-10, atol=1e-12)


def test_the_dense_feed_forward_gets_no_gradient():
    moe = layer()
    moe(torch.randn(1, T, H, dtype=torch.float64)).square().sum().backward()
    without = {name for name, q in moe.named_parameters() if q.grad is None}
    assert without == {"experts.base.fc1.weight", "experts.base.fc2.weight"}


def test_no_rows_at_all_give_zero_gradients():
    experts = randomised(LoRAExperts(E, H, F, R))
    x = torch.empty(0, H, dtype=torch.float64, requires_grad=True)
    experts(x, torch.zeros(E, dtype=torch.int64)).sum().backward()
    assert x.grad.shape == x.shape
    for parameter in experts.parameters():
        assert not parameter.requires_grad or parameter.grad.abs().max() == 0


def problems(moe: dict, world: int = 1, **sections) -> list:
    model = {"hidden": 64, "layers": 2, "moe": {"experts": 4, "ffn_hidden": 48, **moe}}
    return dimension.check(Config.model_validate({"model": model, **sections}), world)


@pytest.mark.parametrize(
    ("moe", "key", "rule"),
    [
        ({"lora_alpha": 8.0}, "model.moe.lora_alpha", r"\(8\) has no meaning: model.moe.lora_rank is not set"),
        ({"lora_rank": 49}, "model.moe.lora_rank", r"\(49\) must be at most 48"),
        ({"lora_rank": 4, "bias": True}, "model.moe.bias", "true has no meaning with lora_rank"),
        ({"lora_rank": 4, "gate": "smear"}, "model.moe.lora_rank", "smear mixes whole experts"),
    ],
)
def test_keys_without_meaning_are_refused(moe, key, rule):
    (problem,) = problems(moe)
    assert problem.key == key
    assert re.search(rule, problem.rule)


def test_what_cannot_be_split_is_refused():
    (problem,) = problems({"lora_rank": 4}, 2, parallel={"etp": 2})
    assert problem.key == "parallel.etp"
    assert re.search(r"etp\(2\) cannot split LoRA experts \(lora_rank 4\)", problem.rule)
    (problem,) = problems({"lora_rank": 4, "ffn_hidden": 45}, 2, parallel={"dp_shard": 2})
    assert problem.key == "parallel.dp_shard"
    assert re.search(r"edp_shard\(2\) must divide model.moe.ffn_hidden\(45\)", problem.rule)


def test_patterns_that_freeze_nothing_or_everything_are_refused():
    (problem,) = problems({}, train={"freeze": ["layers.*.attention.*", "layer.0.*"]})
    assert problem.key == "train.freeze"
    assert problem.rule == "'layer.0.*' matches no parameter"
    assert "embed.weight" in problem.remedy
    (problem,) = problems({}, train={"freeze": ["*"]})
    assert problem.rule == "(*) leaves nothing to train"


def test_frozen_names():
    model = {"hidden": 64, "layers": 2, "moe": {"experts": 4, "ffn_hidden": 48, "lora_rank": 2, "every": 2}}
    config = Config.model_validate({"model": {**model, "ffn_hidden": 48}, "train": {"freeze": ["layers.0.ffn.*"]}})
    names = freeze.frozen_names(config.model, config.train.freeze)
    assert names == {
        *(f"layers.0.ffn.{name}_proj.weight" for name in ("gate", "up", "down")),
        *(f"layers.1.ffn.experts.base.fc{n}.weight" for n in (1, 2)),
    }
