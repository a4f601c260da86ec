"""A Megatron `GPTModel` with the plug-in and one with Megatron's own MoE layer: the same weights, on CPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moesys.megatron.cpu import cpu_substitutes
from moesys.megatron.mesh import forget

HIDDEN, EXPERTS, INNER, VOCABULARY, SEQUENCE, BATCH = 16, 8, 12, 32, 8, 3


@contextmanager
def megatron(**sizes: int) -> Iterator[None]:
    """Megatron's process groups, over the world that is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
        from megatron.core.transformer.moe import moe_utils
    with cpu_substitutes(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parallel_state.initialize_model_parallel(**sizes)
        moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
        try:
            yield
        finally:
            forget()


def transformer_config(kind: Any = None, **options: Any) -> Any:
    """A small `TransformerConfig`, or a `kind` of one."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    given = {
        "num_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": 2, "num_moe_experts": EXPERTS,
        "ffn_hidden_size": 20, "moe_ffn_hidden_size": INNER, "gated_linear_unit": True,
        "activation_func": nn.functional.silu, "add_bias_linear": False, "use_cpu_initialization": True,
        "moe_token_dispatcher_type": "alltoall", "moe_router_load_balancing_type": "none", "moe_router_topk": 2,
        "moe_router_dtype": "fp32", "hidden_dropout": 0.0, "attention_dropout": 0.0, "init_method_std": 0.3,
        "normalization": "RMSNorm",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (kind or TransformerConfig)(**{**given, **options})


def block_spec(config: Any, options: Any = None, plug_in: bool = True) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from moesys.megatron.model import Norm
    from moesys.megatron.specs import gpt_block_spec

    theirs = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
    spec = gpt_block_spec(config, options, transformer_engine=False) if plug_in else theirs
    spec.layer_norm = Norm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    return spec


def gpt_model(config: Any, plug_in: bool, options: Any = None) -> nn.Module:
    from megatron.core.models.gpt.gpt_model import GPTModel

    torch.manual_seed(7)
    return GPTModel(
        config, block_spec(config, options, plug_in), VOCABULARY, SEQUENCE, position_embedding_type="learned_absolute"
    )


def moe_pairs(mine: nn.Module, theirs: nn.Module, same: bool = False) -> list[tuple[Any, Any]]:
    """Their MoE layers; `same`: both have the plug-in."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from moesys.megatron.layer import MoESysLayer

    found = [[m for m in model.modules() if isinstance(m, kind)] for model, kind in
             ((mine, MoESysLayer), (theirs, MoESysLayer if same else MoELayer))]  # fmt: skip
    return list(zip(*found, strict=True))


def copy_weights(mine: nn.Module, theirs: nn.Module) -> None:
    """Give `mine` the weights of `theirs`."""
    from moesys.megatron.weights import from_megatron

    state = {n: p for n, p in theirs.state_dict().items() if ".mlp.router" not in n and "experts" not in n}
    left = mine.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and all(".mlp.moe." in n for n in left.missing_keys), left
    for own, other in moe_pairs(mine, theirs):
        own.moe.load_state_dict(from_megatron(other.state_dict(), other.config.gated_linear_unit))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare_gradients(mine: nn.Module, theirs: nn.Module) -> None:
    """Every gradient of one model is that of the other, to 1e-5."""
    from moesys.megatron.weights import from_megatron

    our, their = gradients(mine), gradients(theirs)
    dense = {n for n in their if n in our}
    assert dense
    for name in dense:
        torch.testing.assert_close(our[name], their[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for own, other in moe_pairs(mine, theirs):
        found, expected = gradients(own.moe), from_megatron(gradients(other), other.config.gated_linear_unit)
        assert set(found) == set(expected) and found
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def losses(keep: bool = False) -> dict[str, Tensor]:
    """What is in Megatron's metrics since the last call, by layer; `keep`: it stays there."""
    try:  # from 0.18 on
        from megatron.core.transformer.moe import moe_logging
    except ImportError:
        from megatron.core.transformer.moe import moe_utils

        tracker = moe_utils.get_moe_layer_wise_logging_tracker()
        found = {name: entry["values"].clone() for name, entry in tracker.items()}
        if not keep:
            tracker.clear()
        return found
    found = {name: entry.values.clone() for name, entry in moe_logging.get_moe_metrics_tracker().metrics.items()}
    if not keep:
        moe_logging.destroy_moe_metrics_tracker()
    return found


def batch(seed: int = 3) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def run(model: nn.Module, seed: int = 3, padding_mask: Tensor | None = None, share: float = 1.0) -> Tensor:
    """Losses of tokens [B, S], after backward of `share` of their mean."""
    ids, labels = batch(seed)
    positions = torch.arange(SEQUENCE).expand_as(ids)
    out = model(ids, positions, None, labels=labels, padding_mask=padding_mask)
    (out.mean() * share).backward()
    return out.detach()
