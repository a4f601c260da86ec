"""The meaning of each key's change to a run that goes on from its checkpoint.

saved = saved_form(config)               # what a checkpoint keeps
differences(saved, saved_form(other))    # [Change("train.optimizer.lr", 0.003, 0.5)]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from moesys.config.legal import annotation, section_of
from moesys.config.registry import DISPATCHERS, GATES, MIXERS, Slot, kinds
from moesys.config.schema import Config, Section

SECRET = ("launch.env",)
"""Keys that config.yaml alone keeps, and without what `moesys.config.secret` knows to be secret: more may be."""


class Kind(Enum):
    """Kinds of keys: what hangs on one, and what follows when it changes between a checkpoint and its resumption."""

    WEIGHTS = "decides the weights"
    """Their shapes, or what they mean: it cannot change."""
    MEANT = "changes what the run is"
    """The model computes something else, or sees other samples: it may change where `train.resume_changed` names it."""
    CONTENT = "says where the data lie"
    """It may change, and is told; what lies there is compared by content."""
    TRAINING = "decides the steps to come"
    """It may change, and is told."""
    RUNNING = "decides how it is computed"
    """The numbers of training hang on it to rounding only, or not at all: it may change, and is told."""
    FREE = "decides no number"
    """It may change, and nothing is said."""


_WORDS = {
    Kind.WEIGHTS: """
        model.vocab_size model.hidden model.layers model.ffn_hidden model.tie_embeddings
        model.mixers
        model.layers: count first repeat
        model.moe: experts ffn_hidden bias every first_dense zero_experts copy_experts constant_experts lora_rank
            shared_experts shared_ffn_hidden shared_mix
        """,
    Kind.MEANT: """
        seed train.seq_len data.heldout
        model: norm_eps rope_theta
        model.moe: top_k activation normalize scale lora_alpha zero_variant
        """,
    Kind.CONTENT: """
        data: kind path text_key split tokenizer
        """,
    Kind.TRAINING: """
        model.init_std
        model.moe: capacity_factor eval_capacity_factor min_capacity drop pad_to_capacity balance_loss
            sequence_balance_loss global_balance_loss balance_counts z_loss importance_loss load_loss bias_rate zero_tau
            cmr_budget cmr_loss
        parallel.dispatch.payload
        train: steps global_batch micro_batch dtype freeze
        train.skips: consecutive total
        train.optimizer: kind lr betas eps weight_decay clip
        train.schedule: kind warmup decay min_ratio
        """,
    Kind.RUNNING: """
        engine
        parallel: dp dp_shard sync_gradients tp sp pp pp_schedule pp_virtual pp_split cp ep etp
        parallel.dispatch: chunks overlap_shared
        train: recompute compile deterministic eval_sequences
        cluster: nodes ranks_per_node device
        """,
    Kind.FREE: """
        name
        train: eval_every resume_changed
        data.cache cluster.memory_gib
        launch: launcher link_gbit ray_address timeout_s max_failures threads env slurm
        output: runs checkpoint_every keep tensorboard wandb log_every record_routing
        measure: every steps audit profile metrics_port metrics_host
        """,
}
"""The keys of each kind; names without a dot that follow "section:" are of that section."""


def _table(words: Mapping[Kind, str]) -> Iterator[tuple[str, Kind]]:
    for kind, text in words.items():
        section = ""
        for word in text.split():
            if word.endswith(":"):
                section = word[:-1] + "."
            else:
                yield (word if "." in word else section + word, kind)


def _described(slot: Slot) -> Iterator[tuple[str, Kind]]:
    """The keys of a slot's kinds, as these say; what is not said of a key holds for the kind itself."""
    for described in kinds(slot).values():
        default = Kind[described.decides_by_default]
        yield f"{slot.key}.kind", default
        for key in described.keys.model_fields:
            yield f"{slot.key}.{key}", Kind[described.decides[key]] if key in described.decides else default


KINDS: dict[str, Kind] = dict(_table(_WORDS))
for _slot in (MIXERS, GATES, DISPATCHERS):
    KINDS |= dict(_described(_slot))
"""Of every key of the schema that is no section."""


@dataclass(frozen=True)
class Change:
    """A key whose value differs from the checkpoint's. `given`: its kind, where that is not the schema's."""

    key: str
    saved: Any
    now: Any
    given: Kind | None = None

    @property
    def kind(self) -> Kind:
        """The kind of the key. One that this version does not know decides, for all it knows, the steps to come."""
        unknown = Kind.WEIGHTS if self.key.startswith("model") else Kind.TRAINING
        return self.given or KINDS.get(self.key, unknown)

    def __str__(self) -> str:
        return f"{self.key}: saved {_shown(self.saved)}, now {_shown(self.now)}"

    def arrow(self) -> str:
        """ "train.optimizer.lr: 0.003 → 0.5"."""
        return f"{self.key}: {_shown(self.saved)} → {_shown(self.now)}"


ABSENT = "absent"
"""Stands for the value of a key that another version alone knows."""
GIVEN = "given"
"""Stands for the value of a section that is there, where the other one is null."""


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def saved_form(config: Config) -> dict[str, Any]:
    """The configuration as JSON without `SECRET` keys."""
    tree = config.model_dump(mode="json")
    for key in SECRET:
        section, _, name = key.rpartition(".")
        tree[section].pop(name)
    return tree


def defaults(section: type[Section] = Config, prefix: str = "") -> dict[str, Any]:
    """The default of every key that has one and is no section, by its dotted name."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if (inner := section_of(annotation(field))) is not None:
            found |= defaults(inner, f"{prefix}{name}.")
        elif not field.is_required():
            value = field.get_default(call_default_factory=True)
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value of a nested mapping; `launch.env` and its like, which hold free names, stay whole."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + name
        inner = isinstance(value, Mapping) and key not in KINDS
        found |= flat(value, f"{key}.") if inner else {key: value}
    return found


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Every key that differs between two `saved_form`s, but those that decide nothing; the gravest first.

    A key that one of them lacks, written by an older version, has its default there. A derived value (as many
    key heads as heads) equals the same one written out.
    """
    given, default = (flat(saved), flat(now)), defaults()
    old, new = (_meant(values) for values in given)
    found = []
    for key in [*KINDS, *sorted((old.keys() | new.keys()) - KINDS.keys())]:
        if not (_present(key, old) and _present(key, new)):
            continue
        change = Change(key, *(_value(key, values, default) for values in given))
        meant = [_value(key, values, default) for values in (old, new)]
        if change.saved != change.now and meant[0] != meant[1] and change.kind is not Kind.FREE:
            found.append(change)
    return found


def _value(key: str, values: Mapping[str, Any], default: Mapping[str, Any]) -> Any:
    if key not in values and any(other.startswith(f"{key}.") for other in values):
        return GIVEN
    return values.get(key, default.get(key, ABSENT))


def _present(key: str, values: Mapping[str, Any]) -> bool:
    """Whether no section around the key is null (then the section itself is what differs)."""
    parts = key.split(".")
    return not any(".".join(parts[:n]) in values for n in range(1, len(parts)))


DERIVED = {
    "model.attention.kv_heads": "model.attention.heads",
    "model.moe.shared_ffn_hidden": "model.moe.ffn_hidden",
    "model.moe.lora_alpha": "model.moe.lora_rank",
    "model.moe.eval_capacity_factor": "model.moe.capacity_factor",
}
"""Keys whose null stands for another key's value."""


def _meant(values: dict[str, Any]) -> dict[str, Any]:
    """With the values that null stands for. A section that is null is kept as such, one that is there is not."""
    meant = dict(values)
    for key, other in DERIVED.items():
        if meant.get(key) is None and meant.get(other) is not None:
            meant[key] = meant[other]
    hidden, heads = meant.get("model.hidden"), meant.get("model.attention.heads")
    if meant.get("model.attention.head_dim") is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        meant["model.attention.head_dim"] = hidden // heads
    return meant
