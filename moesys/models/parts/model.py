"""A whole model as a list of parts, each with its prefix and its block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesys.config.registry import MIXERS, kinds
from moesys.models.parts.axes import Axis, Kept, Weight, kept_by_norm, norm_start
from moesys.models.parts.feed_forward import DenseFeedForward
from moesys.models.parts.mixer import Mixer
from moesys.models.parts.moe import MoEFeedForward
from moesys.models.parts.part import Part

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


@dataclass(frozen=True)
class Norm(Part):
    """Norm of the stream: RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450).

    Attributes:
        hidden: size of the stream.
        kind: that of `model.norm`.
    """

    hidden: int
    kind: str

    def weights(self) -> Iterator[Weight]:
        """A factor per feature, of LayerNorm also a bias."""
        yield from norm_weights("", self.hidden, self.kind)

    def kept(self, run: Any, shape: Any) -> Iterator[Kept]:
        """Its input."""
        yield from kept_by_norm(self.hidden, "stream", shape.degrees.tp > 1 and run.parallel.sp, run, self.kind)

    def results(self, shape: Any) -> Iterator[Kept]:
        """Its output."""
        yield Kept(self.hidden, "stream")


def norm_weights(prefix: str, hidden: int, kind: str) -> Iterator[Weight]:
    """The weights of a norm of the stream of a kind of `model.norm`."""
    axes = (Axis("hidden", hidden),)
    yield Weight(f"{prefix}weight", axes, "norm", start=norm_start(kind), on_stream=True)
    if kind == "layer":
        yield Weight(f"{prefix}bias", axes, "bias", on_stream=True)


@dataclass(frozen=True)
class Embedding(Part):
    """The embedding of tokens; it is the head, too, where these are tied."""

    vocab: int
    hidden: int
    tied: bool = False
    reads = False

    def weights(self) -> Iterator[Weight]:
        """A row per entry."""
        axes = (Axis("vocab", self.vocab, key="model.vocab_size"), Axis("hidden", self.hidden))
        yield Weight("weight", axes, looked_up=True, makes_logits=self.tied)


@dataclass(frozen=True)
class Head(Part):
    """The output head."""

    vocab: int
    hidden: int
    outputs: int = 1
    bias: bool = False
    writes = False

    def weights(self) -> Iterator[Weight]:
        """A row per entry, and a bias for each."""
        vocab = Axis("vocab", self.vocab, key="model.vocab_size")
        yield Weight("weight", (vocab, Axis("hidden", self.hidden)), makes_logits=True)
        if self.bias:
            yield Weight("bias", (vocab,), "bias", makes_logits=True)

    def multiply_adds(self, weight: Weight, seq_len: int) -> float:
        """One per output: of the next token, and of each that is predicted after it."""
        return float(self.outputs)


@dataclass(frozen=True)
class TiedHead(Part):
    """The output head that has the embedding's weight."""

    vocab: int
    hidden: int
    outputs: int = 1
    bias: bool = False
    writes = False

    def weights(self) -> Iterator[Weight]:
        """None of its own but a bias."""
        if self.bias:
            yield Weight("bias", (Axis("vocab", self.vocab, key="model.vocab_size"),), "bias", makes_logits=True)

    def flops(self, seq_len: int) -> float:
        """A product with the embedding's weight."""
        return 2.0 * self.hidden * self.vocab * self.outputs


@dataclass(frozen=True)
class PredictionInput(Part):
    """What a block of multi-token prediction reads: the output before it, and the embedding of a later token.

    `project(concat(embed_norm(embedding), hidden_norm(output)))` (DeepSeek-V3, arXiv 2412.19437, section 2.2). It works
    on the stream as it lies between blocks; tensor ranks hold its weights whole.
    """

    hidden: int
    norm: str

    def weights(self) -> Iterator[Weight]:
        """Two norms and a matrix, whose first half is multiplied with the embedding."""
        hidden = Axis("hidden", self.hidden)
        yield from norm_weights("embed_norm.", self.hidden, self.norm)
        yield from norm_weights("hidden_norm.", self.hidden, self.norm)
        yield Weight("project.weight", (hidden, Axis("both", 2 * self.hidden)), on_stream=True)

    def kept(self, run: Any, shape: Any) -> Iterator[Kept]:
        """The inputs of the norms, and both norms' outputs side by side."""
        split = shape.degrees.tp > 1 and run.parallel.sp
        for _ in range(2):
            yield from kept_by_norm(self.hidden, "stream", split, run, self.norm)
        yield Kept(2 * self.hidden, "stream")

    def products(self) -> Iterator[Kept]:
        """The stream that enters the block."""
        yield Kept(self.hidden, "stream", plain=False, selective=True)

    def results(self, shape: Any) -> Iterator[Kept]:
        """Those of the norms, too."""
        yield Kept(3 * self.hidden, "stream")


@dataclass(frozen=True)
class BlockParts:
    """The two parts of a block that its norms stand before."""

    mixer: Mixer
    ffn: DenseFeedForward | MoEFeedForward


@dataclass(frozen=True)
class Placed:
    """A part of a model with its place: `prefix` of its weights' names, number of its block (None: of none).

    `repeated`: recomputation repeats it.
    """

    part: Part
    prefix: str
    layer: int | None = None
    repeated: bool = True

    def weights(self) -> Iterator[Weight]:
        """Its weights by their full names."""
        return (weight.within(self.prefix, self.layer) for weight in self.part.weights())


def block(model: ModelConfig, layer: int) -> BlockParts:
    """The parts of block `layer`, from 0."""
    section, path = model.mixer(layer)
    mixer = kinds(MIXERS)[section.kind](section, model, path)
    if model.moe is not None and model.is_moe(layer):
        return BlockParts(mixer, MoEFeedForward(model.moe, model.hidden, layer))
    return BlockParts(mixer, DenseFeedForward(model.hidden, model.ffn_hidden or 0))


def mixers(model: ModelConfig) -> list[Mixer]:
    """The different mixers of a model, in the order of the blocks that first use them."""
    found: dict[str, Mixer] = {}
    for layer in range(model.depth):
        mixer = block(model, layer).mixer
        found.setdefault(mixer.path, mixer)
    return list(found.values())


def parts(model: ModelConfig, vocab_size: int) -> Iterator[Placed]:
    """Every part of a model in the order of `moesys.models.Decoder`."""
    yield Placed(Embedding(vocab_size, model.hidden, model.tie_embeddings), "embed.")
    for layer in range(model.blocks):
        both, prefix, predicts = block(model, layer), f"layers.{layer}.", layer >= model.depth
        if predicts:
            yield Placed(PredictionInput(model.hidden, model.norm), prefix, layer)
        yield Placed(Norm(model.hidden, model.norm), f"{prefix}attention_norm.", layer)
        yield Placed(both.mixer, f"{prefix}attention.", layer)
        yield Placed(Norm(model.hidden, model.norm), f"{prefix}ffn_norm.", layer)
        yield Placed(both.ffn, f"{prefix}ffn.", layer)
        if predicts:
            yield Placed(Norm(model.hidden, model.norm), f"{prefix}norm.", layer, repeated=False)
    yield Placed(Norm(model.hidden, model.norm), "norm.")
    head = TiedHead if model.tie_embeddings else Head
    yield Placed(head(vocab_size, model.hidden, 1 + model.predicted, model.head_bias), "head.")
