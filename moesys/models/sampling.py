"""Choice of the next token by its logits: greedy, by temperature, among the most probable ones."""

from __future__ import annotations

import torch
from torch import Tensor


class Sampler:
    """Draws tokens, the same ones for the same seed and logits on every device.

    Args:
        temperature: divides the logits; 0 takes the most probable token, the first of equals.
        top_p: least probability of the tokens that are drawn from, the most probable ones first (nucleus sampling,
            arXiv 1904.09751); 1 draws from all.
        seed: of the drawn numbers.
        known: ids at or above it are never drawn: a padded vocabulary has entries that no tokenizer knows. None: all
            are known.
    """

    def __init__(self, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, known: int | None = None):
        self.temperature, self.top_p, self.known = temperature, top_p, known
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """The next token of each sequence, int64 [B], by logits [B, V]."""
        logits_BV = logits_BV[:, : self.known]
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        # In float64 on the CPU: a GPU's order of sums must not decide.
        chance_BV, token_BV = probabilities(logits_BV.double().cpu(), self.temperature, self.top_p)
        drawn_B1 = torch.rand(len(chance_BV), 1, generator=self._generator, dtype=torch.float64)
        end_BV = chance_BV.cumsum(-1)
        place_B1 = torch.searchsorted(end_BV, drawn_B1 * end_BV[:, -1:], right=True)
        place_B1 = place_B1.clamp(max=chance_BV.shape[1] - 1)
        return token_BV.gather(1, place_B1).squeeze(1).to(logits_BV.device)


def probabilities(logits_BV: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities, float as the logits [B, V], that sum to 1, and their tokens, int64 [B, V]; the largest first.

    Tokens that are not among the fewest most probable ones whose sum reaches `top_p` have 0; one always remains.
    """
    chance_BV, token_BV = (logits_BV / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before_BV = chance_BV.cumsum(-1) - chance_BV
    if top_p < 1:
        first = torch.arange(chance_BV.shape[1], device=chance_BV.device) == 0
        chance_BV = chance_BV * ((before_BV < top_p) | first)
    return chance_BV / chance_BV.sum(-1, keepdim=True), token_BV
