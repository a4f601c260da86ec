"""Rotary positions in config.json: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig
    from moesys.hub.family import Derived

KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_seq_len",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_seq_len",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "attention_factor": "attention_factor",
    },
    "longrope": {
        "factor": "factor",
        "original_max_position_embeddings": "original_seq_len",
        "short_factor": "short_factor",
        "long_factor": "long_factor",
        "short_mscale": "short_mscale",
        "long_mscale": "long_mscale",
        "attention_factor": "attention_factor",
    },
}
"""By kind of scaling, their keys and ours in `model.rope_scaling`."""
OLD = ("rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings")


def read(raw: Mapping[str, Any], found: Derived) -> None:
    """Put `rope_theta`, `rope_scaling` and the rotary share of heads into `found`."""
    found.read.update(("rope_parameters", *OLD))
    given = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    theta = given.pop("rope_theta", None) or raw.get("rope_theta")
    if theta is not None:
        found.values["rope_theta"] = float(theta)
    share = given.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor")
    if share is not None and share != 1:
        found.values["attention.rotary_fraction"] = float(share)
    new, old = given.pop("rope_type", None), given.pop("type", None)
    kind = new or old or "default"
    if kind == "default":
        return
    if kind not in KEYS:
        found.refuse("rope_scaling", f"is of the kind {kind!r}; {', '.join(KEYS)} are followed")
        return
    scaling: dict[str, Any] = {"kind": kind}
    given.setdefault("original_max_position_embeddings", raw.get("original_max_position_embeddings"))
    if given["original_max_position_embeddings"] is None:
        given["original_max_position_embeddings"] = raw.get("max_position_embeddings")
    if given.get("factor") is None and "factor" in KEYS[kind] and raw.get("max_position_embeddings"):
        given["factor"] = raw["max_position_embeddings"] / given["original_max_position_embeddings"]
    for theirs, value in given.items():
        ours = KEYS[kind].get(theirs)
        if ours is not None and value is not None:
            scaling[ours] = (
                value if ours in ("original_seq_len", "truncate") or isinstance(value, list) else float(value)
            )
        elif value is not None and theirs != "original_max_position_embeddings":
            found.refuse(f"rope_scaling.{theirs}", f"is not known to the kind {kind}, and may change numbers")
    found.values["rope_scaling"] = scaling


def write(model: ModelConfig, raw: dict[str, Any]) -> None:
    """Write rotary positions by the new keys and the old."""
    theta, scaling = model.rope_theta, getattr(model, "rope_scaling", None)
    share = getattr(model.attention, "rotary_fraction", 1.0)
    new: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        ours = scaling.model_dump(mode="json")
        kept = {theirs: ours[key] for theirs, key in KEYS[scaling.kind].items() if ours.get(key) is not None}
        new = {"rope_type": scaling.kind, **kept}
        raw["rope_scaling"] = {"type": scaling.kind, "rope_type": scaling.kind, **kept}
    if share != 1:
        new["partial_rotary_factor"] = raw["partial_rotary_factor"] = share
    raw["rope_theta"] = theta
    raw["rope_parameters"] = {"rope_theta": theta, **new}
