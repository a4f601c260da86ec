"""This project's MoE layer, by this project's definitions, in a block of a Megatron-Core model.

It is for models that a YAML describes, with keys that mean the same as for the native engine. `MoESysLayer` is for
models that a `TransformerConfig` describes, and follows Megatron's definitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from moesys.config.schema import Config
from moesys.megatron.build import mark
from moesys.megatron.experts import MegatronExperts
from moesys.megatron.mesh import MegatronRanks
from moesys.megatron.scope import ProcessGroups
from moesys.megatron.sharded import sharded
from moesys.megatron.shared import SharedExperts
from moesys.models.moe import build_gate
from moesys.moe.layer import MoELayer
from moesys.moe.shared import build_mix
from moesys.moe.zero import ZeroExperts
from moesys.parallel.dispatchers.build import builder
from moesys.parallel.scope import SplitMicroBatch, WholeMicroBatch


@dataclass(frozen=True)
class PackedTokens:
    """Packs a token's number in the run and its id into one int64, which passes through Megatron's model.

    Megatron gives every MoE layer a padding mask [B, S]. A run without padding does not need it, so packed tokens take
    its place. `vocabulary` is larger than any id.
    """

    vocabulary: int

    def pack(self, number_BS: Tensor, id_BS: Tensor) -> Tensor:
        """Number and id, each int64 [B, S], as one int64 [B, S]."""
        return number_BS * self.vocabulary + id_BS

    def unpack(self, marks_BS: Tensor) -> Tensor:
        """Number and id, [B, S, 2]."""
        number = marks_BS.div(self.vocabulary, rounding_mode="floor")
        return torch.stack((number, marks_BS - number * self.vocabulary), -1)


class Split(SplitMicroBatch):
    """A micro-batch over tensor ranks; Megatron may have split its packed tokens already, as it splits the stream."""

    def part(self, tokens: Tensor) -> Tensor:
        """This rank's part [B, S / tp, …] of packed tokens [B, S, …], or of those that Megatron has split already."""
        return tokens if tokens.shape[1] == len(self.positions) else super().part(tokens)


class NativeLayer(MegatronModule):
    """The MoE layer of block `layer` (from 0) of the model of `run`: [S, B, H] → [S, B, H] and no bias.

    Attributes:
        moe: the layer itself, batch first: [B, S, H].
    """

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        *,
        run: Config,
        ranks: MegatronRanks,
        marks: PackedTokens,
        layer: int,
        **_: Any,
    ):
        super().__init__(config)
        self.groups, self.marks, self.layer = ProcessGroups.of(), marks, layer
        self.moe = build(run, ranks, self.groups, config, layer)

    def forward(
        self, hidden_states: Tensor, *_: Any, padding_mask: Tensor | None = None, **__: Any
    ) -> tuple[Tensor, None]:
        """`padding_mask`: packed tokens, int64 [B, S], of all positions or of this tensor rank's."""
        tokens = None if padding_mask is None else self.marks.unpack(padding_mask)
        return self.moe(hidden_states.transpose(0, 1), tokens).transpose(0, 1).contiguous(), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The state for `megatron.core.dist_checkpointing`, under the names of Megatron's own layer."""
        return sharded(self.moe, self.groups, f"{prefix}moe.", prefix, sharded_offsets, metadata)


def build(run: Config, ranks: MegatronRanks, groups: ProcessGroups, config: Any, layer: int) -> MoELayer:
    """The layer on this rank, not initialised. Collective over the ranks of its expert group."""
    m, hidden, d, t = run.model.moe, run.model.hidden, ranks.degrees, run.train
    assert m is not None
    with ranks.device, torch.random.fork_rng([] if ranks.device.type == "cpu" else [ranks.device]):
        shared = None
        if m.shared_experts:
            shared = SharedExperts(hidden, m.shared_width, m.activation, groups.tp, config.sequence_parallel, True)
        experts = MegatronExperts(m.experts // d.ep, hidden, m.ffn_hidden // d.etp, m.activation, m.bias)
        computed = m.copy_experts + m.constant_experts
        zero = ZeroExperts(hidden, m.zero_experts, m.copy_experts, m.constant_experts) if computed else None
        mix = build_mix(m.shared_mix, hidden, m.cmr_budget, m.cmr_loss)
        moe = MoELayer(build_gate(m, hidden, layer), experts, shared, zero, mix)
    moe.to(dtype=config.params_dtype)
    moe.gate.reset_state()
    data, spread = ranks.group("dp_replicate", "dp_shard"), ranks.group("tp")
    moe.scope = WholeMicroBatch(data)
    if spread is not None:
        positions = torch.arange(t.seq_len, device=ranks.device)
        moe.scope = Split(data, spread, positions, d.tp, ranks.place["tp"])
    # Megatron averages gradients over data ranks.
    moe.loss_scale = d.dp * t.micro_batch / t.global_batch
    if (make := builder(run, ranks)) is not None:
        moe.dispatcher = dispatcher = make(moe.gate.experts)
        dispatcher.layer = f"layers.{layer}"
    mark(moe, config, groups)
    return moe
