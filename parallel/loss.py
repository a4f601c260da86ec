"""Cross-entropy of a micro-batch, on whole logits or on slices of the vocabulary over the tensor axis.

T tokens, V the vocabulary, or this rank's slice of it. Logits are read a chunk of tokens at a time, so that no
float32 copy of all of them is ever there, and each chunk is overwritten by its gradient as soon as that is known
(after Liger Kernel, arXiv 2410.10989): of T · V numbers backward keeps one set, in the model's type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from moesys.parallel import comm

LOSS_CHUNK = 2**22
"""Logits that are computed with in float32 at once: enough to fill a GPU, with 64 MiB of workspace."""

IGNORED = -100
"""The label of a token that is not learnt."""


class TokenLoss:
    """Sum of the tokens' cross-entropies divided by `tokens`, the labels of the whole global batch.

    Labels −100 are ignored. Summed over micro-batches and ranks this is the mean over the global
    batch, in nats. With `axis`, logits are this rank's slice [B, S, V/tp] and are never gathered.
    """

    def __init__(self, tokens: int, axis: DeviceMesh | None = None, weights: Sequence[float] = ()):
        """`weights`: factors on the losses of multi-token prediction, by depth."""
        self.tokens = tokens
        self.group = None if axis is None else axis.get_group()
        self.weights = (1.0, *weights)
        self._later: Tensor | None = None

    def __call__(self, logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        """A scalar in float32 or wider; backward, where there is one, runs once, and the logits are lost to it.

        With multi-token prediction logits may be [(1 + D)·B, S, V], and labels [B, 1 + D, S]. The result is the loss of
        the next token all the same; its gradient is that of the weighted sum of all losses.
        """
        labels_DBS = labels_BS[None] if labels_BS.ndim == 2 else labels_BS.transpose(0, 1)
        labels_DT, weights = labels_DBS.flatten(1), self.weights[: len(labels_DBS)]
        loss: Tensor
        loss, later = _CrossEntropy.apply(logits_BSV.flatten(0, 1), labels_DT, self.tokens, self.group, weights)
        if later is not None:
            self._later = later if self._later is None else self._later + later
        return loss

    def take(self) -> Tensor | None:
        """The losses of multi-token prediction [D] since the last call, without their weights; None without any."""
        later, self._later = self._later, None
        return later


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV, labels_DT, tokens, group, weights):  # type: ignore[override]
        work, differentiate = _whole if group is None else _split, ctx.needs_input_grad[0]
        # The gradient is kept by hand: what is saved for backward must not be written to.
        ctx.grad = logits_TV if differentiate else None
        depths = zip(logits_TV.chunk(len(weights)), labels_DT, weights, strict=True)
        loss, *later = [work(logits, labels, tokens, group, differentiate, weight) for logits, labels, weight in depths]
        if not later:
            return loss, None
        found = torch.stack(later)
        ctx.mark_non_differentiable(found)
        return loss, found

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):  # type: ignore[override]
        found, ctx.grad = ctx.grad, None
        if found is None:
            raise RuntimeError("the gradient of the logits was given away: backward through this loss runs once")
        return found.mul_(grad), None, None, None, None


def _whole(logits_TV: Tensor, labels_T: Tensor, tokens: int, group: Any, differentiate: bool, weight: float) -> Tensor:
    """The loss of whole logits; `differentiate`: the logits become their gradient, times `weight`."""
    losses = []
    for logits, labels in _chunks(logits_TV, labels_T):
        with torch.set_grad_enabled(differentiate):
            leaf = logits.detach().requires_grad_(differentiate)
            loss = nn.functional.cross_entropy(_wide(leaf), labels, ignore_index=IGNORED, reduction="sum") / tokens
        if differentiate:
            logits.copy_(torch.autograd.grad(loss, leaf, torch.full_like(loss, weight))[0])
        losses.append(loss.detach())
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def _split(
    logits_TV: Tensor, labels_T: Tensor, tokens: int, group: dist.ProcessGroup, differentiate: bool, weight: float
) -> Tensor:
    """The same of logits whose vocabulary is split over `group`, with one collective (after Megatron-LM)."""
    here_T = labels_T - group.rank() * logits_TV.shape[1]
    mine_T = (here_T >= 0) & (here_T < logits_TV.shape[1])
    here_T = here_T.where(mine_T, 0)
    parts = [_summary(_wide(logits), here) for logits, here in _chunks(logits_TV, here_T)]
    total_T, target_T = torch.cat(parts, 1).unbind(0)
    # For each rank: log Σ exp of its slice, and the logit of the label where it lies there.
    found = torch.stack((total_T, target_T.where(mine_T, 0.0)))
    total_RT, target_RT = comm.start_all_gather(found, group).wait().view(-1, *found.shape).unbind(1)
    total_T, learnt_T = total_RT.logsumexp(0), labels_T != IGNORED
    if differentiate:
        scale_T = learnt_T.to(total_T.dtype) / tokens * weight
        there_T = mine_T * scale_T
        beside = [x.split(_rows(logits_TV)) for x in (total_T, scale_T, there_T)]
        for (logits, here), total, scale, there in zip(_chunks(logits_TV, here_T), *beside, strict=True):
            chance = _wide(logits).sub(total[:, None]).exp_().mul_(scale[:, None])
            logits.copy_(chance.scatter_add_(1, here[:, None], -there[:, None]))
    return (total_T - target_RT.sum(0)).where(learnt_T, 0.0).sum() / tokens


def _summary(logits_TV: Tensor, here_T: Tensor) -> Tensor:
    """[2, T]: log Σ exp of each token's logits, and the logit of its label."""
    return torch.stack((logits_TV.logsumexp(1), logits_TV.gather(1, here_T[:, None]).squeeze(1)))


def _chunks(logits_TV: Tensor, labels_T: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = _rows(logits_TV)
    return zip(logits_TV.detach().split(rows), labels_T.split(rows), strict=True)


def _rows(logits_TV: Tensor) -> int:
    """Tokens of a chunk."""
    return max(1, LOSS_CHUNK // logits_TV.shape[1])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
