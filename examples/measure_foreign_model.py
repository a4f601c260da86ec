"""All-to-all in a foreign model: what it costs per layer, and why. Nothing of the model below is moesys's.

torchrun --standalone --nproc-per-node 2 examples/measure_foreign_model.py --steps 12
"""

from __future__ import annotations

import argparse
from collections import OrderedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moesys

HIDDEN = 128


class AllToAll(torch.autograd.Function):
    """Rows [N, H] by the ranks that get them → rows by the ranks that sent them; `send`, `receive`: how many."""

    @staticmethod
    def forward(ctx, rows, send, receive):
        ctx.send, ctx.receive = send, receive
        out = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), receive, send)
        return out

    @staticmethod
    def backward(ctx, grad):
        return AllToAll.apply(grad, ctx.receive, ctx.send), None, None


class SwitchLayer(nn.Module):
    """One expert a rank, one expert a token (Switch): x [T, H] → [T, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, dist.get_world_size())
        self.experts = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        weight, expert = self.router(x).softmax(-1).max(-1)
        order = expert.argsort(stable=True)
        send = expert.bincount(minlength=dist.get_world_size())
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send)
        send, receive = send.tolist(), receive.tolist()
        rows = AllToAll.apply(self.experts(AllToAll.apply(x[order], send, receive)), receive, send)
        return x + torch.zeros_like(x).index_copy(0, order, rows) * weight[:, None]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(OrderedDict(embed=nn.Linear(HIDDEN, HIDDEN), first=SwitchLayer(), second=SwitchLayer()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = moesys.CommunicationRecorder(model)
    for _ in range(parser.parse_args().steps):
        with recorder.step():
            model(torch.randn(1024, HIDDEN)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    explanation = recorder.explain()  # collective; rank 0 has it
    if explanation is not None:
        print(explanation.sentence)
        for phase in explanation.phases:
            way = "backward" if phase.backward else "forward"
            waiting, moving = phase.causes.waiting * 1e3, phase.causes.transfer * 1e3
            print(f"{phase.layer:<7} {phase.part:<8} {way:<8} {waiting:6.2f} ms waiting  {moving:6.2f} ms moving bytes")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
