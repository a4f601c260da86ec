"""Shapes and results of the benchmark of one MoE layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import date


@dataclass(frozen=True)
class LayerShape:
    """T tokens of size H, E experts of inner size F, k experts per token."""

    tokens: int
    hidden: int
    ffn_hidden: int
    experts: int
    top_k: int

    @property
    def flops(self) -> int:
        """Operations of the experts' products, forward and backward."""
        return 18 * self.tokens * self.top_k * self.hidden * self.ffn_hidden

    def kept_bytes(self, size: int) -> int:
        """Bytes that backward needs: tokens and first products of `size` bytes per element, and routing."""
        products = 2 * self.tokens * self.top_k * self.ffn_hidden
        routing = self.tokens * (4 * self.experts + self.top_k * (4 + 8 + 8))
        return size * (self.tokens * self.hidden + products) + routing


SHAPES = {
    "laptop": LayerShape(4096, 512, 1024, 16, 2),
    "two-ranks": LayerShape(1024, 256, 512, 8, 2),
    "mixtral-8x7b": LayerShape(8192, 4096, 14336, 8, 2),
    "qwen3-30b-a3b": LayerShape(32768, 2048, 768, 128, 8),
    "deepseek-v3": LayerShape(8192, 7168, 2048, 256, 8),
}

TARGETS = {"layer / dense": 1.10, "layer / transformers grouped_mm": 0.95, "peak / kept memory": 1.3}
"""The project's limits at the laptop's shape on two cores."""

PUBLISHED = tuple(SHAPES[name] for name in ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"))

LEAST_SHARE = 0.85
"""The least share of a dense product's rate that the layer should reach on a GPU at the published shapes."""


@dataclass(frozen=True)
class LayerTimes:
    """Median milliseconds of every side, medians of the rounds' ratios, and memory.

    Attributes:
        on_gpu: whether the device is a GPU.
        left_out: sides for which the device has too little memory.
    """

    shape: LayerShape
    dtype: str
    milliseconds: dict[str, float]
    ratios: dict[str, float]
    teraflops: dict[str, float]
    peak_bytes: int
    kept_bytes: int
    rounds: int
    device: str
    on_gpu: bool = False
    left_out: tuple[str, ...] = ()
    date: str = field(default_factory=lambda: date.today().isoformat())

    def as_json(self) -> dict[str, object]:
        """All figures."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The result as text."""
        s = self.shape
        title = f"T={s.tokens} H={s.hidden} F={s.ffn_hidden} E={s.experts} k={s.top_k}, {self.dtype}"
        lines = [f"{title}, forward and backward, medians of {self.rounds} interleaved rounds"]
        lines += [f"  {name:<26} {ms:>9.2f} ms" for name, ms in self.milliseconds.items()]
        lines += [f"  {name:<26} left out: the device has too little memory for it" for name in self.left_out]
        for name, value in self.ratios.items():
            target = TARGETS.get(name) if s == SHAPES["laptop"] else None
            said = "" if target is None else f"  target {target:.2f}: {'met' if value <= target else 'MISSED'}"
            lines.append(f"  {name:<32} {value:>6.2f}{said}")
        flops = ", ".join(f"{name} {value:.3g}" for name, value in self.teraflops.items())
        lines.append(f"  TFLOP/s: {flops}; the layer has {self.share:.0%} of the dense product's rate{self._said()}")
        lines.append(f"  memory: {self.peak_bytes / 1e6:.1f} MB at most, {self.kept_bytes / 1e6:.1f} MB must be kept")
        return lines

    @property
    def share(self) -> float:
        """The layer's rate / a dense product's rate."""
        return self.teraflops["layer"] / self.teraflops["product"]

    def _said(self) -> str:
        """A verdict on the share, for GPUs and published shapes."""
        if not self.on_gpu or self.shape not in PUBLISHED:
            return ""
        return f"  target {LEAST_SHARE:.0%}: {'met' if self.share >= LEAST_SHARE else 'MISSED'}"
