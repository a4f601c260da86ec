"""Modules that are used as a library start from values of their own, never from what lay in memory."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

import moesys.models
import moesys.moe
from moesys.config.schema import ModelConfig
from moesys.models.attention import CausalCore, LatentAttention, SharedKey, Sinks
from moesys.models.block import Block, PredictionBlock
from moesys.models.decoder import Decoder, Embedding
from moesys.models.decoding import LastToken
from moesys.models.key_cache import CachedCore, LatentCache
from moesys.models.layers import FeedForward, LayerNorm, Linear, RMSNorm
from moesys.models.parts.model import block
from moesys.models.rotary import rotary_angles
from moesys.moe import MoELayer
from moesys.moe.experts import Experts
from moesys.moe.gates import Gate, PrototypeGate, TopKGate
from moesys.moe.gates.base import BaseGate
from moesys.moe.gates.cosine import CosineProjection
from moesys.moe.gates.dense import DenseGate
from moesys.moe.gates.expert_choice import CausalExpertChoiceGate, ExpertChoiceGate
from moesys.moe.gates.hash import HashGate
from moesys.moe.gates.projection import GateProjection
from moesys.moe.gates.random import RandomGate
from moesys.moe.gates.replay import ReplayGate
from moesys.moe.gates.scored import ScoredGate
from moesys.moe.gates.sinkhorn import SinkhornGate
from moesys.moe.gates.smear import SmearGate
from moesys.moe.gates.soft import SoftGate
from moesys.moe.gates.sparsemixer import SparseMixerGate
from moesys.moe.gates.top_k import Randomness
from moesys.moe.lora import Frozen, LoRAExperts
from moesys.moe.routing import MicroBatch
from moesys.moe.shared import ConditionalMix, GatedMix, Mix, ResidualMix
from moesys.moe.zero import ZeroExperts, ZeroRule

H, F, E, V, B, S = 16, 12, 4, 32, 2, 8

RAW = {"hidden": H, "layers": 1, "moe": {"experts": E, "ffn_hidden": F, "bias": True, "shared_experts": 1}}
GQA = ModelConfig.model_validate(RAW | {"attention": {"heads": 2, "bias": True, "qk_norm": "head", "sinks": True}})
MLA = ModelConfig.model_validate(RAW | {"attention": {"kind": "mla", "heads": 2, "q_lora_rank": 8}})

Run = Callable[[nn.Module], Tensor]


def tokens() -> Tensor:
    number = torch.arange(B * S).view(B, S)
    return torch.stack((number, number % V), -1)


def layer(gate: nn.Module, zero: ZeroExperts | None = None, experts: nn.Module | None = None) -> Tensor:
    """Output of a layer around a gate, or around other parts."""
    assert isinstance(gate, Gate)
    if isinstance(gate, HashGate):
        gate.fit(torch.ones(V, dtype=torch.int64))
    if isinstance(gate, ReplayGate):
        gate.load(0, torch.zeros(1, 1, dtype=torch.int16))
    made = MoELayer(gate, experts or Experts(E, H, F), zero=zero)  # type: ignore[arg-type]
    return made(torch.randn(B, S, H), tokens())


def attention(module: nn.Module) -> Tensor:
    size = block(MLA if isinstance(module, LatentAttention) else GQA, 0).mixer.rotary_dim
    return module(torch.randn(B, S, H), *rotary_angles(torch.arange(S), size, 1e4))


def mixed(mix: nn.Module) -> Tensor:
    x = torch.randn(B * S, H)
    return mix(x, MicroBatch()).join(x, x)


def with_experts(experts: nn.Module) -> Tensor:
    return layer(TopKGate(H, E, 2), experts=experts)


def with_zero(zero: nn.Module) -> Tensor:
    return layer(TopKGate(H, E, 2, zero=ZeroRule(E, 4)), zero)  # type: ignore[arg-type]


def vectors(module: nn.Module) -> Tensor:
    return module(torch.randn(B * S, H))


def predicted(block: nn.Module) -> Tensor:
    return block(torch.randn(B, S, H), *rotary_angles(torch.arange(S), H // 2, 1e4), tokens(), torch.randn(B, S, H))


CASES: list[tuple[Callable[[], nn.Module], Run]] = [
    (partial(Experts, E, H, F), with_experts),
    (partial(Experts, E, H, F, "gelu", bias=True), with_experts),
    (partial(LoRAExperts, E, H, F, 2), with_experts),
    (partial(Frozen, H, F), vectors),
    (partial(ZeroExperts, H, 1, 1, 2), with_zero),
    (partial(TopKGate, H, E, 2, bias_rate=0.1, randomness=Randomness(gaussian=True)), layer),
    (partial(TopKGate, H, E, 2, projection=GateProjection(H, E, bias=True)), layer),
    (partial(PrototypeGate, H, E, 2), layer),
    (partial(SparseMixerGate, H, E, 2, threshold=0.1), layer),
    (partial(ScoredGate, H, E), lambda gate: gate.projection(torch.randn(B, H))),
    (partial(BaseGate, H, E), layer),
    (partial(DenseGate, H, E), layer),
    (partial(ExpertChoiceGate, H, E, 2), layer),
    (partial(CausalExpertChoiceGate, H, E, 2, bins=8), layer),
    (partial(HashGate, E, 2, 0, True), layer),
    (partial(RandomGate, E, 2, 0), layer),
    (partial(ReplayGate, H, E), layer),
    (partial(SinkhornGate, H, E, 2), layer),
    (partial(SmearGate, H, E), layer),
    (partial(SoftGate, H, E, 2), layer),
    (partial(CosineProjection, H, E, 8), vectors),
    (partial(GateProjection, H, E), vectors),
    (Mix, mixed),
    (partial(GatedMix, H), mixed),
    (partial(ResidualMix, H), mixed),
    (partial(ConditionalMix, H, 0.8, 0.1), mixed),
    (lambda: MoELayer(TopKGate(H, E, 2), Experts(E, H, F)), lambda made: made(torch.randn(B, S, H))),
    (partial(Linear, H, F), vectors),
    (partial(RMSNorm, H, 1e-6), vectors),
    (partial(LayerNorm, H, 1e-6), vectors),
    (partial(FeedForward, H, F), vectors),
    (partial(Embedding, V, H), lambda made: made(tokens()[..., 1])),
    (block(GQA, 0).mixer.build, attention),
    (block(MLA, 0).mixer.build, attention),
    (CausalCore, lambda made: made(*torch.randn(3, B, S, 2, 8))),
    (partial(Sinks, 2), lambda made: made()),
    (SharedKey, lambda made: made(torch.randn(B, S, 8), *rotary_angles(torch.arange(S), 8, 1e4))),
    (lambda: CachedCore(CausalCore()), lambda made: made(*torch.randn(3, B, S, 2, 8))),
    (LatentCache, lambda made: made(torch.randn(B, S, 8), torch.randn(B, S, 1, 4))[0]),
    (lambda: LastToken(Linear(H, V, bias=False)), lambda made: made(torch.randn(B, S, H))),
    (partial(Block, GQA, 0), attention),
    (partial(PredictionBlock, GQA, 0), predicted),
    (partial(Decoder, GQA, V), lambda made: made(tokens()[..., 1], tokens())),
    (partial(Decoder, MLA, V), lambda made: made(tokens()[..., 1], tokens())),
]
NAMES = [f"{number} {getattr(build, 'func', build).__name__}" for number, (build, _) in enumerate(CASES)]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote to is full of NaN."""
    torch.use_deterministic_algorithms(True)
    before, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    assert torch.empty(3).isnan().all()
    torch.manual_seed(0)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


def check(module: nn.Module, run: Run) -> None:
    for name, x in (*module.named_parameters(), *module.named_buffers()):
        assert x.isfinite().all(), name
    for name, parameter in module.named_parameters():
        if (
            not name.endswith(("bias", "lora_b", "log_temperature"))
            and not any(word in name for word in ("norm", "sinks"))
            and not isinstance(module, (RMSNorm, LayerNorm, Sinks))
        ):
            assert 0.005 < float(parameter.detach().std()) < 1.5, name
    assert run(module).isfinite().all()


@pytest.mark.parametrize(("build", "run"), CASES, ids=NAMES)
def test_a_module_starts_by_itself(build: Callable[[], nn.Module], run: Run) -> None:
    check(build(), run)


@pytest.mark.parametrize(("build", "run"), CASES, ids=NAMES)
def test_a_module_starts_after_it_was_built_without_memory(build: Callable[[], nn.Module], run: Run) -> None:
    """As torch does it: `to_empty`, then each module's `reset_parameters`."""
    with torch.device("meta"):
        module = build()
    module.to_empty(device="cpu")
    own = [x for x in (*module.parameters(), *module.buffers()) if x.is_floating_point()]
    assert all(x.isnan().all() for x in own)
    for part in module.modules():
        if any(True for _ in (*part.parameters(recurse=False), *part.buffers(recurse=False))):
            part.reset_parameters()  # type: ignore[operator]
    check(module, run)


def test_every_public_module_is_here() -> None:
    found = set()
    for package in (moesys.moe, moesys.models):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for name, value in vars(import_module(info.name)).items():
                if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == info.name:
                    found |= set() if name.startswith("_") else {value}
    assert found - {type(build()) for build, _ in CASES} == {Gate}  # which has no parameters and routes nothing
