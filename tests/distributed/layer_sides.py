"""What a process of the layer benchmark's test does; importable by name."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moesys.benchmarks.layer import other_systems
from moesys.measure.layer_benchmark import many_ranks
from moesys.measure.layer_benchmark.layer_times import LayerShape


def gradients(module: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradient of the input."""
    x = x.detach().requires_grad_()
    out = module(x)
    out.backward(grad)
    assert x.grad is not None
    return [out.detach(), x.grad]


def agree(rank: int, shape: LayerShape, folder: str) -> None:
    """Output and input gradient of every side, but those with weights of their own, are equal."""
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    x, grad = torch.randn(1, 24, 16), torch.randn(1, 24, 16)
    with many_ranks.sides(shape, torch.float32, other_systems()) as layers:
        whole = {name: gradients(layer, x, grad) for name, layer in layers.items() if name not in ("deepspeed",)}
    expected = whole.pop("moesys all_to_all")
    assert set(whole) == {"moesys all_gather", "megatron alltoall", "megatron allgather"}
    for name, found in whole.items():
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    dist.barrier()
    dist.destroy_process_group()
