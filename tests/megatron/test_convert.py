"""Whole models with the same weights: the native decoder, and GPTModels with the plug-in and with Megatron's layer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from megatron_sides import block_spec, megatron, transformer_config
from torch import Tensor, nn

from moesys.config.schema import ModelConfig
from moesys.megatron.convert import from_gpt, to_gpt
from moesys.megatron.names import ParameterNames
from moesys.megatron.weights import Place
from moesys.models.decoder import Decoder
from moesys.parallel.initialise import initialise

VOCABULARY, SEQUENCE = 64, 12

MODEL = ModelConfig.model_validate(
    {
        "hidden": 16,
        "layers": 3,
        "ffn_hidden": 20,
        "attention": {"heads": 4, "kv_heads": 2, "qk_norm": "head"},
        "moe": {
            "experts": 8,
            "top_k": 2,
            "ffn_hidden": 12,
            "every": 2,
            "shared_experts": 1,
            "shared_mix": "gate",
            "gate": {"score": "sigmoid"},
            "bias_rate": 0.01,
        },
    }
)


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with megatron():
        yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    made = Decoder(MODEL, VOCABULARY)
    initialise(made, seed=3, std=0.3, tied=False)
    with torch.no_grad():
        for name, buffer in made.named_buffers():
            if name.endswith("selection_bias"):
                buffer.copy_(torch.linspace(-0.2, 0.2, len(buffer)))
    return made.eval()


def gpt(plug_in: bool) -> nn.Module:
    from megatron.core.models.gpt.gpt_model import GPTModel

    from moesys.megatron.model import Norm

    config = transformer_config(
        num_layers=3, num_attention_heads=4, num_query_groups=2, num_moe_experts=8, moe_ffn_hidden_size=12,
        moe_layer_freq=[0, 1, 0], qk_layernorm=True, moe_shared_expert_intermediate_size=12,
        moe_shared_expert_gate=True, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
    )  # fmt: skip
    spec = block_spec(config, plug_in=plug_in)
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.q_layernorm = Norm
        layer.submodules.self_attention.submodules.k_layernorm = Norm
    return GPTModel(config, spec, VOCABULARY, SEQUENCE, position_embedding_type="rope").eval()


def states(decoder: Decoder) -> dict[str, Tensor]:
    return {name: value for name, value in decoder.state_dict().items() if not name.endswith("load")}


@pytest.mark.parametrize("plug_in", [True, False])
def test_a_model_with_the_same_weights_computes_the_same(decoder: Decoder, plug_in: bool) -> None:
    model = gpt(plug_in)
    to_gpt(model, states(decoder), MODEL)
    ids = torch.randint(VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(ids, torch.arange(SEQUENCE).expand_as(ids), None)
        torch.testing.assert_close(found, decoder(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plug_in", [True, False])
def test_there_and_back(decoder: Decoder, plug_in: bool) -> None:
    model, expected = gpt(plug_in), states(decoder)
    to_gpt(model, expected, MODEL)
    found = from_gpt(model, VOCABULARY, MODEL)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_grouped_experts_are_sequential_ones_by_other_names() -> None:
    names = ParameterNames(MODEL, VOCABULARY, Place(ep_rank=1, ep=2, etp_rank=1, etp=2))
    for product, weight in (("fc1", torch.empty(12, 16)), ("fc2", torch.empty(16, 6))):
        pairs = (f"mlp.experts.local_experts.3.linear_{product}.weight", f"mlp.experts.linear_{product}.weight3")
        one, other = (names._block("layers.1.", name, weight) for name in pairs)
        assert one == other
        assert one[0].index[0] == slice(7, 8)
        assert one[0].view(weight).shape == torch.Size(i.stop - i.start for i in one[0].index)


def test_a_weight_that_no_decoder_has_is_named() -> None:
    with pytest.raises(KeyError, match=r"linear_q_proj"):
        names = ParameterNames(MODEL, VOCABULARY, Place())
        names._block("layers.0.", "self_attention.linear_q_proj.weight", torch.empty(1))
