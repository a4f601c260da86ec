"""The base of all mixers: parts in which tokens of a sequence meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from moesys.config.registry import MIXERS, Described, used, users
from moesys.errors import Problem
from moesys.models.parts.axes import Axis, Kept
from moesys.models.parts.part import Part

if TYPE_CHECKING:
    from torch import nn

    from moesys.config.schema import ModelConfig

Style = Literal["heads", "summed", "own"]


@dataclass(frozen=True)
class Mixer(Part, Described):
    """A kind of mixer with its keys.

    Attributes:
        a: the section of its keys.
        model: what surrounds it: `hidden`, `norm_eps`.
        path: the section's dotted key, for messages.
        styles: by module, how tensor parallelism treats what cannot follow from the axes of its weights. "heads": it
            works on heads that are split (dim 2 of [B, S, h, d]); "summed": its output is whole and used by each rank's
            own heads, so that gradients are summed. "own": it has no input, and gives a number per head.
        remembers: whether `caches` lets it decode a sequence token by token; otherwise each token computes the whole
            sequence again.
    """

    a: Any
    model: ModelConfig
    path: str = "model.attention"
    styles: ClassVar[Mapping[str, Style]] = {}
    remembers: ClassVar[bool] = False
    decides_by_default: ClassVar[str] = "WEIGHTS"

    def unused(self) -> list[Problem]:
        """Keys of other kinds that are set."""
        problems, mine = [], used(MIXERS, self.kind)
        for key, info in type(self.a).model_fields.items():
            if key != "kind" and key not in mine and getattr(self.a, key) != info.default:
                rule = f"{self.kind} does not use it; {', '.join(users(MIXERS, key))} does"
                problems.append(Problem(f"{self.path}.{key}", rule, "remove it, or choose another kind"))
        return problems

    def meant(self) -> dict[str, Any]:
        """The values that null stands for, by key."""
        return {}

    @property
    def rotary_dim(self) -> int:
        """Size of the part of a head that carries rotary positions; 0: none."""
        return 0

    def megatron(self) -> list[Problem]:
        """All of it, unless a kind says what of it Megatron-Core has."""
        return [Problem(f"{self.path}.kind", f"mixer {self.kind} is not in engine: megatron", "set it to gqa")]

    def gathered(self) -> Iterator[Axis]:
        """What of each token context parallelism gathers: axes whose sizes are elements per token."""
        yield from ()

    def caches(self, module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
        """New modules that remember the tokens before, for decoding: (owner in the built `module`, attribute, new)."""
        yield from ()

    def head_sizes(self) -> tuple[int, int, int, int]:
        """Query heads, key heads, size of a query, size of a value, as attention computes them."""
        raise NotImplementedError


def seen(seq_len: int, window: int | None = None) -> float:
    """Keys that a query of a causal sequence sees, on average."""
    w = min(window or seq_len, seq_len)
    return w - w * w / (2 * seq_len)


def kept_by_attention(
    heads: int, keys: int, query: int, value: int, run: Any, cp: int = 1, window: int | None = None
) -> Iterator[Kept]:
    """What scaled-dot-product attention keeps: queries, keys, values and its result.

    Flash attention alone takes grouped heads: on CPU, and in float32, each query head gets its copy of a key. Over `cp`
    context ranks a rank has the keys of the sequence up to each of its two chunks, and joins the results of both. A
    window's keys are kept twice. The CPU has no fused kernel for two sizes of heads: scores are kept, in float32.

    Selective recomputation keeps the results of attention, scores included, and what context ranks gathered.
    """
    cpu, seq = run.cluster.device == "cpu", run.train.seq_len
    repeated = heads != keys and (cpu or run.train.dtype == "float32")
    windowed = window is not None and window < seq
    copies = 2.0 if windowed else cp + 0.5 if cp > 1 and repeated else float(cp)
    scored = cpu and query != value and not windowed
    width = 4 if scored else None
    yield Kept(heads * query, "heads", width=width)
    yield Kept(heads * value, "heads")
    yield Kept(heads * value, "heads", plain=False, selective=True, width=width)
    yield Kept(copies * (heads if repeated else keys) * (query + value), "heads", width=width)
    if scored:
        yield Kept(heads * seq * (1.0 if cp == 1 else 0.5 + 0.25 / cp), "heads", selective=True, width=4)
    else:
        yield Kept(heads, "heads", selective=True, width=4)  # log Σ exp of its scores
    if cp > 1:
        yield Kept(heads * value, "heads")
        yield Kept(cp * keys * (query + value), "kv_heads", plain=False, selective=True)
