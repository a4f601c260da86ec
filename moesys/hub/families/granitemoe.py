"""Granite 3 with experts (IBM 2024)."""

from __future__ import annotations

from moesys.hub.granite import Granite


class GraniteMoe(Granite):
    """Softmax over the chosen experts; factors on embedding, scores, branches and logits."""

    kind = "granitemoe"
    summary = "Granite-MoE"
    architecture = "GraniteMoeForCausalLM"
    released = ("granite-3.0-1b-a400m", "granite-3.1-3b-a800m")
