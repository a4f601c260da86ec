"""What is told without building a model, against what is built, moved and kept."""

from __future__ import annotations

import pytest
import torch
from sabotage import report_layout
from support import changed

from moesys.config import Config
from moesys.data.corpus import vocab_size
from moesys.models.decoder import Decoder
from moesys.parallel.degrees import resolve
from moesys.parallel.dimension import step_shape, traffic
from moesys.parallel.loss import TokenLoss
from moesys.parallel.memory import activations

COMBINATIONS = {
    "shard-ep-tp": {"dp_shard": "full", "ep": 2, "tp": 2},
    "pp-etp": {"pp": 2, "etp": 2},
    "hybrid-ep": {"dp_shard": 2, "ep": 4},
    "gathered-ep-etp": {"ep": 2, "etp": 2, "dispatch": {"kind": "all_gather", "chunks": 3}},
    "fp8-ep": {"ep": 4, "dispatch": {"payload": "fp8", "chunks": 2}},
    "two-nodes": {"ep": 4, "dispatch": {"kind": "hierarchical", "chunks": 2}},
}
RECOMPUTED = {"pp-etp": "full", "gathered-ep-etp": "selective", "fp8-ep": "selective", "two-nodes": "full"}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_parameters_and_bytes_on_the_way_to_experts_are_those_of_a_real_step(small, tmp_path, name):
    model = {"attention": {"bias": True}, "moe": {"shared_experts": 1}}
    change = {"parallel": COMBINATIONS[name], "train": {"recompute": RECOMPUTED.get(name, "none")}}
    cluster = {"nodes": 2, "ranks_per_node": 2} if name == "two-nodes" else {"ranks_per_node": 4}
    raw = changed(small, {"model": model, "cluster": cluster}, change)
    config = Config.model_validate(raw)
    measured = report_layout(config, 4, tmp_path)
    degrees, _ = resolve(config)
    for rank, (elements, _) in measured.items():
        shapes = step_shape(
            config,
            degrees,
            vocab_size(config),
            degrees.coordinates(rank, ("pp", "dp_replicate", "dp_shard", "cp", "tp"))["pp"],
        )
        assert sum(shape.held() for shape in shapes) == elements
    # A rank's own rows are not balanced on the way back, but those of all ranks together are known; how many
    # nodes and ranks a token's experts lie on depends on the routing.
    told: dict[str, float] = {}
    for rank in range(degrees.pp):
        for shape in step_shape(config, degrees, vocab_size(config), rank):
            for move in (m for m in traffic(shape) if m.axes == ("ep", "etp") and not m.small):
                key = f"{move.kind} {move.level or 'flat'}"
                told[key] = told.get(key, 0) + move.bytes * move.calls * degrees.stage
    found = {key: sum(sent[key] for _, sent in measured.values()) for key in measured[0][1]}
    assert found == pytest.approx(told, rel=0.15 if name == "two-nodes" else 1e-9)


MODELS = {
    "dense": {"ffn_hidden": 1024, "attention": {"heads": 4, "kv_heads": 2}},
    "moe": {"moe": {"experts": 8, "top_k": 2, "ffn_hidden": 512}},
    "fine": {"moe": {"experts": 16, "top_k": 4, "ffn_hidden": 64, "shared_experts": 2}},
    "lora": {"moe": {"experts": 8, "top_k": 2, "ffn_hidden": 512, "lora_rank": 8}},
    "mixed": {
        "moe": {
            "experts": 8, "ffn_hidden": 256, "shared_experts": 2, "shared_mix": "residual", "activation": "gelu",
        }
    },
    "latent": {
        "ffn_hidden": 1024,
        "attention": {
            "kind": "mla", "heads": 4, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
            "v_head_dim": 32,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_activations_are_what_autograd_keeps(model, dtype):
    sequence, batch, vocabulary = 128, 2, 320
    config = Config.model_validate(
        {
            "model": {"hidden": 256, "layers": 4, **model},
            "train": {"seq_len": sequence, "micro_batch": batch, "global_batch": batch, "dtype": dtype},
            "cluster": {"device": "cpu"},
        }
    )
    built = Decoder(config.model, vocabulary, getattr(torch, dtype))
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    weights = {p.untyped_storage().data_ptr() for p in built.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logits = built(torch.randint(0, vocabulary, (batch, sequence)))
    loss = TokenLoss(batch * sequence)(logits, torch.zeros(batch, sequence, dtype=torch.int64))
    # The loss keeps the logits, as their gradient.
    measured = sum(x.untyped_storage().nbytes() for x in kept.values()) + logits.nbytes
    degrees, _ = resolve(config)
    assert activations(step_shape(config, degrees, vocabulary, 0)) == pytest.approx(measured, rel=0.1)
    assert loss.requires_grad
