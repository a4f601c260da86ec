"""One decoder block, dense or MoE, as parts that a compiler takes whole."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moesys.models.layers import Linear, norm
from moesys.models.parts.model import block as describe
from moesys.moe import MoELayer
from moesys.moe.layer import Lazy, RoutedTokens

Part = tuple[nn.Module, str]
"""A module and the name of one of its methods."""

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`: [B, S, H] → [B, S, H].

    `forward` runs `parts` one after another. Each is a function of its inputs and the weights: it changes nothing
    and never waits for the device, so that it can be one compiled graph, and be computed again in backward. What
    lies between them has side effects, or must know sizes: a pass is counted, and tokens are dispatched.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        parts = describe(config, layer)
        self.attention_norm = norm(config.norm, config.hidden, config.norm_eps)
        self.attention = parts.mixer.build()
        self.ffn_norm = norm(config.norm, config.hidden, config.norm_eps)
        self.ffn: nn.Module = parts.ffn.build()
        self.rotary_dim = parts.mixer.rotary_dim
        self.branch_scale = config.residual_multiplier

    def parts(self) -> list[Part]:
        """Methods to compile, and to compute again, each as a whole."""
        moe = self.ffn
        if not isinstance(moe, MoELayer):
            return [(self, "run_dense")]
        whole: list[Part] = [] if self._apart(moe) else [(self, "run_experts")]
        shared: list[Part] = [] if moe.shared is None else [(moe, "run_shared")]
        return [(self, "route"), *whole, *shared, (self, "finish")]

    def whole(self) -> Part:
        """The method that full recomputation repeats. It ends with what backward does not need the result of."""
        return self, "forward"

    @staticmethod
    def _apart(moe: MoELayer) -> bool:
        """Whether experts are never a part, but lie between two."""
        return moe.apart or moe.dispatcher.communicates

    def forward(self, x_BSH: Tensor, cos: Tensor, sin: Tensor, tokens_BS2: Tensor | None = None) -> Tensor:
        moe = self.ffn
        if not isinstance(moe, MoELayer):
            return self.run_dense(x_BSH, cos, sin)
        x_BSH, h_BSH, routed = self.route(x_BSH, cos, sin, tokens_BS2)
        # Graphs are made for sizes: one whose sizes change from step to step would be made anew.
        whole = not self._apart(moe) and not routed.output.ragged
        routed = routed.compacted()
        moe.count(routed)
        if whole:
            return self.run_experts(x_BSH, h_BSH, routed)
        dense = None if moe.shared is None else Lazy(partial(moe.run_shared, h_BSH))
        routed_BSH = moe.run_experts(h_BSH, routed, dense)
        return self.finish(x_BSH, h_BSH, routed_BSH, routed, None if dense is None else dense())

    def _attend(self, x_BSH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self._add(x_BSH, self.attention(self.attention_norm(x_BSH), cos, sin))

    def _add(self, x_BSH: Tensor, branch_BSH: Tensor) -> Tensor:
        """The stream after a branch, which may have a factor (Granite)."""
        return torch.add(x_BSH, branch_BSH, alpha=self.branch_scale)

    def run_dense(self, x_BSH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The whole of a block without experts. cos, sin [S, d]."""
        x_BSH = self._attend(x_BSH, cos, sin)
        return self._add(x_BSH, self.ffn(self.ffn_norm(x_BSH)))

    def route(
        self, x_BSH: Tensor, cos: Tensor, sin: Tensor, tokens_BS2: Tensor | None
    ) -> tuple[Tensor, Tensor, RoutedTokens]:
        """The stream after attention, the MoE layer's input, and its routed tokens. cos, sin [S, d]."""
        assert isinstance(self.ffn, MoELayer)
        x_BSH = self._attend(x_BSH, cos, sin)
        h_BSH = self.ffn.enter(self.ffn_norm(x_BSH))
        return x_BSH, h_BSH, self.ffn.route(h_BSH, tokens_BS2)

    def run_experts(self, x_BSH: Tensor, h_BSH: Tensor, routed: RoutedTokens) -> Tensor:
        """All that follows `route`, where nothing comes between."""
        assert isinstance(self.ffn, MoELayer)
        return self._add(x_BSH, self.ffn.leave(self.ffn.compute(h_BSH, routed)))

    def finish(
        self, x_BSH: Tensor, h_BSH: Tensor, routed_BSH: Tensor, routed: RoutedTokens, dense_BSH: Tensor | None
    ) -> Tensor:
        """What follows the routed experts, where these are no part."""
        assert isinstance(self.ffn, MoELayer)
        return self._add(x_BSH, self.ffn.leave(self.ffn.join(h_BSH, routed_BSH, routed, dense_BSH)))


class PredictionBlock(Block):
    """A block of multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2), with its own last norm.

    Depth k of D, from 1, gives for token i what the head makes the logits of token i + k + 1 of:
    h_k = norm(block(project(embed_norm(embedding of token i + k), hidden_norm(h_{k−1})))), where h_0 are the outputs of
    the model's last norm, as in Megatron-Core and in transformers.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        usual = dict(self.named_children())
        for name in usual:
            delattr(self, name)
        # Parameters lie in the order of computation, about which gradients are completed.
        self.embed_norm = norm(config.norm, config.hidden, config.norm_eps)
        self.hidden_norm = norm(config.norm, config.hidden, config.norm_eps)
        self.project = Linear(2 * config.hidden, config.hidden, bias=False)
        for name, module in usual.items():
            self.add_module(name, module)
        self.norm = norm(config.norm, config.hidden, config.norm_eps)

    def parts(self) -> list[Part]:
        return [(self, "join"), *super().parts()]

    def whole(self) -> Part:
        return self, "run"

    def forward(
        self,
        x_BSH: Tensor,
        cos: Tensor,
        sin: Tensor,
        tokens_BS2: Tensor | None = None,
        embedded_BSH: Tensor | None = None,
    ) -> Tensor:
        """h_k of h_{k−1} [B, S, H] and of the later tokens' embeddings [B, S, H]; ids in `tokens_BS2` are theirs."""
        out: Tensor = self.norm(self.run(x_BSH, cos, sin, tokens_BS2, embedded_BSH))
        return out

    def run(
        self, x_BSH: Tensor, cos: Tensor, sin: Tensor, tokens_BS2: Tensor | None, embedded_BSH: Tensor | None
    ) -> Tensor:
        """All but the last norm; inputs are those of `forward`: [B, S, H], cos and sin [S, d], tokens [B, S, 2]."""
        assert embedded_BSH is not None
        return super().forward(self.join(x_BSH, embedded_BSH), cos, sin, tokens_BS2)

    def join(self, x_BSH: Tensor, embedded_BSH: Tensor) -> Tensor:
        """The stream that enters the block [B, S, H]."""
        both = torch.cat((self.embed_norm(embedded_BSH), self.hidden_norm(x_BSH)), -1)
        out: Tensor = self.project(both)
        return out
