"""Counts what would make the host wait for a GPU, on CPU tensors: each is an operation that needs a value."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

ASKS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.equal.default: "equal",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.bincount.default: "bincount",
}
"""Operations whose result, or its shape, the host must know."""

METHODS = ("tolist", "numpy", "cpu")
"""Methods of tensors that wait without an operation of their own, where a tensor lies on the host already."""


class HostWaits(TorchDispatchMode):
    """Inside, counts by kind and place of ours: `found["item", "moesys/train/guard.py:38"]`.

    Masks as indices count as "nonzero". Tensors that were made on the host on purpose are counted too: only a test
    knows which these are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()
        self._patches = [patch.object(torch.Tensor, name, self._counted(name)) for name in METHODS]

    def __enter__(self) -> HostWaits:
        for one in self._patches:
            one.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for one in self._patches:
            one.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKS:
            self._note(ASKS[func])
        elif func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            if any(index is not None and index.dtype == torch.bool for index in args[1]):
                self._note("nonzero")
        return func(*args, **(kwargs or {}))

    def _counted(self, name: str) -> Callable[..., Any]:
        method = getattr(torch.Tensor, name)

        def counted(x: torch.Tensor, *arguments: Any, **more: Any) -> Any:
            self._note(name)
            return method(x, *arguments, **more)

        return counted

    def _note(self, kind: str) -> None:
        self.found[kind, _place()] += 1

    def total(self, *kinds: str) -> int:
        """How many of these kinds, default all."""
        return sum(count for (kind, _), count in self.found.items() if not kinds or kind in kinds)


def _place() -> str:
    """The innermost line of the package that is under way."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        for folder in ("/moesys/", "/parallel/", "/kernels/", "/launchers/"):
            if folder in name and "site-packages" not in name:
                return f"{folder[1:]}{name.rsplit(folder, 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
