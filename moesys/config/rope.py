"""The section of the YAML that stretches rotary positions to longer sequences."""

from __future__ import annotations

from math import log
from typing import Literal

from moesys.config.section import Dim, NonNegativeFloat, PositiveFloat, Section


class RopeScalingConfig(Section):
    """Stretching of rotary positions beyond the sequences of a first training, with the meanings of `transformers`.

    Frequencies change for short sequences, too: a model that was trained with it needs it at every length.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    """linear: all frequencies divided by `factor`. llama3: those of long wavelengths (Llama 3.1). yarn: by a ramp over
    the frequencies (YaRN, arXiv 2309.00071). longrope: a divisor for each (LongRoPE, arXiv 2402.13753)."""
    factor: PositiveFloat | None = None
    """Ratio of the longer sequences to those of the first training; longrope: only for its default factor on cosines
    and sines."""
    original_seq_len: Dim | None = None
    """llama3, yarn, longrope: tokens per sequence of the first training (original_max_position_embeddings)."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: wavelengths above original_seq_len divided by this are stretched in full."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: wavelengths below original_seq_len divided by this stay as they are."""
    beta_fast: PositiveFloat = 32.0
    """yarn: frequencies that turn more often than this in original_seq_len stay as they are."""
    beta_slow: PositiveFloat = 1.0
    """yarn: frequencies that turn less often than this are stretched in full."""
    truncate: bool = True
    """yarn: the ramp begins and ends at whole numbers of frequencies; false in GPT-OSS."""
    mscale: NonNegativeFloat | None = None
    """yarn: s of the factor m(s) = 0.1 · s · ln(factor) + 1 on cosines and sines, divided by m(mscale_all_dim)."""
    mscale_all_dim: NonNegativeFloat | None = None
    """yarn: s of the same factor; its square is on the scores of latent attention (DeepSeek), unless these have
    a softmax_scale."""
    attention_factor: PositiveFloat | None = None
    """yarn, longrope: factor on cosines and sines; default: yarn m(mscale) / m(mscale_all_dim) where both are given,
    else m(1); longrope √(1 + ln(factor) / ln(original_seq_len))."""
    short_factor: list[PositiveFloat] = []
    """longrope: divisor of each frequency for sequences of at most original_seq_len tokens."""
    long_factor: list[PositiveFloat] = []
    """longrope: the same for longer ones."""
    short_mscale: PositiveFloat | None = None
    """longrope: factor on cosines and sines for short sequences; default: attention_factor (Phi-3.5-MoE)."""
    long_mscale: PositiveFloat | None = None
    """longrope: the same for longer ones."""

    def magnitude(self, s: float) -> float:
        """m(s) = 0.1 · s · ln(factor) + 1 of YaRN (arXiv 2309.00071, section 3.4)."""
        factor = self.factor or 1.0
        return 0.1 * s * log(factor) + 1.0 if factor > 1 else 1.0

    @property
    def yarn_factor(self) -> float:
        """yarn: the factor on cosines and sines."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)

    @property
    def score_factor(self) -> float:
        """yarn: the factor on the scores of latent attention."""
        return self.magnitude(self.mscale_all_dim) ** 2 if self.kind == "yarn" and self.mscale_all_dim else 1.0
