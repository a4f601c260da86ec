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
<<<<<<< HEAD
    fields = DENSE
    only = {"hidden_act": "silu", "mlp_bias": False}
=======
    fields = (*GROUPED, Key("intermediate_size", "ffn_hidden", REQUIRED))
    only = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


class Mistral(Family):
    """The same with a sliding window."""

    kind = "mistral"
    summary = "Mistral, dense"
    architecture = "MistralForCausalLM"
    released = ("Mistral-7B",)
    fields = (*Llama.fields, Key("sliding_window", "attention.window", nullable=True))


class Qwen3(Family):
    """The same with a norm of each head's query and key."""

    kind = "qwen3"
    summary = "Qwen3, dense"
    architecture = "Qwen3ForCausalLM"
    released = ("Qwen3-0.6B", "Qwen3-8B")
    fields = Llama.fields
    always = {"attention.qk_norm": "head"}
    only = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
    ignored = frozenset({"sliding_window", "layer_types"})
>>>>>>> main
