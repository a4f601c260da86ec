"""Grouped-query attention, over the whole sequence or a sliding window of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from moesys.config.section import Dim, Field, PositiveFloat, Section
from moesys.errors import Problem
from moesys.models.parts.axes import Axis, Kept, Weight, kept_by_norm, norm_start
from moesys.models.parts.mixer import Mixer, kept_by_attention, seen
from moesys.words import divisors

if TYPE_CHECKING:
    from torch import nn

    from moesys.models.attention import CausalCore


class HeadsKeys(Section):
    """What every kind of attention has."""

    heads: Dim = 4
    """Query heads."""
    softmax_scale: PositiveFloat | None = None
    """Factor on the scores; default: 1 / √(size of a head's query), for mla times YaRN's (Granite:
    attention_multiplier)."""


class GroupedQueryKeys(HeadsKeys):
    """Keys of grouped-query attention."""

    kv_heads: Dim | None = None
    """Key and value heads of gqa; default: as many as query heads."""
    head_dim: Dim | None = None
    """Size of one head of gqa; default: hidden / heads."""
    bias: bool | Literal["qkv"] = False
    """gqa: a bias on the query, key, value and output projections (GPT-OSS), or on all but the output's (qkv:
    Qwen2-MoE, GLM-4.5)."""
    qk_norm: Literal["none", "head", "full", "head_after_rotary"] = "none"
    """gqa: RMSNorm of queries and keys: none, per head (Qwen3), over all heads together (OLMoE), or per head after the
    rotation by their positions (Hunyuan-A13B)."""
    clip_qkv: PositiveFloat | None = None
    """gqa: queries, keys and values are clamped to ± this (OLMoE); default: not."""
    output_gate: bool = False
    """gqa: the result of attention is multiplied by a sigmoid of the token, one for each of its features
    (Qwen3-Next)."""
    sinks: bool = False
    """gqa: a learned logit per head joins the softmax's denominator, so that a head may attend to nothing (GPT-OSS)."""
    rotary_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    """gqa: share of each head, its first elements, that rotary positions turn (GLM-4.5 and MiniMax-M2: 0.5); 0: no
    positions."""
    window: Dim | None = None
    """gqa: tokens that a token attends to, itself the last of them (sliding-window attention, Mistral); default: all
    before it."""


NATIVE_ONLY = {
    "softmax_scale": "a factor on scores of one's own",
    "rotary_fraction": "a rotation of a part of each head",
    "clip_qkv": "a bound of queries, keys and values",
    "output_gate": "a gate on the result of attention",
    "sinks": "a sink per head",
}
"""Keys that `engine: megatron` does not follow, in words."""


class GroupedQuery(Mixer):
    """Attention whose key and value heads are shared by groups of query heads (arXiv 2305.13245)."""

    kind = "gqa"
    summary = "grouped-query attention"
    aliases = ("mha", "mqa", "multi_head")
    keys = GroupedQueryKeys
    decides = dict.fromkeys(("softmax_scale", "rotary_fraction", "window", "clip_qkv"), "MEANT")
    styles = {"q_norm": "heads", "k_norm": "heads", "sinks": "own"}
    remembers = True

    def meant(self) -> dict[str, Any]:
        """Key heads, size of a head, factor on the scores."""
        scale = self.a.softmax_scale or self.head_dim**-0.5
        return {"kv_heads": self.kv_heads, "head_dim": self.head_dim, "softmax_scale": scale}

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.a.head_dim or self.model.hidden // self.a.heads

    @property
    def rotary_dim(self) -> int:
        """The share of a head that is turned."""
        return int(self.head_dim * self.a.rotary_fraction)

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.a.kv_heads or self.a.heads

    @property
    def _heads(self) -> Axis:
        return Axis("heads", self.a.heads, self.head_dim, f"{self.path}.heads")

    @property
    def _kv_heads(self) -> Axis:
        return Axis("kv_heads", self.kv_heads, self.head_dim, f"{self.path}.kv_heads")

    def weights(self) -> Iterator[Weight]:
        """Projections with biases, and norms."""
        hidden = Axis("hidden", self.model.hidden)
        for name, axis in (("q_proj", self._heads), ("k_proj", self._kv_heads), ("v_proj", self._kv_heads)):
            yield Weight(f"{name}.weight", (axis, hidden))
            if self.a.bias:
                yield Weight(f"{name}.bias", (axis,), "bias")
        if self.a.output_gate:
            yield Weight("gate_proj.weight", (self._heads, hidden))
        yield Weight("o_proj.weight", (hidden, self._heads))
        if self.a.bias is True:
            yield Weight("o_proj.bias", (hidden,), "bias")
        if self.a.qk_norm != "none":
            full, one = self.a.qk_norm == "full", Axis("head_dim", self.head_dim)
            start = norm_start(self.model.norm)
            yield Weight("q_norm.weight", (self._heads if full else one,), "norm", start=start)
            yield Weight("k_norm.weight", (self._kv_heads if full else one,), "norm", start=start)
        if self.a.sinks:
            yield Weight("sinks.weight", (replace(self._heads, each=1),), "bias")

    def flops(self, seq_len: int) -> float:
        """Scores and sums over the keys that a query sees on average."""
        return 4 * self.a.heads * self.head_dim * seen(seq_len, self.a.window)

    def kept(self, run: Any, shape: Any) -> Iterator[Kept]:
        """Attention's inputs and result; the projection's input is that result."""
        a, d, cp = self.a, self.head_dim, shape.degrees.cp
        yield from kept_by_attention(a.heads, self.kv_heads, d, d, run, cp, a.window)
        if a.qk_norm != "none":
            yield from kept_by_norm((a.heads + self.kv_heads) * d, "heads", shape.degrees.tp > 1, run)
        if a.clip_qkv is not None:
            yield Kept((a.heads + 2 * self.kv_heads) * d, "heads")
        if a.output_gate:
            yield Kept(2 * a.heads * d, "heads")  # its sigmoid, and what is multiplied with it

    def results(self, shape: Any) -> Iterator[Kept]:
        """Those of the norms, too."""
        yield from self.products()
        if self.a.qk_norm != "none":
            yield Kept((self.a.heads + self.kv_heads) * self.head_dim, "heads")

    def gathered(self) -> Iterator[Axis]:
        """Keys and values."""
        yield from (self._kv_heads, self._kv_heads)

    def head_sizes(self) -> tuple[int, int, int, int]:
        """Query heads, key heads, size of a query, size of a value."""
        return self.a.heads, self.kv_heads, self.head_dim, self.head_dim

    def caches(self, module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
        """Keys and values, of a window those in it."""
        from moesys.models.key_cache import CachedCore

        yield module, "core", CachedCore(cast("CausalCore", module.get_submodule("core")))

    def check(self) -> list[Problem]:
        """Heads divide what they share, and heads have pairs to turn."""
        a, hidden, problems = self.a, self.model.hidden, []
        if a.head_dim is None and hidden % a.heads:
            rule = f"must divide model.hidden({hidden}) unless {self.path}.head_dim is given"
            problems.append(Problem(f"{self.path}.heads", rule, f"one of {divisors(hidden)}"))
        if a.kv_heads is not None and a.heads % a.kv_heads:
            rule = f"must divide {self.path}.heads({a.heads})"
            problems.append(Problem(f"{self.path}.kv_heads", rule, f"one of {divisors(a.heads)}"))
        if not problems and self.rotary_dim % 2:
            rule = f"rotary positions turn pairs: the size {self.rotary_dim} must be even"
            key, remedy = ("head_dim", "use an even size")
            if a.rotary_fraction < 1:
                rule = f"rotary positions turn pairs: {self.rotary_dim} of {self.head_dim} elements must be even"
                key, remedy = "rotary_fraction", f"choose one that turns {self.rotary_dim - 1} or {self.rotary_dim + 1}"
            problems.append(Problem(f"{self.path}.{key}", rule, remedy))
        return problems

    def megatron(self) -> list[Problem]:
        """What Megatron-Core's attention has not."""
        problems = []
        if self.a.bias is True:
            rule = "Megatron has no attention with a bias on every projection and none on the rest"
            problems.append(Problem(f"{self.path}.bias", rule, "set it to false or qkv"))
        if self.a.qk_norm not in ("none", "head"):
            rule = "Megatron's norm of queries and keys is per head, and before the rotation"
            problems.append(Problem(f"{self.path}.qk_norm", rule, "set it to head"))
        if self.a.window is not None:
            rule = "Megatron's sliding window needs Transformer Engine: it is not in engine: megatron"
            problems.append(Problem(f"{self.path}.window", rule, "remove it"))
        for key, words in NATIVE_ONLY.items():
            if getattr(self.a, key) != type(self.a).model_fields[key].default:
                problems.append(Problem(f"{self.path}.{key}", f"{words} is not in engine: megatron", "remove it"))
        return problems

    def build(self) -> nn.Module:
        """The module."""
        from moesys.models.attention import GroupedQueryAttention

        a = self.a
        return GroupedQueryAttention(
            self.model.hidden,
            a.heads,
            self.kv_heads,
            self.head_dim,
            bias=bool(a.bias),
            output_bias=a.bias is True,
            qk_norm=a.qk_norm,
            eps=self.model.norm_eps,
            window=a.window,
            scale=a.softmax_scale,
            sinks=a.sinks,
            centered=self.model.norm == "rms_zero_centered",
            clip=a.clip_qkv,
            output_gate=a.output_gate,
        )
