"""Which of torch's attention kernels the shapes of the shipped models may take on a GPU: never the quadratic one.

No GPU is needed: the tensors are fake, and the rules for kernels are those of torch's sdp_utils.cpp (2.11 to 2.14).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import CausalBias, causal_lower_right

from moesys import shipped
from moesys.config.load import load
from moesys.models import attention
from moesys.models.attention import CausalCore, attend
from moesys.models.parts.model import block
from moesys.models.rotary import rotary_angles
from moesys.parallel.gathered_attention import GatheredCore

MODELS = [p for p in sorted(shipped.CONFIGS.rglob("*.yaml")) if p.parent.name in ("models", "configs")]
MIXTRAL = shipped.CONFIGS / "models" / "mixtral-8x7b.yaml"
SEQUENCE, LARGEST_HEAD = 64, 256


def flash(params: Any) -> bool:
    """What `torch.backends.cuda.can_use_flash_attention` answers from Ampere on."""
    q, k, v = params.query, params.key, params.value
    narrow = q.dtype in (torch.bfloat16, torch.float16)
    same = q.shape[-1] == k.shape[-1] == v.shape[-1] <= LARGEST_HEAD
    grouped = q.shape[1] == k.shape[1] or (params.enable_gqa and q.shape[1] % k.shape[1] == 0)
    square = not params.is_causal or q.shape[2] == k.shape[2]
    return narrow and same and grouped and square and params.attn_mask is None


def efficient(params: Any) -> bool:
    """What `torch.backends.cuda.can_use_efficient_attention` answers: heads of two sizes, no groups."""
    q, k, v = params.query, params.key, params.value
    aligned = all(x.shape[-1] * x.element_size() % 16 == 0 for x in (q, k, v))
    known = q.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and aligned and q.shape[1] == k.shape[1] and not params.enable_gqa and q.shape[-1] == k.shape[-1]


def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, gqa: bool) -> str:
    """The kernel that torch runs, and whether it is given a whole mask."""
    bias = isinstance(mask, CausalBias)
    params = SimpleNamespace(
        query=q, key=k, value=v, attn_mask=None if bias else mask, is_causal=is_causal, enable_gqa=gqa
    )
    found = "flash" if flash(params) else "efficient" if efficient(params) else "math"
    return found if mask is None or bias else f"{found} with a mask"


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Inside, tensors are fake ones of a GPU; the list gets the kernel of each attention."""
    ran: list[str] = []

    def attention_of(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False, scale=None):
        ran.append(kernel(q, k, v, attn_mask, is_causal, enable_gqa))
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention_of)
    monkeypatch.setattr(attention, "can_use_flash_attention", flash)
    with FakeTensorMode():
        yield ran


class OfOneRank(GatheredCore):
    """The attention of context rank 1 of 2 that has gathered something."""

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(rank=lambda: 1, size=lambda: 2), SEQUENCE)  # type: ignore[arg-type]

    def _whole(self, x_BSgd: Tensor) -> Tensor:
        return torch.cat([x_BSgd, x_BSgd], 1)


def heads(path: Path, dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a configuration's model, of so many tokens, on a GPU."""
    model = load(path).config.model
    h, g, size, value = block(model, 0).mixer.head_sizes()
    shapes = ((h, size), (g, size), (g, value))
    q, k, v = (torch.empty(1, tokens, *shape, dtype=dtype, device="cuda") for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_every_shipped_shape_takes_a_fused_kernel(path, monkeypatch):
    core, of_rank = CausalCore(), OfOneRank()
    with watched(monkeypatch) as ran:
        for dtype in (torch.bfloat16, torch.float32):
            core(*heads(path, dtype, SEQUENCE))
            of_rank(*heads(path, dtype, SEQUENCE // 2))
    # The two head sizes of latent attention rule out flash attention, as float32 does.
    latent = load(path).config.model.attention.kind == "mla"
    assert ran == (["efficient"] if latent else ["flash"]) * 3 + ["efficient"] * 3


def test_the_last_queries_see_all_keys_before_them_without_a_bias_too(monkeypatch):
    """torch's `is_causal` would count from the first key."""
    made = {(SEQUENCE // 4, SEQUENCE): causal_lower_right(SEQUENCE // 4, SEQUENCE)}  # fake tensors cannot be biases
    monkeypatch.setattr(attention, "causal_lower_right", lambda *sizes: made[sizes])
    with watched(monkeypatch) as ran:
        _, k, v = heads(MIXTRAL, torch.bfloat16, SEQUENCE)
        attend(heads(MIXTRAL, torch.bfloat16, SEQUENCE // 4)[0], k, v)
    assert ran == ["flash"]


def test_a_sequence_of_another_length_is_refused():
    q, k = torch.randn(1, SEQUENCE, 4, 8), torch.randn(1, SEQUENCE, 2, 8)
    with pytest.raises(ValueError, match=r"has 64 tokens of a sequence of 64 over cp\(2\): it must have 32"):
        OfOneRank()(q, k, k)


def test_a_mask_would_be_seen(monkeypatch):
    """What this repository once passed under context parallelism: a mask beside grouped heads."""
    with watched(monkeypatch) as ran:
        q, k, v = (
            x.transpose(1, 2) for x in heads(shipped.CONFIGS / "models" / "mixtral-8x7b.yaml", torch.bfloat16, SEQUENCE)
        )
        mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool, device="cuda")
        nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert ran == ["math with a mask"]


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_bias_means_what_the_mask_means(kv_heads):
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 4, 8), torch.randn(2, 14, kv_heads, 8)
    by_mask = attend(q, k, k)
    q, k = q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(4 // kv_heads, 1)
    by_bias = nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=causal_lower_right(6, 14))
    torch.testing.assert_close(by_bias.transpose(1, 2), by_mask)


def test_a_bias_made_beforehand_leaves_one_graph():
    class Core(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = causal_lower_right(6, 14)

        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return attend(q, k, k, self.bias)

    q, k = torch.randn(2, 6, 4, 8), torch.randn(2, 14, 2, 8)
    compiled = torch.compile(Core(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k), attend(q, k, k))


MORE: dict[str, Any] = {"window": 3, "qk_norm": "head_after_rotary", "clip": 1.0, "output_gate": True, "centered": True}


@pytest.mark.parametrize("keys", [{}, MORE], ids=["sinks", "all parts"])
def test_attention_with_sinks_and_more_is_one_graph(keys):
    torch.manual_seed(0)
    made = attention.GroupedQueryAttention(16, 4, 2, 8, sinks=True, **keys)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, tables = torch.randn(2, 8, 16), rotary_angles(torch.arange(8), 4, 1e4)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    found = []
    for module in (compiled, made):
        out = module(x, *tables)
        made.zero_grad()
        out.sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in made.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
