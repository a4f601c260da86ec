"""Named axes: meanings of dims, by which a dimension of parallelism says what it splits.

| axis            | meaning                                        | split by           |
|-----------------|------------------------------------------------|--------------------|
| `heads`         | query heads, each of its size                  | tp                 |
| `kv_heads`      | key and value heads, each of its size          | tp                 |
| `inner`         | inner features of a feed-forward               | tp                 |
| `vocab`         | entries of the embedding and of the head       | tp                 |
| `expert`        | routed experts                                 | ep                 |
| `expert_inner`  | inner features of one routed expert            | etp                |
| `expert_output` | output bias of one routed expert               | etp                |
| others          | `hidden`, `head_dim`, `latent`, `candidate`, … | data sharding only |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

SPLIT_BY = {
    **dict.fromkeys(("heads", "kv_heads", "inner", "vocab"), "tp"),
    "expert": "ep",
    **dict.fromkeys(("expert_inner", "expert_output"), "etp"),
}
"""The dimension of parallelism that splits an axis of this name; what is not here is split by data sharding alone."""


@dataclass(frozen=True)
class Axis:
    """One dim of a weight.

    Attributes:
        name: the dim's meaning, as in the table above.
        count: units that are split among ranks, as a whole each: heads, features, experts.
        each: elements of one unit.
        key: the key of the YAML that gives `count`, for messages.
    """

    name: str
    count: int
    each: int = 1
    key: str = ""

    @property
    def size(self) -> int:
        """Elements of the dim."""
        return self.count * self.each

    @property
    def split_by(self) -> str | None:
        """The dimension of parallelism that splits the axis."""
        return SPLIT_BY.get(self.name)


Kind = Literal["matrix", "norm", "bias", "temperature"]
"""A parameter's kind, whatever its shape: experts' biases are stacked, [E, …], and no matrices."""


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        name: its name in the built model.
        axes: one per dim.
        kind: only matrices decay, and only they are multiplied with: weights of attention, of feed-forwards, of experts
            and their LoRA factors, of gates, of mixes and of constant experts; and embeddings.
        layer: the number of its block; None: of no block.
        start: number of its initial values; None: as its kind has it (matrices N(0, init_std²), norms 1, biases 0).
        router: it belongs to a gate, or to a mix of shared experts.
        frozen: it is never trained.
        on_stream: it works on the stream as it lies between blocks (its norms).
        normalized: it is used divided by the norms of its rows, whose gradients tensor ranks sum in every pass.
        narrowed: backward keeps its copy in the type of the run.
        unit: FSDP gathers it apart from the rest of its block, together with the weights of the same unit.
        looked_up: rows are taken from it, and it is not multiplied with (embeddings).
        makes_logits: it is the head's, whose results are logits, or an embedding that is tied to it.
    """

    name: str
    axes: tuple[Axis, ...]
    kind: Kind = "matrix"
    layer: int | None = None
    start: float | None = None
    router: bool = False
    frozen: bool = False
    looked_up: bool = False
    makes_logits: bool = False
    on_stream: bool = False
    normalized: bool = False
    narrowed: bool = False
    unit: str = ""

    def within(self, prefix: str, layer: int | None = None) -> Weight:
        """The same weight of a part whose weights begin with `prefix`, in block `layer`."""
        return replace(self, name=prefix + self.name, layer=layer)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its full shape."""
        return tuple(axis.size for axis in self.axes)

    @property
    def numel(self) -> int:
        """Its elements."""
        return prod(self.shape)

    @property
    def routed(self) -> bool:
        """Whether it belongs to routed experts, each of which has its own."""
        return any(axis.name == "expert" for axis in self.axes)

    @property
    def initial(self) -> float | None:
        """The number that all its elements start with; None: each is drawn."""
        if self.start is not None or self.kind == "matrix":
            return self.start
        return 1.0 if self.kind == "norm" else 0.0

    def split_by(self, dimension: str) -> int | None:
        """The dim that a dimension of parallelism splits; None: it is whole."""
        return next((dim for dim, axis in enumerate(self.axes) if axis.split_by == dimension), None)


@dataclass(frozen=True)
class Kept:
    """Elements that a part keeps for backward, per token.

    Attributes:
        elements: of one token, before any split.
        axis: the axis that they lie along: one of the axes above; "stream": as the stream between blocks; "tokens":
            of the rank's own tokens of an MoE layer, which tp always splits along the sequence; others are whole.
        plain: without recomputation they are kept.
        selective: with selective recomputation they are kept; what a part's products give (`Part.products`) is anyway.
        width: bytes of each; None: as the type of the run.
    """

    elements: float
    axis: str
    plain: bool = True
    selective: bool = False
    width: int | None = None


def norm_start(kind: str) -> float | None:
    """What the factors of a norm start with, of a kind of `model.norm`; None: as norms do."""
    return 0.0 if kind == "rms_zero_centered" else None


def kept_by_norm(size: int, axis: str, split: bool, run: Any, kind: str = "rms") -> Iterator[Kept]:
    """What a norm of `size` features keeps: its input; on tensors `split` over tensor ranks, each step in float32.

    `kind`: that of `model.norm`; LayerNorm has a step less whose result is kept.
    """
    if not split:
        yield Kept(size, axis)
    elif run.train.dtype == "bfloat16":
        yield Kept((2 if kind == "layer" else 3) * size, axis, width=4)
    else:
        yield Kept(2 * size, axis)


@dataclass(frozen=True)
class Exchange:
    """A collective in a part's forward pass, over the ranks that share a micro-batch; it has no gradient.

    Attributes:
        kind: "all_reduce" or "all_gather".
        bytes: of an all-reduce's buffer, or gathered.
        losses: it belongs to a loss, which forward passes without gradients leave out.
        over_data: the data ranks, too, take part, in a second collective.
    """

    kind: Literal["all_reduce", "all_gather"]
    bytes: float
    losses: bool = False
    over_data: bool = False
