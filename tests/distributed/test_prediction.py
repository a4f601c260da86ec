"""Multi-token prediction against DeepSeek-V3's formulas (arXiv 2412.19437, section 2.2), written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import start
from prediction_ranks import trained
from support import changed
from torch import Tensor
from torch.nn.functional import cross_entropy, silu

from moesys.config import Config

HIDDEN, HEADS, EXPERTS, K, S, BATCH, MICRO = 32, 4, 4, 2, 12, 4, 2
DEPTH, WEIGHT, BALANCE, Z, EPS = 2, 0.5, 0.05, 0.01, 1e-5

Weights = dict[str, Tensor]


def config(small: dict) -> Config:
    raw = changed(small, {"train": {"seq_len": S, "global_batch": BATCH, "micro_batch": MICRO, "eval_sequences": 4}})
    raw["model"] = {
        "hidden": HIDDEN, "layers": 2, "ffn_hidden": 40, "init_std": 0.3, "norm_eps": EPS,
        "attention": {"heads": HEADS, "kv_heads": HEADS},
        "mtp": {"depth": DEPTH, "loss_weight": WEIGHT},
        "moe": {
            "experts": EXPERTS, "top_k": K, "ffn_hidden": 24, "first_dense": 1, "balance_loss": BALANCE, "z_loss": Z,
        },
    }  # fmt: skip
    return Config.model_validate(raw)


@pytest.fixture(scope="module")
def found(small: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("prediction")
    start(trained, 1, config(small), folder)
    return torch.load(folder / "found.pt", weights_only=False)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def rotated(x_BShd: Tensor) -> Tensor:
    half = x_BShd.shape[-1] // 2
    rates = 10000.0 ** -(torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(S, dtype=torch.float32)[:, None] * rates  # as the model has them
    cos, sin = (table.double()[:, None] for table in (angles.cos(), angles.sin()))
    a, b = x_BShd[..., :half], x_BShd[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attention(x_BSH: Tensor, w: Weights, at: str) -> Tensor:
    q, k, v = ((x_BSH @ w[f"{at}{name}_proj.weight"].T).unflatten(-1, (HEADS, -1)) for name in "qkv")
    scores = torch.einsum("bqhd,bkhd->bhqk", rotated(q), rotated(k)) / q.shape[-1] ** 0.5
    seen = scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", seen, v).flatten(2) @ w[f"{at}o_proj.weight"].T


def experts(x_TH: Tensor, w: Weights, at: str) -> tuple[Tensor, Tensor]:
    """The layer's output, and its losses over the micro-batch."""
    logits = x_TH @ w[f"{at}gate.projection.weight"].T
    chance = logits.softmax(-1)
    weight, expert = chance.topk(K)
    weight = weight / weight.sum(-1, keepdim=True)
    rows = []
    for token, weights, names in zip(x_TH, weight, expert, strict=True):
        gate_up = [w[f"{at}experts.fc1"][e] for e in names]
        inner = [silu(token @ fc1[:, 0]) * (token @ fc1[:, 1]) for fc1 in gate_up]
        rows.append(sum(p * (y @ w[f"{at}experts.fc2"][e]) for p, y, e in zip(weights, inner, names, strict=True)))
    share = expert.flatten().bincount(minlength=EXPERTS).double() / expert.numel()
    loss = BALANCE * EXPERTS * (share * chance.mean(0)).sum() + Z * logits.logsumexp(-1).square().mean()
    return torch.stack(rows), loss


def block(x_BSH: Tensor, w: Weights, layer: int) -> tuple[Tensor, Tensor]:
    at = f"layers.{layer}."
    x = x_BSH + attention(norm(x_BSH, w[f"{at}attention_norm.weight"]), w, f"{at}attention.")
    h = norm(x, w[f"{at}ffn_norm.weight"])
    if layer == 0:
        gate, up, down = (w[f"{at}ffn.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return x + (silu(h @ gate.T) * (h @ up.T)) @ down.T, torch.zeros(())
    out, loss = experts(h.flatten(0, 1), w, f"{at}ffn.")
    return x + out.view_as(x), loss


def losses(window_BS: Tensor, w: Weights, depth: int) -> tuple[Tensor, Tensor]:
    """The sums of the cross-entropies of the next token and of those after it [1 + depth], and the gates' losses."""
    token, label = window_BS[:, :-1], window_BS[:, 1:]
    x, auxiliary = block(w["embed.weight"][token], w, 0)
    x, one = block(x, w, 1)
    auxiliary = auxiliary + one
    h = norm(x, w["norm.weight"])
    sums = [cross_entropy((h @ w["head.weight"].T).flatten(0, 1), label.flatten(), reduction="sum")]
    for k in range(1, depth + 1):
        at = f"layers.{1 + k}."
        # Token i + k of the sequence; after its end token 0, of which no loss is taken.
        later = torch.cat((token[:, k:], torch.zeros_like(token[:, :k])), 1)
        embedded = norm(w["embed.weight"][later], w[f"{at}embed_norm.weight"])
        both = torch.cat((embedded, norm(h, w[f"{at}hidden_norm.weight"])), -1)
        x, one = block(both @ w[f"{at}project.weight"].T, w, 1 + k)
        auxiliary = auxiliary + one
        h = norm(x, w[f"{at}norm.weight"])
        logits = h[:, :-k] @ w["head.weight"].T
        sums.append(cross_entropy(logits.flatten(0, 1), label[:, k:].flatten(), reduction="sum"))
    return torch.stack(sums), auxiliary


def test_loss_and_every_gradient_equal_the_formulas(found: dict[str, Any]) -> None:
    w = {name: weight.double().requires_grad_() for name, weight in found["weights"].items()}
    total, told = torch.zeros(()), torch.zeros(1 + DEPTH, dtype=torch.float64)
    batches = found["windows"].split(MICRO)
    for window in batches:
        sums, auxiliary = losses(window, w, DEPTH)
        told += sums.detach()
        mean = sums / (BATCH * S)  # the paper divides by T at every depth
        total = total + mean[0] + WEIGHT / DEPTH * mean[1:].sum() + auxiliary / len(batches)
    total.backward()
    record = found["record"]
    assert record["loss"] == pytest.approx(told[0].item() / (BATCH * S), rel=1e-12)
    for k in range(1, DEPTH + 1):
        # What is reported is a mean over the tokens that depth k predicts.
        assert record[f"mtp_loss_{k}"] == pytest.approx(told[k].item() / (BATCH * (S - k)), rel=1e-12)
    assert found["gradients"].keys() == w.keys()
    for name, weight in w.items():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name
        torch.testing.assert_close(found["gradients"][name], weight.grad, rtol=1e-8, atol=1e-12, msg=name)


def test_evaluation_leaves_it_out(found: dict[str, Any]) -> None:
    w = {name: weight.double() for name, weight in found["weights"].items()}
    sums, _ = losses(found["heldout"], w, 0)
    assert found["evaluation"] == pytest.approx(sums.item() / found["heldout"][:, 1:].numel(), rel=1e-12)
