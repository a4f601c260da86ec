"""Counts of what a training step does: operations of torch, and calls of Python. Neither depends on the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from support import calls
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moesys.kernels import expert_ffn

INSIDE: dict[Any, Callable[..., Any]] = {
    torch.ops.moesys.expert_ffn.default: expert_ffn._forward,
    torch.ops.moesys.expert_ffn_backward.default: expert_ffn._backward,
}
"""Operations of this project, whose own operations count in their place."""


class Operations(TorchDispatchMode):
    """Counts what is computed or copied: views begin nothing.

    Attributes:
        names: how often each operation began.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """All of them."""
        return self.names.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in INSIDE:
            with self:
                return INSIDE[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        found = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, Tensor)]
        if func._schema.is_mutable or any(x.untyped_storage().data_ptr() not in given for x in found):
            self.names[str(func)] += 1
        return out


def operations(work: Callable[[], Any]) -> Counter[str]:
    """The operations that `work` begins."""
    with Operations() as found:
        work()
    return found.names


def python_calls(work: Callable[[], Any]) -> int:
    """The functions that `work` calls, of Python and of C, those in backward too."""
    with torch.autograd.set_multithreading_enabled(False):
        return calls(work)
