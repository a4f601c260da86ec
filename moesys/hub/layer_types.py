"""`layer_types` and `sliding_window` of config.json. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moesys.hub import blocks

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig
    from moesys.hub.derived import Derived

FULL, SLIDING = "full_attention", "sliding_attention"


def read(raw: Mapping[str, Any], found: Derived, window: int | None, absent: Sequence[str]) -> Sequence[int | None]:
    """The window of each block.

    Args:
        raw: config.json.
        found: keys that are read, and what cannot be followed.
        window: `sliding_window` where files lack it.
        absent: `layer_types` where files lack them; one per block.
    """
    found.read |= {"layer_types", "sliding_window"}
    window, kinds = raw.get("sliding_window", window), raw.get("layer_types") or absent
    unknown = sorted({kind for kind in kinds if kind not in (FULL, SLIDING)})
    if unknown or len(kinds) != len(absent):
        rule = f"has {', '.join(unknown)}" if unknown else f"names {len(kinds)} blocks of {len(absent)}"
        found.refuse("layer_types", f"{rule}; {FULL} and {SLIDING} are followed, for each block")
        return [None] * len(absent)
    return [(window or None) if kind == SLIDING else None for kind in kinds]


def write(model: ModelConfig, raw: dict[str, Any]) -> None:
    """Write the windows of a model."""
    windows = blocks.windows(model)
    raw["layer_types"] = [FULL if window is None else SLIDING for window in windows]
    raw["sliding_window"] = max((window for window in windows if window is not None), default=None)
