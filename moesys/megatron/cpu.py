"""Replaces the CUDA calls that Megatron-Core 0.16.1 makes even without a GPU.

Its MoE layer creates a stream, asks for the current device and moves split sizes to the host only from a GPU. Its
embedding draws from a GPU's generators. Its schedules and optimizers make small tensors on "cuda", and compare types of
tensors by the names of CUDA types. Inside `cpu_substitutes()` such calls work on CPU; with a GPU nothing is changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor


class _Stream:
    """A stream or an event of a device that computes everything in program order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, other: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> _Stream:
        return self


_ONLY = _Stream()


class _Torch:
    """The module torch as some of Megatron's modules see it: tensors for "cuda" are made on the CPU."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("zeros", "ones", "tensor", "empty"):
            return found

        def make(*arguments: Any, **more: Any) -> Any:
            if more.get("device") == "cuda":
                more["device"] = "cpu"
            return found(*arguments, **more)

        return make


def _type(tensor: Tensor, dtype: Any = None, *arguments: Any, **more: Any) -> Any:
    """`Tensor.type`, which names the CUDA type of any tensor if it gets no type."""
    if dtype is not None:
        return _TYPE(tensor, dtype, *arguments, **more)
    return "torch.cuda." + _TYPE(tensor).rpartition(".")[2]


_TYPE = Tensor.type


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's `maybe_move_tensor_to_cpu`, which leaves split sizes on CPU as tensors, which collectives reject."""
    return tensor.numpy() if isinstance(tensor, Tensor) and as_numpy else tensor


@contextmanager
def cpu_substitutes(device: str | None = None) -> Iterator[None]:
    """Let Megatron-Core be built and run on CPU if `device` is "cpu"; default: if there is no GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import utils as helpers
        from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.tensor_parallel import random
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
        from megatron.core.transformer import utils
        from megatron.core.transformer.moe import moe_utils, token_dispatcher
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        yield
        return
    cuda: dict[str, Callable[..., Any]] = {
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda *_: _ONLY,
        "default_stream": lambda *_: _ONLY,
        "current_device": lambda: torch.device("cpu"),
        "stream": lambda *_: nullcontext(),
        "synchronize": lambda *_: None,
    }
    with ExitStack() as replaced:
        for name, substitute in cuda.items():
            replaced.enter_context(mock.patch.object(torch.cuda, name, substitute))
        for module in (schedules, optimizer, distrib_optimizer, clip_grads, utils, helpers):
            replaced.enter_context(mock.patch.object(module, "torch", _Torch()))
        replaced.enter_context(mock.patch.object(Tensor, "type", _type))
        replaced.enter_context(mock.patch.object(Tensor, "cuda", lambda tensor, *_, **__: tensor))
        # Recomputation saves and restores the states of all generators; a GPU's does not exist.
        replaced.enter_context(mock.patch.object(random, "_get_cuda_rng_state", lambda *_, **__: None))
        replaced.enter_context(mock.patch.object(random, "_set_cuda_rng_state", lambda *_, **__: None))
        replaced.enter_context(mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", _on_host))
        # All draw from torch's one generator.
        replaced.enter_context(mock.patch.object(CudaRNGStatesTracker, "fork", lambda *_, **__: nullcontext()))
        # Version 0.16.1 does not define it without Transformer Engine.
        replaced.enter_context(mock.patch.object(moe_utils, "te_general_gemm", None, create=True))
        yield
