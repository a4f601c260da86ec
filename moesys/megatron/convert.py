"""Weights of whole models, between this project's `Decoder` and Megatron-Core's `GPTModel`.

The MoE layer may be the plug-in's, or Megatron's own with sequential or grouped experts. A `GPTModel` may be split over
tensor and expert ranks; a `chunk` may be a pipeline stage of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from moesys.config.schema import ModelConfig
from moesys.megatron.names import ParameterNames, Part, gathered, place_of
from moesys.megatron.scope import ProcessGroups


@torch.no_grad()
def to_gpt(chunk: nn.Module, weights: Mapping[str, Tensor], model: ModelConfig) -> None:
    """Fill this rank's part of a `GPTModel` with `weights`, the state of a `Decoder` of `model`.

    Raises:
        KeyError: a weight of the `GPTModel` that `weights` lacks, or that no `Decoder` has.
    """
    for piece, part in _parts(chunk, len(weights["embed.weight"]), model):
        part.copy_(weights[piece.name][piece.index])


def from_gpt(chunk: nn.Module, vocab_size: int, model: ModelConfig) -> dict[str, Tensor]:
    """The whole weights of this pipeline stage, as in the state of a `Decoder` of `model`. Collective over the stage.

    Raises:
        KeyError: a weight that no `Decoder` has.
    """
    return gathered(_parts(chunk, vocab_size, model), ProcessGroups.of())


def _parts(chunk: nn.Module, vocab_size: int, model: ModelConfig) -> Iterator[Part]:
    names = ParameterNames(model, vocab_size, place_of(ProcessGroups.of()))
    for parameter, pieces in (*names.pieces(chunk), *names.kept(chunk)):
        for piece in pieces:
            yield piece, piece.view(parameter.detach())
