"""The gate against Megatron-Core 0.16.1's own TopKRouter, in float32 on CPU.

Where Megatron deviates by definition, the relation that holds is tested and said:

- its balance losses count the plain top-k of the scores: selection bias and groups do not count, as they do
  in ours (both count before drops) unless told otherwise (`counts="scores"`);
- its global loss divides by the tokens of all data ranks and is then averaged over these ranks again, so
  that its effective coefficient is α / DP; and over accumulation steps it uses the mean of the counts so far;
- it adds the raw logits up for the scores of groups under softmax-after-selection;
- its group score is the sum of the k / groups_kept best: "max" or "top2" where that is 1 or 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gate_cases import passed
from torch import Tensor

from moesys.moe import Tokens
from moesys.moe.capacity import Capacity
from moesys.moe.gates import TopKGate
from moesys.moe.gates.top_k import Groups
from moesys.moe.losses import Balance
from moesys.moe.routing import MicroBatch

S, B, H, E = 12, 3, 16, 8
T = S * B


@dataclass
class Group:
    """Stands for a process group."""

    ranks: int = 1

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return 0


@pytest.fixture
def megatron(monkeypatch) -> Iterator[Any]:
    """Its modules, with stand-ins for what needs CUDA or Transformer Engine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.transformer.moe import moe_utils, router
        from megatron.core.transformer.transformer_config import TransformerConfig
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    # Without Transformer Engine 0.16.1 forgets to define it.
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)
    monkeypatch.setattr(moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(1.0))
    monkeypatch.setattr(moe_utils, "_MOE_LAYER_WISE_LOGGING_TRACKER", {})
    monkeypatch.setattr(moe_utils, "reduce_from_tensor_model_parallel_region", lambda load, group: load)
    with torch.compiler.set_stance("force_eager"):
        yield SimpleNamespace(utils=moe_utils, router=router, config=TransformerConfig)


def theirs(megatron: Any, data_ranks: int = 1, **options: Any) -> Any:
    """A router with weights of its own."""
    options = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = megatron.config(
            num_layers=1, hidden_size=H, num_attention_heads=1, num_moe_experts=E, use_cpu_initialization=True,
            add_bias_linear=False, moe_router_pre_softmax=options.pop("pre_softmax", False), **options,
        )  # fmt: skip
    groups = SimpleNamespace(tp=Group(), cp=Group(), tp_cp=Group(), tp_dp_cp=Group(data_ranks))
    torch.manual_seed(0)
    found = megatron.router.TopKRouter(config, groups)
    torch.nn.init.normal_(found.weight, std=0.4)
    found.set_layer_number(1)
    return found


def ours(router: Any, top_k: int, **options: Any) -> TopKGate:
    """A gate with the router's weights."""
    gate = TopKGate(H, E, top_k, **options)
    gate.projection.weight.data = router.weight.data.clone()
    if gate.bias_rate:
        gate.selection_bias.copy_(router.expert_bias)
    return gate


def tokens() -> Tensor:
    return torch.randn(B, S, H, generator=torch.Generator().manual_seed(5))


def run_theirs(router: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [B, S, E], counts [E], gradient of the weight for a fixed target and all losses)."""
    router.weight.grad = None
    weights, chosen = router(x.transpose(0, 1).contiguous())
    weights = weights.view(x.shape[1], x.shape[0], E).transpose(0, 1)
    (weights * target(x)).sum().backward()
    return weights.detach(), chosen.sum(0), router.weight.grad


def run_ours(gate: TopKGate, x: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """The same, and the losses."""
    rows = x.flatten(0, 1)
    routing = passed(gate, rows, Tokens(torch.arange(len(rows)), sequences=len(x)))
    table = torch.zeros(len(rows), E).index_put((routing.token_A, routing.expert_A), routing.weight_A, True)
    loss = sum(routing.losses.values(), torch.zeros(()))
    gradient = torch.autograd.grad((table.view(*x.shape[:2], E) * target(x)).sum() + loss, gate.projection.weight)[0]
    return table.view(*x.shape[:2], E).detach(), routing.expert_A.bincount(minlength=E), gradient, routing.losses


def target(x: Tensor) -> Tensor:
    return torch.randn(*x.shape[:2], E, generator=torch.Generator().manual_seed(6))


def agree(router: Any, gate: TopKGate, x: Tensor | None = None) -> dict[str, Tensor]:
    """Assert that weights, loads and gradients are the same; our losses."""
    x = tokens() if x is None else x
    their, our = run_theirs(router, x), run_ours(gate, x)
    torch.testing.assert_close(our[0], their[0])
    assert torch.equal(our[1], their[1])
    torch.testing.assert_close(our[2], their[2], rtol=1e-4, atol=1e-6)
    return our[3]


@pytest.mark.parametrize("scale", [None, 2.5])
@pytest.mark.parametrize(("top_k", "pre"), [(1, True), (2, True), (2, False), (8, True), (8, False)])
def test_softmax(megatron, top_k, pre, scale):
    router = theirs(megatron, moe_router_topk=top_k, pre_softmax=pre, moe_router_topk_scaling_factor=scale)
    agree(router, ours(router, top_k, normalize=not pre, scale=scale or 1.0))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_sigmoid(megatron, top_k, biased):
    router = theirs(
        megatron,
        moe_router_topk=top_k,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=biased,
        moe_router_topk_scaling_factor=1.5,
    )
    if biased:
        router.expert_bias.normal_(std=0.3)
    # With one expert Megatron does not normalise.
    agree(router, ours(router, top_k, score="sigmoid", normalize=top_k > 1, scale=1.5, bias_rate=0.1 * biased))


@pytest.mark.parametrize(("top_k", "score"), [(2, "max"), (4, "top2")])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "biased"])
def test_groups(megatron, top_k, score, kind):
    function = "softmax" if kind == "softmax" else "sigmoid"
    router = theirs(
        megatron,
        moe_router_topk=top_k,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_score_function=function,
        moe_router_enable_expert_bias=kind == "biased",
        pre_softmax=function == "softmax",
    )
    if kind == "biased":
        router.expert_bias.normal_(std=0.3)
    groups = Groups(4, 2, score)
    normalize = function == "sigmoid"
    gate = ours(router, top_k, score=function, normalize=normalize, groups=groups, bias_rate=0.1 * (kind == "biased"))
    agree(router, gate)
    ungrouped = ours(router, top_k, score=function, normalize=normalize)
    # The two best of all experts are always in two groups of best experts.
    limited = not torch.equal(run_ours(ungrouped, tokens())[0], run_ours(gate, tokens())[0])
    assert limited or (score == "max" and kind != "biased")


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("drop", ["weight", "position"])
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_capacity(megatron, monkeypatch, factor, drop, pad):
    """Of weights that differ by more than 12 bits: our rule compares no finer."""
    if drop == "position":
        # Megatron takes the first rows by the largest of zeros and ones, and hopes that topk keeps their order.
        monkeypatch.setattr(torch, "topk", first_of_equals)
    router = theirs(
        megatron,
        moe_router_topk=2,
        moe_expert_capacity_factor=factor,
        moe_token_drop_policy={"weight": "probs"}.get(drop, drop),
        moe_pad_expert_input_to_capacity=pad,
        pre_softmax=True,
    )
    gate = ours(router, 2, normalize=False, capacity=Capacity(factor, drop=drop, pad=pad))
    x = tokens()[:1]  # a place in the batch is [sequence, sample] there, and [sample, sequence] here
    weights = (x[0] @ router.weight.T).softmax(-1).topk(2).values.flatten().sort().values
    assert (weights.diff() / weights[1:]).min() > 2.0**-13 or drop == "position"
    agree(router, gate, x)


def first_of_equals(x: Tensor, k: int, dim: int = -1, **_: Any) -> tuple[Tensor, Tensor]:
    found = x.sort(dim=dim, descending=True, stable=True)
    return found.values.narrow(dim, 0, k), found.indices.narrow(dim, 0, k)


LOSSES = {"aux_loss": "balance", "seq_aux_loss": "sequence_balance", "global_aux_loss": "global_balance"}
LOGGED = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


@pytest.mark.parametrize("factor", [None, 0.5])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", LOSSES)
def test_balance_losses(megatron, kind, score, factor):
    """Of one micro-batch on one rank; with drops too, which neither counts."""
    router = theirs(
        megatron,
        moe_router_topk=2,
        moe_router_score_function=score,
        moe_router_load_balancing_type=[kind],
        moe_aux_loss_coeff=[0.7],
        moe_expert_capacity_factor=factor,
        pre_softmax=score == "softmax",
    )
    gate = ours(
        router,
        2,
        score=score,
        normalize=score == "sigmoid",
        balance=Balance(**{LOSSES[kind]: 0.7}),
        capacity=Capacity(factor),
    )
    losses = agree(router, gate)
    logged = megatron.utils.get_moe_layer_wise_logging_tracker()[LOGGED[kind]]["values"][0]
    torch.testing.assert_close(losses[LOSSES[kind]], 0.7 * logged)


def test_all_losses_together(megatron):
    router = theirs(
        megatron,
        moe_router_topk=2,
        moe_router_load_balancing_type=list(LOSSES),
        moe_aux_loss_coeff=[0.1, 0.2, 0.3],
        moe_z_loss_coeff=0.05,
    )
    agree(router, ours(router, 2, balance=Balance(0.1, 0.2, 0.3, z=0.05)))


def test_z_loss(megatron):
    router = theirs(megatron, moe_router_topk=2, moe_z_loss_coeff=0.3)
    losses = agree(router, ours(router, 2, balance=Balance(z=0.3)))
    logged = megatron.utils.get_moe_layer_wise_logging_tracker()["z_loss"]["values"][0]
    torch.testing.assert_close(losses["z"], 0.3 * logged)


def test_their_balance_ignores_the_bias_and_ours_does_not(megatron):
    options = {
        "moe_router_topk": 2,
        "moe_router_score_function": "sigmoid",
        "moe_router_load_balancing_type": ["aux_loss"],
    }
    router = theirs(megatron, moe_router_enable_expert_bias=True, moe_aux_loss_coeff=[0.7], **options)
    router.expert_bias.normal_(std=0.5)
    run_theirs(router, tokens())
    logged = megatron.utils.get_moe_layer_wise_logging_tracker()["load_balancing_loss"]["values"][0]
    plain, biased = (
        run_ours(ours(router, 2, score="sigmoid", bias_rate=rate, balance=Balance(0.7)), tokens())[3]["balance"]
        for rate in (0.0, 0.1)
    )
    torch.testing.assert_close(plain, 0.7 * logged)
    assert abs(biased / plain - 1) > 0.01


@pytest.mark.parametrize("kind", LOSSES)
def test_counting_scores_is_what_they_do(megatron, kind):
    """With a bias and groups, which their balance losses do not see."""
    router = theirs(
        megatron,
        moe_router_topk=4,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type=[kind],
        moe_aux_loss_coeff=[0.7],
    )
    router.expert_bias.normal_(std=0.5)
    options = {"score": "sigmoid", "groups": Groups(4, 2, "top2"), "bias_rate": 0.1}
    agree(router, ours(router, 4, **options, balance=Balance(**{LOSSES[kind]: 0.7}), counts="scores"))


def test_their_global_loss_is_divided_by_the_data_ranks(megatron, monkeypatch):
    """This rank's share, with another rank's tokens counted: ours over DP, both then averaged over DP."""
    router = theirs(
        megatron, data_ranks=2, moe_router_topk=2, moe_router_load_balancing_type=["global_aux_loss"],
        moe_aux_loss_coeff=[0.7],
    )  # fmt: skip
    other = torch.arange(E)
    monkeypatch.setattr(
        megatron.utils,
        "reduce_from_tensor_model_parallel_region",
        lambda load, group: load + other * T * 2 // 28 if group.size() == 2 else load,
    )
    x = tokens()
    run_theirs(router, x)
    logged = megatron.utils.get_moe_layer_wise_logging_tracker()["global_load_balancing_loss"]["values"][0]

    class Ranks(MicroBatch):
        def sum_global(self, load: Tensor) -> Tensor:
            return load + other * T * 2 // 28

    gate = ours(router, 2, balance=Balance(global_balance=0.7))
    loss = gate(x.flatten(0, 1), Tokens(torch.arange(T), sequences=B), Ranks()).losses["global_balance"]
    counts = Ranks().sum_global(gate(x.flatten(0, 1), Tokens(torch.arange(T)), MicroBatch()).load_E)
    # The other rank's counts, whole numbers, are not exactly as many as this one's.
    exact = counts.sum() / (2 * T * 2)
    torch.testing.assert_close(0.7 * logged * 2, loss * exact)


def test_their_global_loss_sees_the_steps_so_far(megatron):
    """At the last micro-batch of a step both know the whole step; before, only ours does."""
    router = theirs(
        megatron, moe_router_topk=2, moe_router_load_balancing_type=["global_aux_loss"], moe_aux_loss_coeff=[0.7]
    )
    gate = ours(router, 2, balance=Balance(global_balance=0.7))
    halves = [tokens(), torch.randn(B, S, H) + 0.5]
    with torch.no_grad():
        for half in halves:
            run = passed(gate, half.flatten(0, 1), Tokens(torch.arange(T), sequences=B))
            assert run.losses == {}
    gate.before_step(gate.step_statistics().double())
    for half, equal in zip(halves, (False, True), strict=True):
        their, our = run_theirs(router, half)[2], run_ours(gate, half)[2]
        assert torch.allclose(our, their, rtol=1e-4, atol=1e-6) == equal


def test_the_bias_moves_as_theirs(megatron):
    """Without drops: theirs counts the load after them, ours before."""
    router = theirs(
        megatron, moe_router_topk=2, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True
    )
    gate = ours(router, 2, score="sigmoid", bias_rate=0.02)
    for _ in range(3):
        x = torch.randn(B, S, H)
        run_theirs(router, x)
        run_ours(gate, x)
        assert torch.equal(gate.step_statistics(), router.local_tokens_per_expert.long())
        gate.after_step(gate.step_statistics().double())
        load = router.local_tokens_per_expert
        router.expert_bias += torch.sign(load.mean() - load) * 0.02
        load.zero_()
        assert torch.equal(gate.selection_bias, router.expert_bias)
