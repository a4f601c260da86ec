"""Recomputing activations in backward instead of keeping them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from moesys.kernels import expert_ffn
from moesys.parallel import comm

aten, collective = torch.ops.aten, torch.ops._c10d_functional
KEPT = {
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten._grouped_mm.default,
    *expert_ffn.PRODUCTS,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    collective.all_to_all_single.default,
    collective.all_gather_into_tensor.default,
    collective.reduce_scatter_tensor.default,
}
"""Results that selective recomputation keeps: matrix products, attention, communication."""


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _again(cached: AbstractContextManager) -> Iterator[None]:
    """The second run, in which what was kept does not happen again."""
    with cached, comm.replayed(KEPT):
        yield


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Of the first run and of the second."""
    first, second = create_selective_checkpoint_contexts(_policy)
    return first, _again(second)


def wrap(block: nn.Module, mode: str) -> nn.Module:
    """`block` that keeps only its input ("full"), or its products too ("selective") for backward."""
    if mode == "selective":
        return checkpoint_wrapper(block, context_fn=_contexts, preserve_rng_state=False)
    return checkpoint_wrapper(block, preserve_rng_state=False)
