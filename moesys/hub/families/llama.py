"""Llama (Meta, arXiv 2302.13971, 2407.21783): a dense model."""

from __future__ import annotations

from moesys.hub.family import Family
from moesys.hub.keys import GROUPED, REQUIRED, Key

DENSE = (
    *GROUPED,
    Key("intermediate_size", "ffn_hidden", REQUIRED),
    Key("attention_bias", "attention.bias", False),
)
"""Keys of dense models."""


class Llama(Family):
    """A dense decoder with grouped-query attention."""

    kind = "llama"
    summary = "Llama, dense"
    architecture = "LlamaForCausalLM"
    released = ("Llama-3.1-8B", "Llama-3.2-1B")
    fields = DENSE
    only = {"hidden_act": "silu", "mlp_bias": False}
