"""Rules between the keys that stretch rotary positions, and the sizes that are turned; needs no torch."""

from __future__ import annotations

from typing import Any

from moesys.config.schema import ModelConfig
from moesys.errors import Problem

NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "original_seq_len"),
    "yarn": ("factor", "original_seq_len"),
    "longrope": ("original_seq_len", "short_factor", "long_factor"),
}
"""Keys that a kind cannot do without."""

USED = {
    "linear": NEEDED["linear"],
    "llama3": (*NEEDED["llama3"], "low_freq_factor", "high_freq_factor"),
    "yarn": (*NEEDED["yarn"], "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor"),
    "longrope": (*NEEDED["longrope"], "factor", "attention_factor", "short_mscale", "long_mscale"),
}
"""Keys that a kind uses."""

PATH = "model.rope_scaling"


def check(model: ModelConfig, sizes: set[int]) -> list[Problem]:
    """Every rule that `model.rope_scaling` breaks; `sizes`: elements of heads that are turned."""
    scaling = model.rope_scaling
    if scaling is None:
        return []
    problems, kind = [], scaling.kind
    for key, info in type(scaling).model_fields.items():
        value = getattr(scaling, key)
        if key != "kind" and key not in USED[kind] and value != info.default:
            users = ", ".join(k for k, used in USED.items() if key in used)
            problems.append(Problem(f"{PATH}.{key}", f"{kind} does not use it; {users} does", "remove it"))
        if key in NEEDED[kind] and value in (None, []):
            problems.append(Problem(f"{PATH}.{key}", f"is missing, and kind {kind} needs it", "set it"))
    return problems or _values(scaling, sizes)


def _values(scaling: Any, sizes: set[int]) -> list[Problem]:
    problems = []
    if scaling.kind == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        rule = f"must be below high_freq_factor({scaling.high_freq_factor:g})"
        problems.append(Problem(f"{PATH}.low_freq_factor", rule, "Llama 3.1 has 1 and 4"))
    if scaling.kind == "yarn" and scaling.beta_slow >= scaling.beta_fast:
        rule = f"must be below beta_fast({scaling.beta_fast:g})"
        problems.append(Problem(f"{PATH}.beta_slow", rule, "YaRN has 1 and 32"))
    if scaling.kind == "longrope":
        for key in ("short_factor", "long_factor"):
            for size in sorted(sizes):
                if len(getattr(scaling, key)) != size // 2:
                    rule = f"has {len(getattr(scaling, key))} numbers, and {size} elements of a head are turned"
                    problems.append(Problem(f"{PATH}.{key}", rule, f"give {size // 2}, one for each pair"))
        given = (scaling.attention_factor, scaling.factor)
        if not any(given) and None in (scaling.short_mscale, scaling.long_mscale):
            rule = "is missing, and cosines and sines need a factor"
            problems.append(Problem(f"{PATH}.factor", rule, "set it, or attention_factor"))
    return problems
