"""Expert parallelism in an own FSDP2 loop: experts are split over ranks, everything else is sharded by `fully_shard`.

    torchrun --standalone --nproc-per-node 2 examples/expert_parallel_fsdp2.py --steps 30
    torchrun --standalone --nproc-per-node 4 examples/expert_parallel_fsdp2.py --expert-ranks 2

With more ranks than `--expert-ranks` several ranks hold the same experts, which FSDP2 then shards over them.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import moesys

HIDDEN, EXPERTS, TOKENS = 64, 8, 256


class Block(nn.Module):
    """A dense layer, then experts: [B, S, H] → [B, S, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dense = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        # bias_rate: loss-free balancing, as in DeepSeek-V3.
        gate = moesys.TopKGate(HIDDEN, EXPERTS, top_k=2, score="sigmoid", bias_rate=0.001)
        self.moe = moesys.MoELayer(gate, moesys.Experts(EXPERTS, HIDDEN, ffn_hidden=128))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.dense(x))
        return x + self.moe(self.norm(x))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--expert-ranks", type=int, default=2)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same model on every rank
    model = nn.Sequential(nn.Linear(16, HIDDEN), Block(), Block(), nn.Linear(HIDDEN, 16), nn.Softplus()).to(device)
    shape = world // arguments.expert_ranks, arguments.expert_ranks
    mesh = init_device_mesh(device, shape, mesh_dim_names=("data", "expert"))
    moesys.expert_parallel(model, mesh)  # the one call; before fully_shard and the optimizer
    for block in model[1:3]:
        fully_shard(block)
    fully_shard(model)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1 + rank)  # other data on every rank
    for step in range(1, arguments.steps + 1):
        x = torch.randn(8, TOKENS // 8, 16, generator=generator).to(device)
        loss = (model(x) - x.roll(1, -1).abs()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = moesys.clip_grad_norm_(model.parameters(), 1.0)  # the true norm, over dense layers and experts
        optimizer.step()
        moesys.update_gates(model)
        dist.all_reduce(loss.detach(), dist.ReduceOp.SUM)
        if rank == 0 and step % 10 == 0:
            print(f"step {step}  loss {loss.item() / world:.4f}  gradient norm {norm.item():.3f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
