"""The choice of an operation's implementation, by device, shape and type; nothing else chooses.

"reference" is the plain definition, "torch" the fast implementation with torch alone (the only one on CPU), "triton"
the kernels in `moesys.kernels.triton`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from moesys.errors import MoesysError

Implementation = Literal["reference", "torch", "triton"]
Operation = Literal[
    "gate",
    "permute",
    "unpermute",
    "activation",
    "grouped_matmul",
    "expert_ffn",
    "rotary",
    "fp8_rows",
    "attention_sinks",
]

HAS_TRITON = find_spec("triton") is not None
"""Whether Triton is installed; finding out does not import it."""

VARIABLE = "MOESYS_KERNELS"
"""The environment variable that forces one implementation for every operation."""


class KernelChoiceError(MoesysError, ValueError):
    """The environment forces an implementation that does not exist or cannot run here."""

    exit_code = 2


def choose(x: Tensor, operation: Operation, w: Tensor | None = None) -> Implementation:
    """The implementation of `operation` for x: any shape, floating type and device.

    Without `MOESYS_KERNELS`: on CPU torch; on CUDA Triton where it is installed, save for float64 (the
    kernels are written for float32 and narrower) and for the products of groups that torch has a kernel
    for, see `torch_has_grouped_mm`.

    Args:
        w: the other factor, of "grouped_matmul" alone: [G, K, M] in the type of x [N, K].

    Raises:
        KernelChoiceError: `MOESYS_KERNELS` names no implementation, or Triton cannot run on the device of x.
    """
    implementation = forced()
    if implementation == "triton":
        _require_triton(x)
    if implementation is not None:
        return implementation
    if not x.is_cuda or x.dtype == torch.float64 or not HAS_TRITON:
        return "torch"
    if operation == "grouped_matmul" and w is not None and torch_has_grouped_mm(x, w):
        return "torch"
    return "triton"


def widened(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in with numbers of `dtype`: float32, or float64 for float64."""
    return dtype if dtype == torch.float64 else torch.float32


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [*] in `dtype`. A tensor of it already costs nothing: small steps feel calls of `to` that change nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def torch_has_grouped_mm(x: Tensor, w: Tensor) -> bool:
    """Whether torch's grouped_mm runs x [N, K] · w [G, K, M] and its gradients as one kernel.

    In torch 2.11 to 2.13 that is bfloat16 on NVIDIA's compute capabilities 9 and 10, with inner sizes of whole
    16 bytes, in memory too, where w may lie transposed. w may also be the gradient [N, M] of products, for
    that of their matrices: on capability 9 alone, for on 10 the gradients of empty groups are not zero
    (https://github.com/pytorch/pytorch/issues/172439). Elsewhere torch refuses, or copies the offsets to the host
    and loops over the groups.
    """
    if not x.is_cuda or torch.version.hip is not None or x.dtype != torch.bfloat16 or w.dtype != x.dtype:
        return False
    if any(size * x.element_size() % 16 for size in (x.shape[-1], w.shape[-1])):
        return False
    aligned = has_aligned_rows(x) and (has_aligned_rows(w) or (w.ndim == 3 and has_aligned_rows(w.mT)))
    return aligned and torch.cuda.get_device_capability(x.device)[0] in ((9, 10) if w.ndim == 3 else (9,))


def has_aligned_rows(x: Tensor) -> bool:
    """Whether each row of x [..., N, M] lies apart in memory, from a whole number of 16 bytes on."""
    *_, between, within = x.stride()
    if within != 1 or between < x.shape[-1]:
        return False
    size = x.element_size()
    return between * size % 16 == 0 and x.storage_offset() * size % 16 == 0


class _Forced:
    """The implementation that the environment forces, read once.

    Not functools.cache, which torch.compile warns of and looks through.
    """

    read = False
    implementation: Implementation | None = None


def forced() -> Implementation | None:
    """The implementation that the environment forces, as it was at the first call."""
    if not _Forced.read:
        _Forced.implementation, _Forced.read = _parsed(os.environ.get(VARIABLE, "")), True
    return _Forced.implementation


def forget() -> None:
    """Make `forced` read the environment again."""
    _Forced.read = False


def _parsed(value: str) -> Implementation | None:
    if value and value not in get_args(Implementation):
        raise KernelChoiceError(
            f"{VARIABLE} is {value!r}: must be one of {', '.join(get_args(Implementation))}, or not set"
        )
    return cast(Implementation, value) if value else None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _require_triton(x: Tensor) -> None:
    if not HAS_TRITON:
        raise KernelChoiceError(f"{VARIABLE} is 'triton', but Triton is not installed\n    remedy: pip install triton")
    if x.device.type == "cpu" and not interpreted():
        raise KernelChoiceError(
            f"{VARIABLE} is 'triton', but Triton compiles for GPUs alone and a tensor is on CPU\n"
            f"    remedy: set TRITON_INTERPRET=1 to run its kernels slowly in Triton's interpreter, or unset {VARIABLE}"
        )
