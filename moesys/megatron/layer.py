"""This project's MoE layer where Megatron-Core expects its own."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesys.errors import Problem
from moesys.megatron.arguments import Options, from_transformer_config
from moesys.megatron.build import build
from moesys.megatron.refusal import Refusal
from moesys.megatron.scope import ProcessGroups
from moesys.megatron.sharded import sharded


class MoESysLayer(MegatronModule):
    """Gate, dispatcher, experts and shared experts of this project behind Megatron-Core's MoE contract.

    Args:
        config: `TransformerConfig`; `from_transformer_config` lists the fields that it reads.
        submodules: not used, because all parts are the project's own.
        layer_number: the block's, from 1.
        pg_collection: process groups; default, as up to Megatron-Core 0.17, those of `parallel_state`.
        is_mtp_layer: True in a block of multi-token prediction, where `layer_number` begins again from 1; versions
            from 0.17 on pass it. Its losses are reported after those of the decoder's blocks.
        name: not used; versions from 0.18 on pass it.
        options: the options that Megatron lacks.

    Attributes:
        moe: the layer itself, a `moesys.moe.MoELayer`.

    Raises:
        Refusal: an option of `config` that the plug-in cannot represent.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        options: Options | None = None,
    ):
        super().__init__(config)
        options = options or Options()
        self.groups = ProcessGroups.of(pg_collection)
        m = from_transformer_config(config, options.gate)
        self.moe = build(m, config, self.groups, options.dispatch_config(config))
        modules = config.recompute_modules if config.recompute_granularity == "selective" else ()
        self.recompute = _recomputed(set(modules or ()))
        self.first = config.num_layers if is_mtp_layer else 0
        if is_mtp_layer and getattr(config, "mtp_use_repeated_layer", False):
            self.moe.repeats = config.mtp_num_layers or 1
        self.layer_number: int | None = None
        if layer_number is not None:
            self.set_layer_number(layer_number)

    def set_layer_number(self, layer_number: int) -> None:
        """Set the number of the block, from 1 over all pipeline stages, for metrics and records of communication."""
        self.layer_number = layer_number
        self.moe.layer_number = self.first + layer_number
        if hasattr(self.moe.dispatcher, "layer"):
            self.moe.dispatcher.layer = f"layers.{self.first + layer_number - 1}.mlp"

    def forward(
        self, hidden_states: Tensor, *_: Any, padding_mask: Tensor | None = None, **__: Any
    ) -> tuple[Tensor, None]:
        """Output [S, B, H] of `hidden_states` [S, B, H], S this tensor rank's part under sequence parallelism.

        `padding_mask` bool [B, S] or [B, S of all tensor ranks], True for padding: such tokens count in no loss and
        in no load. They are routed as by Megatron, except under a capacity: there no expert computes them, because they
        would take places from others.
        """
        tp = self.groups.tp
        if self.training and tp.size() > 1 and not self.config.sequence_parallel:
            rule = f"must be on to train MoE layers with tensor_model_parallel_size({tp.size()})"
            raise Refusal([Problem("sequence_parallel", rule, "--sequence-parallel")])
        real_SB = None if padding_mask is None else self._real(padding_mask, len(hidden_states))
        if self.recompute and self.training and hidden_states.requires_grad:
            # As in Megatron, losses are computed in the recomputation alone, so that they count once.
            out = checkpoint(self.moe, hidden_states, real_SB, use_reentrant=True)
        else:
            out = self.moe(hidden_states, real_SB)
        return out, None

    def _real(self, padding_BS: Tensor, positions: int) -> Tensor:
        real_SB = ~padding_BS.bool().t()
        if len(real_SB) == positions:
            return real_SB
        return real_SB.chunk(self.groups.tp.size())[self.groups.tp.rank()]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The state for `megatron.core.dist_checkpointing`, under the names of Megatron's own layer."""
        return sharded(self.moe, self.groups, f"{prefix}moe.", prefix, sharded_offsets, metadata)


def _recomputed(modules: set[str]) -> bool:
    """True if these `recompute_modules` recompute the layer in backward."""
    if "moe" in modules:
        return True
    if part := modules & {"shared_experts", "moe_act"}:
        rule = "the plug-in recomputes the whole MoE layer or nothing of it"
        given = " and ".join(sorted(part))
        raise Refusal([Problem("recompute_modules", rule, f"moe in place of {given}", given)])
    return False
