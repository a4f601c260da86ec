"""Frequencies of rotary positions, plain or stretched to longer sequences, with the meanings of `transformers`.

d elements of a head are turned, as d / 2 pairs.
"""

from __future__ import annotations

from math import ceil, floor, log, pi, sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moesys.kernels.rotary import tables

if TYPE_CHECKING:
    from moesys.config.rope import RopeScalingConfig


def rotary_angles(
    positions: Tensor, size: int, theta: float, scaling: RopeScalingConfig | None = None, length: int = 0
) -> tuple[Tensor, Tensor]:
    """Tables [S, size], float32, that `rotate` takes, of rotary positions (RoFormer, arXiv 2104.09864).

    Args:
        positions: of the tokens, int64 [S].
        size: d.
        theta: base of the wavelengths.
        scaling: how they are stretched; None: not.
        length: tokens of a whole sequence, for "longrope".
    """
    exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
    frequencies, factor = theta**-exponents, 1.0
    if scaling is not None:
        frequencies, factor = stretched(frequencies, theta, scaling, length)
    cos, sin = tables(positions.float()[:, None] * frequencies)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def stretched(frequency_r: Tensor, theta: float, scaling: RopeScalingConfig, length: int = 0) -> tuple[Tensor, float]:
    """The frequencies [d / 2] after scaling, and the factor on cosines and sines."""
    if scaling.kind == "longrope":
        return _longrope(frequency_r, scaling, length)
    assert scaling.factor is not None
    if scaling.kind == "linear":
        return frequency_r / scaling.factor, 1.0
    assert scaling.original_seq_len is not None
    if scaling.kind == "llama3":
        return _llama3(frequency_r, scaling.factor, scaling.original_seq_len, scaling), 1.0
    kept_r = 1 - _ramp(len(frequency_r), theta, scaling.original_seq_len, scaling).to(frequency_r)
    return frequency_r / scaling.factor * (1 - kept_r) + frequency_r * kept_r, scaling.yarn_factor


def _llama3(frequency_r: Tensor, factor: float, original: int, scaling: RopeScalingConfig) -> Tensor:
    """Long wavelengths stretched, short ones kept, a mixture between."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns_r = original * frequency_r / (2 * pi)
    smooth_r = ((turns_r - low) / (high - low)).clamp(0, 1)
    return (1 - smooth_r) * frequency_r / factor + smooth_r * frequency_r


def _ramp(pairs: int, theta: float, original: int, scaling: RopeScalingConfig) -> Tensor:
    """Share of the stretching of each pair, from 0 for those that turn often to 1 (YaRN)."""

    def pair(turns: float) -> float:
        """The pair, not rounded, that turns so often in the original sequence."""
        return pairs * log(original / (turns * 2 * pi)) / log(theta)

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = floor(first), ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    width = last - first or 0.001
    return ((torch.arange(pairs, dtype=torch.float32) - first) / width).clamp(0, 1)


def _longrope(frequency_r: Tensor, scaling: RopeScalingConfig, length: int) -> tuple[Tensor, float]:
    original = scaling.original_seq_len or 1
    long = length > original
    divisor_r = torch.tensor(scaling.long_factor if long else scaling.short_factor, device=frequency_r.device)
    factor = (scaling.long_mscale if long else scaling.short_mscale) or scaling.attention_factor
    if factor is None:
        ratio = scaling.factor or 1.0
        factor = sqrt(1 + log(ratio) / log(original)) if ratio > 1 else 1.0
    return frequency_r / divisor_r, factor
