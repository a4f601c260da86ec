"""Every field of the installed Megatron-Core is decided about: followed, refused, or not of the layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron_sides import megatron, transformer_config

from moesys.errors import ConfigError
from moesys.megatron import fields as tables
from moesys.megatron.arguments import from_transformer_config
from moesys.megatron.layer import MoESysLayer
from moesys.megatron.unsupported import UNSUPPORTED

INSTALLED = {f.name for f in fields(TransformerConfig)}

ASKED: dict[str, Any] = {
    "moe_latent_size": 8,
    "moe_router_force_biased": 0.0,
    "moe_router_topk_limited_devices": 2,
    "moe_expert_rank_capacity_factor": 1.5,
    "moe_mlp_glu_interleave_size": 32,
    "moe_shared_expert_glu_interleave_size": 32,
    "transformer_impl": "inference_optimized",
    "fp8": "hybrid",
    "fp4": "e2m1",
    "quant_recipe": object(),
    "cuda_graph_impl": "local",
    "offload_modules": ["core_attn", "moe_act"],
    "gtp_weight_remat_size": 2,
    "expert_gtp_weight_remat_size": 2,
    "tensor_parallel_num_weight_shards": 2,
    "expert_tensor_parallel_num_weight_shards": 2,
}
"""A value of each refused field that asks for what it does; of the others: True."""

BESIDE = {
    "offload_modules": {"fine_grained_activation_offloading": True},
    "use_mup": {"add_bias_linear": True},
}
"""What must be set, too."""


@contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        with megatron():
            yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("config", [TransformerConfig, MLATransformerConfig])
def test_every_field_is_decided_about(config):
    assert list(tables.undecided(config)) == []


def test_a_field_is_decided_about_once():
    groups = (tables.READ, set(UNSUPPORTED), set(tables.EFFECTIVE), set(tables.UNRELATED))
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_a_field_that_nobody_decided_about_is_found():
    later = make_dataclass("Later", [("moe_router_magic", float, 0.0), ("rope_magic", bool, False)])
    assert list(tables.undecided(later)) == ["moe_router_magic", "rope_magic"]


def test_what_a_later_release_adds_to_the_layer_is_refused_where_it_is_set():
    later = make_dataclass(
        "Later", [("moe_router_magic", float, 0.0), ("rope_magic", bool, False)], bases=(TransformerConfig,)
    )
    config = transformer_config(kind=later, rope_magic=True)
    from_transformer_config(config)
    config.moe_router_magic = 0.5
    with pytest.raises(ConfigError, match=r"moe_router_magic is 0.5: not known to the plug-in, which was made for"):
        from_transformer_config(config)


@pytest.mark.parametrize("name", sorted(INSTALLED & set(UNSUPPORTED)))
def test_what_is_refused_is_refused_by_name_and_with_the_reason(name):
    config = transformer_config()
    from_transformer_config(config)
    for other, value in {**BESIDE.get(name, {}), name: ASKED.get(name, True)}.items():
        setattr(config, other, value)
    with pytest.raises(ConfigError) as error:
        from_transformer_config(config)
    assert f"{name} is {ASKED.get(name, True)!r}: not in the plug-in: {UNSUPPORTED[name].why}" in str(error.value)
    assert f"remedy: {UNSUPPORTED[name].remedy}" in str(error.value)
    assert len(error.value.problems) == 1


def test_offloading_outside_of_the_layer_is_megatrons_own():
    config = transformer_config()
    config.fine_grained_activation_offloading, config.offload_modules = True, ["core_attn", "mlp_norm"]
    from_transformer_config(config)


@pytest.mark.parametrize("modules", [["shared_experts"], ["moe_act", "layernorm"]])
def test_the_layer_is_recomputed_whole_or_not(modules, tmp_path):
    config = transformer_config(moe_shared_expert_intermediate_size=12)
    config.recompute_granularity, config.recompute_modules = "selective", modules
    with one_rank(tmp_path):
        with pytest.raises(ConfigError, match=f"recompute_modules is {modules[0]}: the plug-in recomputes the whole"):
            MoESysLayer(config)
        config.recompute_modules = ["moe", *modules]
        assert MoESysLayer(config).recompute


CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1},
    {
        "moe_router_load_balancing_type": ["global_aux_loss"], "moe_aux_loss_coeff": [0.1], "moe_z_loss_coeff": 0.1,
        "moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_shared_expert_intermediate_size": 12,
        "mtp_num_layers": 2, "mtp_use_repeated_layer": True, "recompute_granularity": "selective",
    },
)  # fmt: skip


def test_what_is_said_to_be_read_is_read(tmp_path):
    """While the layer is built, or run."""
    seen: set[str] = set()

    class Watched(TransformerConfig):
        watching = False

        def __getattribute__(self, name: str) -> Any:
            if name != "watching" and self.watching:
                seen.add(name)
            return super().__getattribute__(name)

    with one_rank(tmp_path):
        for options in CONFIGURATIONS:
            known = {name: value for name, value in options.items() if name in INSTALLED}
            config = transformer_config(kind=Watched, **known)
            config.watching = True
            layer = MoESysLayer(config, is_mtp_layer="mtp_num_layers" in options, layer_number=1)
            layer(torch.randn(4, 2, 16, requires_grad=True))[0].sum().backward()
    assert tables.READ & INSTALLED - seen == set()
