"""Recomputing activations in backward instead of keeping them, and compiling: both by the parts of a block.

Full recomputation repeats a whole block, dispatch and combine included, around compiled parts. Selective
recomputation repeats each part (`Block.parts`) apart, inside of its graph where it is compiled: the compiler
keeps what `KEPT` names. What lies between parts keeps no more than that by itself: dispatchers and experts
hold what arrived and the products of fc1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from types import CodeType, FunctionType
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moesys.kernels import expert_ffn
from moesys.kernels.choose import forced
from moesys.models.block import Block, Part
from moesys.moe import MoELayer
from moesys.moe.experts import Experts
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

GRAPHS = 1024
"""Most graphs of a part, of all blocks together; torch's own limit of 8 would leave the others uncompiled."""


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _second(cached: AbstractContextManager) -> Iterator[None]:
    """The context of the second run, which does not repeat kept operations."""
    with cached, comm.replayed(KEPT):
        yield


def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of the first run and of the second."""
    first, second = create_selective_checkpoint_contexts(_policy)
    return first, _second(second)


_compiled_contexts = partial(create_selective_checkpoint_contexts, _policy)
"""`contexts` for the compiler, which takes torch's own alone; it decides what is kept once, and replays nothing."""


def prepare(block: Block, recompute: str, compiled: bool, backend: Any = "inductor") -> None:
    """Let `block` recompute ("none", "selective" or "full") and, if `compiled`, run as compiled graphs.

    Parameters keep their names. With expert parallelism the dispatcher of `block` must be in place.
    """
    if compiled:
        forced()  # reads the environment, which is a side effect: not in a graph
        # All blocks share their graphs; those of a kind of their own, with gradients and without, have others.
        torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
        torch._dynamo.config.accumulated_recompile_limit = max(GRAPHS, torch._dynamo.config.accumulated_recompile_limit)
    if recompute == "selective":
        context = _compiled_contexts if compiled else contexts
        for part in block.parts():
            _replace(part, partial(repeated, context_fn=context))
        for part in _between(block):
            _replace(part, partial(repeated, context_fn=contexts))
    if compiled:
        for part in block.parts():
            _replace(part, partial(torch.compile, backend=backend))
    if recompute == "full":
        _replace(block.whole(), repeated)


def _between(block: Block) -> list[Part]:
    """What is computed between parts, and would keep more than products for backward."""
    moe = block.ffn
    if not isinstance(moe, MoELayer) or (block, "run_experts") in block.parts():
        return []  # it repeats them as it needs
    plain = isinstance(moe.experts, Experts) and moe.experts.fc2_bias is None
    return [] if plain else [(moe.experts, "forward")]


def _replace(part: Part, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module, name = part
    setattr(module, name, change(getattr(module, name)))


def repeated(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` that backward recomputes from its inputs and from the results that the contexts keep."""

    def recomputed(*inputs: Any) -> Any:
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **options)

    code = _code(recomputed.__code__, function.__name__)
    return FunctionType(code, globals(), function.__name__, closure=recomputed.__closure__)


@cache
def _code(code: CodeType, name: str) -> CodeType:
    """A copy of `code` under each `name`: the compiler keeps its graphs, and the shapes it has seen, by code."""
    return code.replace(co_name=name)
