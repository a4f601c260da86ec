"""The choice of a kernel's version."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moesys.errors import MoesysError
from moesys.kernels import choose as module
from moesys.kernels.choose import KernelChoiceError, choose


def _cuda(dtype: torch.dtype, like: Tensor | None = None) -> SimpleNamespace:
    """Stands for a tensor on GPU with the shape and strides of `like`."""
    known = {} if like is None else {name: getattr(like, name) for name in ("shape", "stride", "storage_offset")}
    return SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda:0", element_size=lambda: dtype.itemsize, **known)


def _force(monkeypatch: pytest.MonkeyPatch, implementation: str) -> None:
    monkeypatch.setenv("MOESYS_KERNELS", implementation)
    module.forget()


def test_torch_runs_on_cpu(unforced):
    for operation in ("gate", "permute", "unpermute", "activation", "grouped_matmul", "expert_ffn"):
        assert choose(torch.zeros(2), operation) == "torch"


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_the_environment_forces_an_implementation(unforced, implementation):
    _force(unforced, implementation)
    assert choose(torch.zeros(2), "gate") == implementation


def test_the_environment_is_read_once(unforced):
    assert choose(torch.zeros(2), "gate") == "torch"
    unforced.setenv("MOESYS_KERNELS", "reference")
    assert choose(torch.zeros(2), "gate") == "torch"


def test_an_unknown_way_is_refused(unforced):
    _force(unforced, "cuda")
    text = "MOESYS_KERNELS is 'cuda': must be one of reference, torch, triton, or not set"
    with pytest.raises(ValueError, match=text) as error:
        choose(torch.zeros(2), "gate")
    assert isinstance(error.value, MoesysError)


def test_triton_on_cpu_needs_its_interpreter(unforced):
    _force(unforced, "triton")
    unforced.setattr(module, "HAS_TRITON", True)
    unforced.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelChoiceError, match="TRITON_INTERPRET=1"):
        choose(torch.zeros(2), "gate")
    unforced.setenv("TRITON_INTERPRET", "1")
    assert choose(torch.zeros(2), "gate") == "triton"


def test_triton_must_be_installed_to_be_forced(unforced):
    _force(unforced, "triton")
    unforced.setattr(module, "HAS_TRITON", False)
    with pytest.raises(KernelChoiceError, match="not installed"):
        choose(torch.zeros(2), "gate")


def test_triton_runs_on_cuda_where_it_is_installed_and_for_its_types(unforced):
    unforced.setattr(module, "HAS_TRITON", True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choose(_cuda(dtype), "permute") == "triton"
    assert choose(_cuda(torch.float64), "permute") == "torch"
    unforced.setattr(module, "HAS_TRITON", False)
    assert choose(_cuda(torch.float32), "permute") == "torch"


@pytest.mark.parametrize(
    ("dtype", "shape", "capability", "implementation"),
    [
        (torch.bfloat16, (4, 64, 96), (9, 0), "torch"),
        (torch.bfloat16, (4, 64, 96), (10, 0), "torch"),
        (torch.bfloat16, (4, 64, 96), (10, 3), "torch"),
        (torch.bfloat16, (8, 96), (9, 0), "torch"),
        (torch.bfloat16, (8, 96), (10, 0), "triton"),  # there torch leaves an empty group's matrix as it finds it
        (torch.bfloat16, (4, 64, 96), (8, 0), "triton"),
        (torch.bfloat16, (4, 64, 96), (12, 0), "triton"),
        (torch.bfloat16, (4, 64, 97), (9, 0), "triton"),
        (torch.bfloat16, (4, 60, 96), (9, 0), "triton"),
        (torch.float16, (4, 64, 96), (9, 0), "triton"),
        (torch.float32, (4, 64, 96), (9, 0), "triton"),
    ],
)
def test_grouped_products_are_torchs_where_it_has_one_kernel(unforced, dtype, shape, capability, implementation):
    _on(unforced, capability)
    x, w = torch.empty(8, shape[1] if len(shape) == 3 else 64), torch.empty(shape, dtype=dtype)
    assert choose(_cuda(dtype, x), "grouped_matmul", w) == implementation


def _on(unforced: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    unforced.setattr(module, "HAS_TRITON", True)
    unforced.setattr(torch.version, "hip", None)
    unforced.setattr(torch.cuda, "get_device_capability", lambda device: capability)


ROWS, MATRICES = torch.empty(8, 64), torch.empty(4, 64, 96, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "w", "implementation"),
    [
        (ROWS, torch.empty(4, 96, 64, dtype=torch.bfloat16).mT, "torch"),
        (ROWS, torch.empty(8, 96, dtype=torch.bfloat16), "torch"),
        (torch.empty(8, 128)[:, 64:], MATRICES, "torch"),
        (torch.empty(8, 65)[:, 1:], MATRICES, "triton"),
        (torch.empty(8, 72)[:, 1:65], MATRICES, "triton"),
        (torch.empty(64, 8).t(), MATRICES, "triton"),
        (torch.empty(1, 64).expand(8, 64), MATRICES, "triton"),
        (ROWS, torch.empty(4, 64, 97, dtype=torch.bfloat16)[..., 1:], "triton"),
        (ROWS, torch.empty(96, 64, 4, dtype=torch.bfloat16).permute(2, 1, 0), "triton"),
    ],
)
def test_torchs_grouped_products_need_rows_that_lie_in_whole_16_bytes(unforced, x, w, implementation):
    _on(unforced, (9, 0))
    assert choose(_cuda(torch.bfloat16, x), "grouped_matmul", w) == implementation
