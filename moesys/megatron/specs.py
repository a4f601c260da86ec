"""The plug-in in Megatron-Core's specs of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

from megatron.core.models.gpt import gpt_layer_specs as theirs
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec

from moesys.megatron.arguments import Options
from moesys.megatron.layer import MoESysLayer

Spec = TypeVar("Spec")


def moe_layer_spec(options: Options | None = None) -> ModuleSpec:
    """The spec of the MoE layer alone, for `mlp` in a block's spec."""
    return ModuleSpec(module=MoESysLayer, params={"options": options or Options()})


def with_plug_in(spec: Spec, options: Options | None = None) -> Spec:
    """A copy of any spec (of a block, of a stack of blocks, of a hybrid model) with Megatron's MoE layers replaced.

    Dense layers, attention and norms stay, Transformer Engine's too.
    """
    return _replaced(spec, moe_layer_spec(options))  # type: ignore[no-any-return]


def _replaced(spec: Any, layer: ModuleSpec) -> Any:
    if (spec.func if isinstance(spec, partial) else getattr(spec, "module", spec)) is MoELayer:
        return layer
    if isinstance(spec, (list, tuple)):
        return type(spec)(_replaced(item, layer) for item in spec)
    if is_dataclass(spec) and not isinstance(spec, type):
        return replace(spec, **{f.name: _replaced(getattr(spec, f.name), layer) for f in fields(spec) if f.init})
    return spec


def _engine(config: Any, given: bool | None) -> bool:
    """True if the other layers are Transformer Engine's; by default as `--transformer-impl` says, if installed."""
    return bool(theirs.HAVE_TE and config.transformer_impl == "transformer_engine") if given is None else given


def gpt_layer_spec(config: Any, options: Options | None = None, transformer_engine: bool | None = None) -> ModuleSpec:
    """A GPT block whose feed-forward is the plug-in, for models whose blocks are all MoE.

    `transformer_engine`: use it for the other parts; default: as the configuration says.
    """
    own = {"num_experts": config.num_moe_experts, "moe_grouped_gemm": config.moe_grouped_gemm}
    own |= {"qk_layernorm": config.qk_layernorm, "multi_latent_attention": config.multi_latent_attention}
    if _engine(config, transformer_engine):
        return with_plug_in(theirs.get_gpt_layer_with_transformer_engine_spec(**own), options)
    return with_plug_in(theirs.get_gpt_layer_local_spec(**own, normalization=config.normalization), options)


def gpt_block_spec(
    config: Any, options: Options | None = None, transformer_engine: bool | None = None, **stage: Any
) -> Any:
    """This pipeline stage's blocks, dense ones and MoE ones as `config.moe_layer_freq` says.

    `stage`: further arguments of `get_gpt_decoder_block_spec` (`vp_stage`, `pp_rank`, `qk_l2_norm`).
    """
    own = {"normalization": config.normalization, "qk_l2_norm": config.qk_l2_norm} | stage
    engine = _engine(config, transformer_engine)
    return with_plug_in(theirs.get_gpt_decoder_block_spec(config, engine, **own), options)


def gpt_mtp_spec(
    config: Any, options: Options | None = None, transformer_engine: bool | None = None, **stage: Any
) -> Any:
    """The blocks of multi-token prediction, which are like the decoder's last block; None if there are none.

    `stage`: further arguments of `get_gpt_mtp_block_spec` (`vp_stage`, `pp_rank`).
    """
    if not config.mtp_num_layers:
        return None
    engine = _engine(config, transformer_engine)
    own = {"normalization": config.normalization, "qk_l2_norm": config.qk_l2_norm} | stage
    last = theirs.get_gpt_decoder_layer_specs(config, engine, **own)[-1]
    return with_plug_in(theirs.get_gpt_mtp_block_spec(config, last, engine, **stage), options)


def model_spec(options: Options | None = None) -> Callable[..., Any]:
    """The `transformer_layer_spec` of a `GPTModelConfig` of Megatron-LM 0.19: a function of it."""

    def spec(model: Any, vp_stage: int | None = None) -> Any:
        return gpt_block_spec(model.transformer, options, vp_stage=vp_stage)

    return spec
