"""Which blocks of a released model have a sliding window, and which are MoE: our keys for it, and back. Needs no torch.

arranged([128, None, 128, None], [True] * 4)
# {"layers.count": 4, "layers.repeat": ["local moe", "attention moe"], "mixers.local.window": 128}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig

LOCAL = "local"
"""Word in a pattern for attention with a window, where other blocks have another window or none."""


def arranged(windows: Sequence[int | None], moe: Sequence[bool]) -> dict[str, Any]:
    """Our keys, dotted, for blocks with these windows (None: the whole sequence); `moe`: whether each is MoE.

    A number of layers where one mixer and `moe.first_dense` and `moe.every` say it all; else the shortest pattern.
    """
    depth, different = len(moe), sorted(set(windows), key=lambda window: (window is not None, window))
    rule = moe_rule(moe)
    values: dict[str, Any] = {} if different[0] is None else {"attention.window": different[0]}
    if len(different) == 1 and rule is not None:
        return {"layers": depth, **values, **rule}
    words = {different[0]: "attention", **{w: LOCAL if len(different) == 2 else f"{LOCAL}{w}" for w in different[1:]}}
    first, repeat = pattern([f"{words[w]} {'moe' if m else 'dense'}" for w, m in zip(windows, moe, strict=True)])
    values |= {"layers.count": depth, **({"layers.first": first} if first else {}), "layers.repeat": repeat}
    return values | {f"mixers.{words[window]}.window": window for window in different[1:]}


def moe_rule(moe: Sequence[bool]) -> dict[str, int] | None:
    """`moe.first_dense` and `moe.every`, those that are not their defaults; None: no such rule holds."""
    if True not in moe:
        return {}
    start = moe.index(True)
    for every in range(1, start + 2):
        first = start - every + 1
        if all(is_moe == (i >= first and (i - first + 1) % every == 0) for i, is_moe in enumerate(moe)):
            found = {"moe.first_dense": (first, 0), "moe.every": (every, 1)}
            return {key: value for key, (value, default) in found.items() if value != default}
    return None


def pattern(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The shortest `first` and `repeat` that give `words`; of these the shortest `repeat`."""
    depth = len(words)
    for total in range(1, depth + 1):
        for period in range(1, total + 1):
            if all(words[i] == words[i - period] for i in range(total, depth)):
                return list(words[: total - period]), list(words[total - period : total])
    return [], list(words)


def windows(model: ModelConfig) -> list[int | None]:
    """The window of each block; None: it sees the whole sequence, or is no attention with windows."""
    return [model.mixer(layer)[0].window for layer in range(model.depth)]
