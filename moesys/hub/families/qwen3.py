"""Qwen3, dense (Qwen 2025, arXiv 2505.09388)."""

from __future__ import annotations

from moesys.hub.families.llama import DENSE
from moesys.hub.keys import with_defaults
from moesys.hub.qwen import Qwen


class Qwen3(Qwen):
    """A dense decoder with a norm of each head's query and key."""

    kind = "qwen3"
    summary = "Qwen3, dense"
    architecture = "Qwen3ForCausalLM"
    released = ("Qwen3-0.6B", "Qwen3-8B")
    fields = with_defaults(DENSE, num_key_value_heads=32, head_dim=128)
    always = {"attention.qk_norm": "head"}
