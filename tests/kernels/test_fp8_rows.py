"""Rows in eight bits: one kernel writes the bytes that torch's operations do."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moesys.parallel.dispatchers.payload import Fp8Rows


@pytest.mark.parametrize("hidden", [1, 20, 128, 130, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_kernel_writes_the_same_bytes(triton_device, hidden, dtype):
    from moesys.kernels.triton import fp8_rows as kernel

    codec = Fp8Rows(hidden, dtype)
    for rows in (0, 1, 9):
        x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        x = (x * 10 ** torch.linspace(-20, 20, rows)[:, None]).to(triton_device, dtype)
        x[:1] = 0
        written = codec.encode(x.cpu()).to(triton_device)
        assert torch.equal(kernel.encode(x, codec.block), written)
        read = kernel.decode(written, hidden, codec.block, dtype)
        assert read.dtype == dtype and torch.equal(read.cpu(), codec.decode(written.cpu()))


class Passes(TorchDispatchMode):
    """Operations on as many elements as there are in the rows, views left out."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.names = elements, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [x for x in args if isinstance(x, torch.Tensor)]
        known = {x.untyped_storage().data_ptr() for x in given}
        fresh = isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known
        writes = func._schema.is_mutable or fresh
        if writes and max((x.numel() for x in given), default=0) >= self.elements:
            self.names.append(func.__name__)
        return out


@pytest.mark.parametrize(("dtype", "there", "back"), [(torch.float32, 4, 3), (torch.bfloat16, 5, 4)])
def test_torch_passes_over_the_rows_as_often_as_it_must(dtype, there, back):
    """Once it passed seven times to write them, and five to read them."""
    x, codec = torch.randn(6, 256).to(dtype), Fp8Rows(256, dtype)
    with Passes(x.numel()) as writing:
        written = codec.encode(x)
    with Passes(x.numel()) as reading:
        codec.decode(written)
    # That which makes the memory is no pass.
    assert len([n for n in writing.names if "new_empty" not in n]) == there, writing.names
    assert len(reading.names) == back, reading.names
