"""An MoE layer in a plain training loop: a small model of bytes learns one file of Python's standard library.

python examples/moe_layer.py --steps 100
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import moesys

HIDDEN, EXPERTS, SEQUENCE, BATCH = 64, 8, 64, 8


class Block(nn.Module):
    """Causal attention, then experts in place of the feed-forward: [B, S, H] → [B, S, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)])
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        # Each token goes to 2 of 8 experts; the losses keep experts busy and logits small.
        gate = moesys.TopKGate(HIDDEN, EXPERTS, top_k=2, balance=moesys.Balance(balance=0.01, z=0.001))
        self.moe = moesys.MoELayer(gate, moesys.Experts(EXPERTS, HIDDEN, ffn_hidden=96))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, HIDDEN // 4)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.moe(self.norms[1](x))


class Model(nn.Module):
    """Bytes int64 [B, S] → logits of the next byte [B, S, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, HIDDEN), nn.Embedding(SEQUENCE, HIDDEN)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(HIDDEN, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(tokens) + self.place.weight))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        start = torch.randint(len(text) - SEQUENCE - 1, (BATCH, 1))
        window = text[start + torch.arange(SEQUENCE + 1)]
        loss = nn.functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # the gates' losses join in here by themselves
        optimizer.step()
        # What each layer has routed since the last call: assignments per expert, and its losses.
        routed = {name: layer.statistics.take() for name, layer in moesys.moe_layers(model).items()}
        if step % 10 == 0:
            busiest = {name: (r["load"].max() / r["load"].float().mean()).item() for name, r in routed.items()}
            told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in busiest.items())
            print(f"step {step}  loss {loss.item():.3f}  busiest expert / mean: {told}")


if __name__ == "__main__":
    main()
