"""Token choice: each token goes to the k experts of largest softmax probability."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesys.moe import losses
from moesys.moe.capacity import capacity, kept
from moesys.moe.gates.gate import Gate
from moesys.moe.routing import MicroBatch, Routing, Tokens


class GateProjection(nn.Linear):
    """Logits of the gate, computed in float32 (or wider) whatever the model's precision."""

    def __init__(self, hidden: int, experts: int):
        super().__init__(hidden, experts, bias=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        return nn.functional.linear(x_TH.to(wide), self.weight.to(wide))


class TopKGate(Gate):
    """Softmax over E experts, then the k largest (Shazeer et al. 2017 without noise; Mixtral).

    Args:
        hidden: size of a token.
        experts: E.
        top_k: k, 1 ≤ k ≤ E.
        normalize: divide the k chosen probabilities by their sum.
        scale: factor on the weights, after normalisation.
        capacity_factor: see `moesys.moe.capacity`; None routes every token (dropless).
        drop: "weight" or "position": which assignments go when an expert is full. Weights are
            normalised before dropping; a dropped assignment's share is lost.
        balance_loss, z_loss: coefficients of the losses in `moesys.moe.losses`; 0 turns one off.
    """

    def __init__(
        self,
        hidden: int,
        experts: int,
        top_k: int,
        normalize: bool = True,
        scale: float = 1.0,
        capacity_factor: float | None = None,
        drop: str = "weight",
        balance_loss: float = 0.0,
        z_loss: float = 0.0,
    ):
        super().__init__()
        self.projection = GateProjection(hidden, experts)
        self.experts, self.top_k = experts, top_k
        self.normalize, self.scale = normalize, scale
        self.capacity_factor, self.drop = capacity_factor, drop
        self.balance_loss, self.z_loss = balance_loss, z_loss

    def forward(self, x_TH: Tensor, tokens: Tokens, scope: MicroBatch) -> Routing:
        logits_TE = self.projection(x_TH)
        probabilities_TE = logits_TE.softmax(-1)
        weight_Tk, expert_Tk = probabilities_TE.topk(self.top_k, dim=-1)
        if self.normalize:
            weight_Tk = weight_Tk / weight_Tk.sum(-1, keepdim=True)
        if self.scale != 1.0:
            weight_Tk = weight_Tk * self.scale
        expert_A, weight_A = expert_Tk.flatten(), weight_Tk.flatten()
        token_A = torch.arange(x_TH.shape[0], device=x_TH.device).repeat_interleave(self.top_k)
        load_E = torch.bincount(expert_A, minlength=self.experts)
        routing = Routing(token_A, expert_A, weight_A, load_E=load_E)
        if self.balance_loss:
            balance = losses.load_balancing(probabilities_TE, load_E, self.top_k, scope)
            routing.losses["balance"] = self.balance_loss * balance
        if self.z_loss:
            routing.losses["z"] = self.z_loss * losses.router_z(logits_TE, scope)
        if self.capacity_factor is not None:
            self._drop(routing, tokens.number_T, scope)
        return routing

    def _drop(self, routing: Routing, number_T: Tensor, scope: MicroBatch) -> None:
        assert self.capacity_factor is not None
        tokens = number_T.shape[0]
        limit = capacity(self.capacity_factor, tokens * scope.size, self.top_k, self.experts)
        choice = torch.arange(self.top_k, device=number_T.device)
        order_A = (number_T[:, None] * self.top_k + choice).flatten()
        keep = kept(routing.expert_A, routing.weight_A, order_A, limit, self.drop, scope)
        routing.dropped = tokens * self.top_k - keep.sum()
        routing.token_A, routing.expert_A = routing.token_A[keep], routing.expert_A[keep]
        routing.weight_A = routing.weight_A[keep]
