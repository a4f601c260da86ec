"""Rotary positions in config.json: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig
    from moesys.hub.derived import Derived

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
OLD = ("rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings", "rotary_dim")
WHOLE = frozenset({"original_seq_len", "truncate", "short_factor", "long_factor"})
"""Keys of `model.rope_scaling` that are no single floating-point numbers."""


@dataclass(frozen=True)
class Rotary:
    """What a family's files say of rotary positions.

    Attributes:
        theta: the base where files have none.
        share: the share of each head that is turned where files say none; None: always the whole head.
        scaling: `rope_parameters` of files that have neither these nor `rope_scaling`.
    """

    theta: float = 10000.0
    share: float | None = None
    scaling: Mapping[str, Any] = field(default_factory=dict)

    def read(self, raw: Mapping[str, Any], found: Derived) -> None:
        """Put the base, the scaling and the share of heads into `found`."""
        found.read.update(("rope_parameters", *OLD))
        given = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {}) or dict(self.scaling)
        if any(isinstance(value, Mapping) for value in given.values()):
            found.refuse(
                "rope_parameters", "differs between kinds of layers, and rotary positions are the model's here"
            )
            return
        found.values["rope_theta"] = float(given.pop("rope_theta", None) or raw.get("rope_theta") or self.theta)
        self._share(given.pop("partial_rotary_factor", None), raw, found)
        new, old = given.pop("rope_type", None), given.pop("type", None)
        kind = new or old or "default"
        if kind in KEYS:
            found.values["rope_scaling"] = _scaling(kind, given, raw, found)
        elif kind != "default":
            found.refuse("rope_scaling", f"is of the kind {kind!r}; {', '.join(KEYS)} are followed")

    def _share(self, given: float | None, raw: Mapping[str, Any], found: Derived) -> None:
        share = given or raw.get("partial_rotary_factor")
        if share is None and raw.get("rotary_dim"):
            head = found.values.get("attention.head_dim")
            head = head or found.values["hidden"] // found.values["attention.heads"]
            share = raw["rotary_dim"] / head
        share = share or self.share or 1.0
        if share != 1 and self.share is None:
            rule = f"is {share:g}, and models of this family turn whole heads whatever it says"
            found.refuse("partial_rotary_factor", rule, "remove it from config.json")
        elif share != 1:
            found.values["attention.rotary_fraction"] = float(share)

    def write(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """Write rotary positions by the new keys and the old."""
        theta, scaling = model.rope_theta, model.rope_scaling
        new: dict[str, Any] = {"rope_type": "default"}
        if scaling is not None:
            ours = scaling.model_dump(mode="json")
            kept = {theirs: ours[key] for theirs, key in KEYS[scaling.kind].items() if ours.get(key) is not None}
            new = {"rope_type": scaling.kind, **kept}
            raw["rope_scaling"] = {"type": scaling.kind, **new}
            if scaling.factor is not None and scaling.original_seq_len is not None:
                raw["max_position_embeddings"] = round(scaling.factor * scaling.original_seq_len)
        if self.share is not None:
            mixer = model.mixer(0)[0]
            new["partial_rotary_factor"] = raw["partial_rotary_factor"] = mixer.rotary_fraction
            raw["rotary_dim"] = int((mixer.head_dim or model.hidden // mixer.heads) * mixer.rotary_fraction)
        raw["rope_theta"] = theta
        raw["rope_parameters"] = {"rope_theta": theta, **new}


def _scaling(kind: str, given: dict[str, Any], raw: Mapping[str, Any], found: Derived) -> dict[str, Any]:
    """`model.rope_scaling` of a kind; adds a problem for each key that it does not know."""
    longest, original = raw.get("max_position_embeddings"), "original_max_position_embeddings"
    if original in KEYS[kind]:
        given[original] = raw.get(original) or given.get(original) or longest
    if given.get("factor") is None and kind in ("yarn", "longrope") and longest and given.get(original):
        given["factor"] = longest / given[original]
    scaling: dict[str, Any] = {"kind": kind}
    for theirs, value in given.items():
        ours = KEYS[kind].get(theirs)
        if ours is not None and value is not None:
            scaling[ours] = value if ours in WHOLE else float(value)
        elif value is not None and theirs != original:
            found.refuse(f"rope_scaling.{theirs}", f"is not known to the kind {kind}, and may change numbers")
    return scaling
