"""Multi-token prediction of the native model against Megatron-Core's, of the same weights: loss and every gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron_sides import BATCH, HIDDEN, SEQUENCE, VOCABULARY, batch, megatron, transformer_config
from torch import Tensor, nn

from moesys.config import Config
from moesys.megatron.model import Norm
from moesys.models.decoder import Decoder
from moesys.parallel.compose import FILLER
from moesys.parallel.loss import IGNORED, TokenLoss
from moesys.parallel.step_statistics import later

DEPTH, WEIGHT, HEADS, INNER, EPS = 2, 0.4, 2, 20, 1e-5


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("world")
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=0, world_size=1)
    with megatron():
        yield
    dist.destroy_process_group()


def theirs() -> nn.Module:
    config = transformer_config(
        num_moe_experts=None, moe_ffn_hidden_size=None, layernorm_epsilon=EPS,
        mtp_num_layers=DEPTH, mtp_loss_scaling_factor=WEIGHT,
        calculate_per_token_loss=True,  # losses are sums over tokens: the paper divides each depth's by all T tokens
    )  # fmt: skip
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer = replace(layer, submodules=replace(layer.submodules, input_layernorm=Norm, pre_mlp_layernorm=Norm))
    ahead = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False)
    for spec in ahead.layer_specs:
        spec.submodules.enorm = spec.submodules.hnorm = spec.submodules.layer_norm = Norm
    torch.manual_seed(7)
    found: nn.Module = GPTModel(
        config, layer, VOCABULARY, SEQUENCE, mtp_block_spec=ahead, position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3)
    return found


RENAMED = {"enorm": "embed_norm", "hnorm": "hidden_norm", "eh_proj": "project", "final_layernorm": "norm"}
BLOCK = {
    "input_layernorm": "attention_norm",
    "pre_mlp_layernorm": "ffn_norm",
    "self_attention.linear_proj": "attention.o_proj",
}


def ours_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Megatron's tensors by our names."""
    edges = {"embedding.word_embeddings": "embed", "output_layer": "head", "decoder.final_layernorm": "norm"}
    found = {f"{ours}.weight": tensors[f"{name}.weight"] for name, ours in edges.items()}
    places = {f"decoder.layers.{i}.": f"layers.{i}." for i in range(2)}
    for depth in range(DEPTH):
        at = f"layers.{2 + depth}."
        places[f"mtp.layers.{depth}.transformer_layer."] = at
        found |= {f"{at}{own}.weight": tensors[f"mtp.layers.{depth}.{name}.weight"] for name, own in RENAMED.items()}
    for place, at in places.items():
        found |= {f"{at}{own}.weight": tensors[f"{place}{name}.weight"] for name, own in BLOCK.items()}
        qkv = tensors[f"{place}self_attention.linear_qkv.weight"].view(HEADS, 3, -1, HIDDEN)
        found |= {f"{at}attention.{x}_proj.weight": qkv[:, i].flatten(0, 1) for i, x in enumerate("qkv")}
        gate, up = tensors[f"{place}mlp.linear_fc1.weight"].chunk(2)
        found |= {f"{at}ffn.gate_proj.weight": gate, f"{at}ffn.up_proj.weight": up}
        found[f"{at}ffn.down_proj.weight"] = tensors[f"{place}mlp.linear_fc2.weight"]
    return found


def test_loss_and_every_gradient_equal_megatrons() -> None:
    other, (ids, labels) = theirs(), batch()
    expected = other(ids, torch.arange(SEQUENCE).expand_as(ids), None, labels=labels).sum()
    expected.backward()
    model = {
        "hidden": HIDDEN, "layers": 2, "ffn_hidden": INNER, "norm_eps": EPS, "attention": {"heads": HEADS},
        "mtp": {"depth": DEPTH, "loss_weight": WEIGHT},
    }  # fmt: skip
    config = Config.model_validate({"model": model}).model
    mine = Decoder(config, VOCABULARY)
    mine.load_state_dict(ours_of(other.state_dict()))
    tokens = torch.stack((torch.arange(BATCH * SEQUENCE).view_as(ids), ids, *later(ids, DEPTH, FILLER)), -1)
    loss = TokenLoss(1, weights=config.loss_weights)
    found = loss(mine(ids, tokens), torch.stack((labels, *later(labels, DEPTH, IGNORED)), 1))
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    gradients = ours_of({name: p.grad for name, p in other.named_parameters()})
    assert gradients.keys() == dict(mine.named_parameters()).keys()
    for name, parameter in mine.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert (parameter.grad - gradients[name]).norm() < 1e-5 * gradients[name].norm(), name
