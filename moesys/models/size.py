"""Parameters and FLOPs of a model without building it; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig, MoEConfig


Kind = Literal["matrix", "norm", "bias", "temperature"]
"""What a parameter is, whatever its shape: experts' biases are stacked, [E, …], and no matrices."""


def kind(name: str) -> Kind:
    """The kind of the parameter of this name; only matrices decay, and only they are multiplied with.

    Matrices are all weights of linear maps: of attention, of feed-forwards, of experts and their LoRA factors, of
    gates, of mixes and of constant experts; and embeddings.
    """
    *above, leaf = name.split(".")
    module = above[-1] if above else ""
    if module == "norm" or module.endswith("_norm"):
        return "norm"
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias"
    return "temperature" if leaf == "log_temperature" else "matrix"


@dataclass(frozen=True)
class Weight:
    """One parameter: its name in the built model, its shape, and the block it belongs to (None: none)."""

    name: str
    shape: tuple[int, ...]
    layer: int | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def module(self) -> str:
        """Name of the module that holds it, without the path: "q_proj", "experts", "embed"."""
        return self.name.split(".")[-2]

    @property
    def kind(self) -> Kind:
        """Its kind."""
        return kind(self.name)

    @property
    def routed(self) -> bool:
        """Whether it belongs to routed experts."""
        return self.module == "experts"

    @property
    def routing(self) -> bool:
        """Whether it belongs to a gate, or to what mixes in shared experts."""
        return ".ffn.gate." in self.name or ".ffn.mix." in self.name


def weights(model: ModelConfig, vocab_size: int) -> Iterator[Weight]:
    """Every parameter, in the order and by the names of `moesys.models.Decoder`; tied ones once."""
    yield Weight("embed.weight", (vocab_size, model.hidden))
    for layer in range(model.layers):
        prefix = f"layers.{layer}."
        for name, shape in _block(model, layer):
            yield Weight(prefix + name, shape, layer)
    yield Weight("norm.weight", (model.hidden,))
    if not model.tie_embeddings:
        yield Weight("head.weight", (vocab_size, model.hidden))


def _block(model: ModelConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "attention_norm.weight", (model.hidden,)
    for name, shape in _attention(model):
        yield f"attention.{name}", shape
    yield "ffn_norm.weight", (model.hidden,)
    if model.moe is None or not model.is_moe(layer):
        yield from _feed_forward("ffn", model.hidden, model.ffn_hidden or 0)
        return
    m, h = model.moe, model.hidden
    yield from _gate(m, h)
    yield from _experts(m, h)
    if m.constant_experts:
        yield "ffn.zero.mix.weight", (2 * m.constant_experts, h)
        yield "ffn.zero.constant.weight", (h, m.constant_experts)
    if m.shared_experts:
        yield from _feed_forward("ffn.shared", h, m.shared_width, m.gated)
        yield from _mix(m, h)


def _gate(m: MoEConfig, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    candidates = m.experts + m.zero_computation
    if m.gate.kind in ("hash", "random"):
        return
    if m.gate.kind == "cosine":
        dim = m.gate.dim or max(2, candidates // 2)
        yield "ffn.gate.projection.down", (dim, hidden)
        yield "ffn.gate.projection.weight", (candidates, dim)
        yield "ffn.gate.projection.log_temperature", (1,)
    else:
        yield "ffn.gate.projection.weight", (candidates * m.gate.slots, hidden)
    if m.gate.bias:
        yield "ffn.gate.projection.bias", (candidates,)
    if m.gate.noise == "gaussian":
        yield "ffn.gate.noise.weight", (candidates, hidden)


def frozen(name: str, patterns: Sequence[str]) -> bool:
    """Whether the parameter `name` is not trained, with `patterns` of `train.freeze`."""
    return ".experts.base." in name or any(fnmatchcase(name, pattern) for pattern in patterns)


def _experts(m: MoEConfig, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    parts = 2 if m.gated else 1
    if m.lora_rank is not None:
        yield "ffn.experts.fc1_lora_a", (m.experts, hidden, parts, m.lora_rank)
        yield "ffn.experts.fc1_lora_b", (m.experts, parts, m.lora_rank, m.ffn_hidden)
        yield "ffn.experts.fc2_lora_a", (m.experts, m.ffn_hidden, m.lora_rank)
        yield "ffn.experts.fc2_lora_b", (m.experts, m.lora_rank, hidden)
        yield "ffn.experts.base.fc1.weight", (parts * m.ffn_hidden, hidden)
        yield "ffn.experts.base.fc2.weight", (hidden, m.ffn_hidden)
        return
    yield "ffn.experts.fc1", (m.experts, hidden, parts, m.ffn_hidden)
    yield "ffn.experts.fc2", (m.experts, m.ffn_hidden, hidden)
    if m.bias:
        yield "ffn.experts.fc1_bias", (m.experts, parts, m.ffn_hidden)
        yield "ffn.experts.fc2_bias", (m.experts, hidden)


def _mix(m: MoEConfig, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    outputs = {"add": 0, "gate": 1, "residual": 2, "cmr": 1}[m.shared_mix]
    if outputs:
        yield "ffn.mix.projection.weight", (outputs, hidden)
    if m.shared_mix in ("residual", "cmr"):
        yield "ffn.mix.projection.bias", (outputs,)


def _feed_forward(name: str, hidden: int, inner: int, gated: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    if gated:
        yield f"{name}.gate_proj.weight", (inner, hidden)
    yield f"{name}.up_proj.weight", (inner, hidden)
    yield f"{name}.down_proj.weight", (hidden, inner)


def _attention(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    a, h = model.attention, model.hidden
    if a.kind == "mla":
        query = a.heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
        if a.q_lora_rank is None:
            yield "q_proj.weight", (query, h)
        else:
            yield "q_a_proj.weight", (a.q_lora_rank, h)
            yield "q_a_norm.weight", (a.q_lora_rank,)
            yield "q_b_proj.weight", (query, a.q_lora_rank)
        yield "kv_a_proj.weight", (a.kv_lora_rank + a.qk_rope_head_dim, h)
        yield "kv_a_norm.weight", (a.kv_lora_rank,)
        yield "kv_b_proj.weight", (a.heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank)
        yield "o_proj.weight", (h, a.heads * a.v_head_dim)
        return
    query, key = a.heads * model.head_dim, (a.kv_heads or a.heads) * model.head_dim
    for name, out in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        yield f"{name}.weight", (out, h)
        if a.bias:
            yield f"{name}.bias", (out,)
    yield "o_proj.weight", (h, query)
    if a.bias:
        yield "o_proj.bias", (h,)
    if a.qk_norm != "none":
        full = a.qk_norm == "full"
        yield "q_norm.weight", (query if full else model.head_dim,)
        yield "k_norm.weight", (key if full else model.head_dim,)


def active_share(model: ModelConfig, weight: Weight) -> float:
    """Share of a weight that one token uses: k / E of the routed experts (or / (E + Z)), all of the others.

    Slots and merged experts use all experts for every token.
    """
    if model.moe is None or not weight.routed or model.moe.gate.kind in ("soft", "smear"):
        return 1.0
    return model.moe.mean_choices / model.moe.experts


def computed_share(model: ModelConfig, weight: Weight, seq_len: int) -> float:
    """Multiply-adds per token and element of a weight."""
    merged = model.moe is not None and model.moe.gate.kind == "smear"
    if merged and ".ffn.gate." in weight.name:
        return 1 / seq_len
    if model.moe is None or not weight.routed:
        return 1.0
    merging = 1 / seq_len if merged else 0.0
    return model.moe.rows_per_token(seq_len) * model.moe.mean_choices / model.moe.experts + merging


def parameters(model: ModelConfig, vocab_size: int) -> tuple[int, int]:
    """(total, active): all parameters, and those that one token uses, embeddings included in both."""
    every = list(weights(model, vocab_size))
    total = sum(w.numel for w in every)
    return total, round(sum(w.numel * active_share(model, w) for w in every))


def flops_per_token(model: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, float]:
    """FLOPs of one token's forward pass, by part: "embed", "layers.0", …, "head".

    Two per multiply-add of every active matrix; causal attention at half of seq_len on average.
    Backward costs twice as much again.
    """
    flops = {"embed": 0.0}
    for weight in weights(model, vocab_size):
        part = f"layers.{weight.layer}" if weight.layer is not None else "head"
        if weight.kind == "matrix" and weight.name != "embed.weight":
            flops[part] = flops.get(part, 0.0) + 2 * weight.numel * computed_share(model, weight, seq_len)
    a = model.attention
    size = a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim if a.kind == "mla" else 2 * model.head_dim
    for layer in range(model.layers):
        flops[f"layers.{layer}"] += a.heads * size * seq_len
        if model.moe is not None and model.is_moe(layer) and model.moe.gate.kind == "soft":
            # From tokens to slots and back.
            flops[f"layers.{layer}"] += 4 * model.moe.experts * model.moe.gate.slots * model.hidden
    if model.tie_embeddings:
        flops["head"] = flops.get("head", 0.0) + 2.0 * model.hidden * vocab_size
    return flops
