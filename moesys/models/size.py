"""Parameters and FLOPs of a model without building it, from its parts' descriptions; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from moesys.models.parts.axes import Weight
from moesys.models.parts.model import parts

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


def weights(model: ModelConfig, vocab_size: int) -> Iterator[Weight]:
    """Every parameter, in the order and by the names of `moesys.models.Decoder`; tied ones once."""
    for placed in parts(model, vocab_size):
        yield from placed.weights()


def by_name(model: ModelConfig, vocab_size: int) -> dict[str, Weight]:
    """Every parameter by its name."""
    return {weight.name: weight for weight in weights(model, vocab_size)}


def frozen(weight: Weight, patterns: Sequence[str]) -> bool:
    """Whether a parameter is not trained, with `patterns` of `train.freeze`."""
    return weight.frozen or any(fnmatchcase(weight.name, pattern) for pattern in patterns)


def active_parameters(model: ModelConfig, vocab_size: int) -> Iterator[tuple[Weight, float]]:
    """Every parameter with its elements that one token uses: of routed experts those that the gate chooses."""
    for placed in parts(model, vocab_size):
        for own, weight in zip(placed.part.weights(), placed.weights(), strict=True):
            yield weight, weight.numel * placed.part.active(own)


def parameters(model: ModelConfig, vocab_size: int) -> tuple[int, int]:
    """(total, active): all parameters, and those that one token uses, embeddings included in both."""
    every = list(active_parameters(model, vocab_size))
    return sum(weight.numel for weight, _ in every), round(sum(active for _, active in every))


def prediction_parameters(model: ModelConfig, vocab_size: int) -> tuple[int, int]:
    """(total, active) of `parameters` that multi-token prediction adds, for training alone."""
    without = parameters(model.model_copy(update={"mtp": None}), vocab_size)
    total, active = parameters(model, vocab_size)
    return total - without[0], active - without[1]


def flops_per_token(model: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, float]:
    """FLOPs of one token's forward pass, by place: "embed", "layers.0", …, "head".

    Two per multiply-add of every active matrix; causal attention over the keys that a query sees on average. The layers
    of multi-token prediction are among them, and the head makes the logits of each depth. Backward costs twice as much
    again.
    """
    flops = {"embed": 0.0}
    for placed in parts(model, vocab_size):
        place = f"layers.{placed.layer}" if placed.layer is not None else placed.prefix.removesuffix(".")
        place = "head" if place == "norm" else place
        sums = (
            2 * w.numel * placed.part.multiply_adds(w, seq_len) for w in placed.part.weights() if w.kind == "matrix"
        )
        flops[place] = flops.get(place, 0.0) + sum(sums) + placed.part.flops(seq_len)
    return flops
