"""Experts: grouped feed-forwards over tokens sorted by expert."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesys.kernels import activation as kernel
from moesys.kernels.expert_ffn import expert_ffn
from moesys.kernels.permute import Permutation, unpermute
from moesys.moe.start import like_linear


def local(weight: Tensor) -> Tensor:
    """This device's slice of a weight, on which its experts compute. `weight` may have any shape."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


class _ScaledGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx, weight, scale):  # type: ignore[override]
        ctx.scale = scale
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad * ctx.scale, None


def _mixed(weight: Tensor, share_GE: Tensor | None, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """The weight [E, …] of this device, or its mixtures [G, …] by shares, in `dtype`; its gradient times `scale`."""
    own = local(weight)
    if scale != 1.0:
        own = _ScaledGradient.apply(own, scale)
    return own if share_GE is None else torch.tensordot(share_GE.to(own.dtype), own, 1).to(dtype)


class Experts(nn.Module):
    """E feed-forwards `fc2(act(fc1(x)))`, by default SwiGLU without biases.

    Weights: fc1 [E, H, G, F], where G = 2 (the gate, then the linear part) for gated activations and
    1 for others, and fc2 [E, F, H]; with `bias`, fc1_bias [E, G, F] and fc2_bias [E, H]. Under expert
    parallelism a device holds a slice of E, and of F; the arithmetic is the same. Initial weights are drawn as those
    of `nn.Linear`, biases are zeros.

    Args:
        experts, hidden, ffn_hidden: E, H, F.
        activation: a kind of `moesys.kernels.activation`.
        bias: whether both products add a bias.

    Attributes:
        gradient_scale: factor on the gradients of all weights, for training loops that average other gradients.
    """

    def __init__(self, experts: int, hidden: int, ffn_hidden: int, activation: str = "swiglu", bias: bool = False):
        super().__init__()
        parts = kernel.KINDS[activation].parts
        self.activation = activation
        self.gradient_scale = 1.0
        self.fc1 = nn.Parameter(torch.empty(experts, hidden, parts, ffn_hidden))
        self.fc2 = nn.Parameter(torch.empty(experts, ffn_hidden, hidden))
        self.fc1_bias = nn.Parameter(torch.empty(experts, parts, ffn_hidden)) if bias else None
        self.fc2_bias = nn.Parameter(torch.empty(experts, hidden)) if bias else None
        self.fc2_bias_start = 0
        """First of the outputs that this device's slice of fc2_bias belongs to: devices that share an
        expert by its inner size share its output bias by its outputs, so that their sum has it once."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give every parameter its initial values."""
        like_linear(self.fc1, self.fc1.shape[1])
        like_linear(self.fc2, self.fc2.shape[1])
        for bias in (self.fc1_bias, self.fc2_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """fc1_bias and fc2_bias."""
        return self.fc1_bias, self.fc2_bias

    def forward(
        self,
        x_NH: Tensor,
        tokens_per_expert: Tensor,
        weight_N: Tensor | None = None,
        p: Permutation | None = None,
        share_GE: Tensor | None = None,
    ) -> Tensor:
        """Outputs [N, H], times `weight_N`, of rows [N, H] sorted by expert.

        `tokens_per_expert` int64 [E], sum N; `weight_N` float32 [N], None for 1. With `p`, x are tokens
        [T, H] whose rows `p` names, and each token's outputs are summed: [T, H]. Any count, and N itself,
        may be 0: gradients of the weights are then zeros, not None, so that every device takes part in
        every collective that follows.

        With `share_GE` float32 [G, E], rows are computed not by the E experts but by G mixtures of them, to
        which `tokens_per_expert` [G] then refers.
        """
        # `expert_ffn` casts wider weights itself: autograd would keep a copy made here.
        mixed = partial(_mixed, share_GE=share_GE, dtype=x_NH.dtype, scale=self.gradient_scale)
        fc1, fc2 = mixed(self.fc1), mixed(self.fc2)
        bias1, bias2 = (None if b is None else mixed(b) for b in self.biases())
        out = expert_ffn(x_NH, fc1, fc2, tokens_per_expert, self.activation, weight_N, bias1, p)
        if bias2 is None:
            return out
        # The device alone knows the counts: without their sum this would wait for it.
        count = len(x_NH if p is None else p.token_A)
        rows = self._output_bias(
            bias2.to(x_NH.dtype).repeat_interleave(tokens_per_expert, 0, output_size=count), out, weight_N
        )
        return out + (rows if p is None else unpermute(rows, p))

    def _output_bias(self, rows: Tensor, out: Tensor, weight_N: Tensor | None) -> Tensor:
        if weight_N is not None:
            rows = rows * weight_N.unsqueeze(-1).to(rows.dtype)
        rest = out.shape[1] - rows.shape[1] - self.fc2_bias_start
        return nn.functional.pad(rows, (self.fc2_bias_start, rest))
