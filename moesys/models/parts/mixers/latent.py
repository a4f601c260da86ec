"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moesys.config.section import Dim, PositiveFloat
from moesys.errors import Problem
from moesys.models.parts.axes import Axis, Kept, Weight, kept_by_norm
from moesys.models.parts.mixer import Mixer, kept_by_attention, seen
from moesys.models.parts.mixers.grouped_query import HeadsKeys

if TYPE_CHECKING:
    from torch import nn


class LatentKeys(HeadsKeys):
    """Keys of latent attention."""

    q_lora_rank: Dim | None = None
    """mla: rank of the query's compression; default: queries are not compressed."""
    kv_lora_rank: Dim = 512
    """mla: rank of the joint compression of keys and values."""
    qk_nope_head_dim: Dim = 128
    """mla: size of a head's part without rotary position."""
    qk_rope_head_dim: Dim = 64
    """mla: size of a head's part with rotary position, shared by all heads of the key."""
    v_head_dim: Dim = 128
    """mla: size of a head's value."""
    latent_norm_eps: PositiveFloat | None = None
    """mla: norm_eps of the norms of both compressions; default: model.norm_eps (DeepSeek's own code has 1e-6)."""


class Latent(Mixer):
    """Attention whose keys and values come from one small latent."""

    kind = "mla"
    summary = "multi-head latent attention (DeepSeek-V2)"
    aliases = ("latent", "multi_latent")
    keys = LatentKeys
    styles = {"shared_key": "summed"}
    decides = {"softmax_scale": "MEANT", "latent_norm_eps": "MEANT"}
    remembers = True

    def meant(self) -> dict[str, Any]:
        """What the norms of latents add."""
        return {"latent_norm_eps": self.a.latent_norm_eps or self.model.norm_eps}

    @property
    def rotary_dim(self) -> int:
        """The part of a head that is turned."""
        return self.a.qk_rope_head_dim

    @property
    def query_dim(self) -> int:
        """Size of one head's query."""
        return self.a.qk_nope_head_dim + self.a.qk_rope_head_dim

    @property
    def scale(self) -> float | None:
        """Factor on the scores; None: 1 / √(size of a query)."""
        scaling = self.model.rope_scaling
        if self.a.softmax_scale is not None or scaling is None or scaling.score_factor == 1.0:
            return self.a.softmax_scale
        return self.query_dim**-0.5 * scaling.score_factor

    def _heads(self, each: int) -> Axis:
        return Axis("heads", self.a.heads, each, f"{self.path}.heads")

    def weights(self) -> Iterator[Weight]:
        """Compressions, expansions, norms, and the output."""
        a, hidden = self.a, Axis("hidden", self.model.hidden)
        latent = Axis("latent", a.kv_lora_rank)
        if a.q_lora_rank is None:
            yield Weight("q_proj.weight", (self._heads(self.query_dim), hidden))
        else:
            rank = Axis("latent", a.q_lora_rank)
            yield Weight("q_a_proj.weight", (rank, hidden))
            yield Weight("q_a_norm.weight", (rank,), "norm")
            yield Weight("q_b_proj.weight", (self._heads(self.query_dim), rank))
        yield Weight("kv_a_proj.weight", (Axis("latent", a.kv_lora_rank + a.qk_rope_head_dim), hidden))
        yield Weight("kv_a_norm.weight", (latent,), "norm")
        yield Weight("kv_b_proj.weight", (self._heads(a.qk_nope_head_dim + a.v_head_dim), latent))
        yield Weight("o_proj.weight", (hidden, self._heads(a.v_head_dim)))

    def flops(self, seq_len: int) -> float:
        """Scores and sums over the keys that a query sees on average."""
        return 2 * self.a.heads * (self.query_dim + self.a.v_head_dim) * seen(seq_len)

    def kept(self, run: Any, shape: Any) -> Iterator[Kept]:
        """Attention's inputs and result; the projection's input is that result."""
        a = self.a
        yield from kept_by_attention(a.heads, a.heads, self.query_dim, a.v_head_dim, run, shape.degrees.cp)
        split = shape.degrees.tp > 1
        yield Kept(a.qk_rope_head_dim, "latent")
        for size in (a.q_lora_rank, a.kv_lora_rank):
            if size is not None:
                yield from kept_by_norm(size, "latent", split, run)
                yield Kept(size, "latent")  # what is expanded

    def results(self, shape: Any) -> Iterator[Kept]:
        """Those of the norms, too."""
        yield from self.products()
        yield Kept((self.a.q_lora_rank or 0) + self.a.kv_lora_rank, "latent")

    def gathered(self) -> Iterator[Axis]:
        """Keys and values of every head."""
        yield from (self._heads(self.query_dim), self._heads(self.a.v_head_dim))

    def head_sizes(self) -> tuple[int, int, int, int]:
        """Query heads, key heads, size of a query, size of a value."""
        return self.a.heads, self.a.heads, self.query_dim, self.a.v_head_dim

    def caches(self, module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
        """Latents and the shared key."""
        from moesys.models.key_cache import LatentCache

        yield module, "history", LatentCache()

    def check(self) -> list[Problem]:
        """What is turned has pairs."""
        if self.rotary_dim % 2 == 0:
            return []
        rule = f"rotary positions turn pairs: the size {self.rotary_dim} must be even"
        return [Problem(f"{self.path}.qk_rope_head_dim", rule, "use an even size")]

    def build(self) -> nn.Module:
        """The module."""
        from moesys.models.attention import LatentAttention

        a = self.a
        return LatentAttention(
            self.model.hidden,
            a.heads,
            nope=a.qk_nope_head_dim,
            rope=a.qk_rope_head_dim,
            value=a.v_head_dim,
            latent=a.kv_lora_rank,
            query_rank=a.q_lora_rank,
            eps=a.latent_norm_eps or self.model.norm_eps,
            scale=self.scale,
        )
