"""Other systems' MoE layers beside ours: what a benchmark asks of them, and where it finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from moesys import comparisons
from moesys.measure.layer_benchmark.layer_times import LayerShape
from moesys.moe import MoELayer

Layers = dict[str, nn.Module]
"""By name; each [1, T, H] → same."""


@dataclass(frozen=True)
class OtherSystems:
    """Other systems' layers with the weights of ours. Its functions are importable by name.

    Attributes:
        on_one_device: (our layer, shape) → theirs.
        over_ranks: (our layer, whose experts are this rank's, shape, type) → theirs, in a context in which they work.
            Collective over the world.
        missing: what is not compared, and why; "" if nothing is missing.
    """

    on_one_device: Callable[[MoELayer, LayerShape], Layers]
    over_ranks: Callable[[MoELayer, LayerShape, torch.dtype], AbstractContextManager[Layers]]
    missing: str = ""


def _none(layer: MoELayer, shape: LayerShape) -> Layers:
    return {}


@contextmanager
def _none_over_ranks(layer: MoELayer, shape: LayerShape, dtype: torch.dtype) -> Iterator[Layers]:
    yield {}


NONE = OtherSystems(_none, _none_over_ranks, "other systems' layers are compared in a checkout of the repository alone")


def found() -> OtherSystems:
    """Those of the repository's benchmarks; `NONE` where they are not here."""
    module = comparisons.found("layer")
    return NONE if module is None else module.other_systems()
