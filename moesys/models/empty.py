"""A model without values, into which weights are read: no number is drawn, and no weight is held twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moesys.models.decoder import Decoder
from moesys.moe.layer import moe_layers

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


def empty(
    config: ModelConfig,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    narrow: bool = False,
) -> Decoder:
    """The model on `device` (default: the CPU), its weights uninitialised, its gates' buffers as they begin.

    Args:
        dtype: of the stream between blocks.
        narrow: hold matrices that meet the stream in its type, as they are cast in every pass otherwise: the numbers
            are the same, for evaluation. Norms, and the weights of gates and mixes, stay float32.
    """
    with torch.device("meta"):
        model = Decoder(config, vocab_size, dtype)
    for name, parameter in model.named_parameters():
        weight = model.described[name]
        if narrow and weight.kind == "matrix" and not weight.router:
            parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device or torch.device("cpu"))
    if config.tie_embeddings and model.head is not None and model.embed is not None:
        model.head.weight = model.embed.weight
    for layer in moe_layers(model).values():
        layer.gate.reset_state()
    return model.eval()
