"""The meaning of each key's change to a run that goes on from its checkpoint.

change = Change("train.optimizer.lr", 0.003, 0.5)
change.effect                                        # "changes numbers"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from moesys.config.registry import DISPATCHERS, GATES, MIXERS, Slot, kinds


class Kind(Enum):
    """What a key decides, and what follows when it changes between a checkpoint and its resumption."""

    WEIGHTS = "decides the weights"
    """It decides names, shapes or the meaning of weights. A change is refused where a weight does not fit; where all
    fit, `train.resume_changed` must name it."""
    MEANT = "changes what the run is"
    """The model computes something else, or sees other samples: `train.resume_changed` must name it."""
    CONTENT = "says where the data lie"
    """It may change, and is printed; the data are compared by content."""
    TRAINING = "decides the steps to come"
    """It may change, and is printed."""
    RUNNING = "decides how it is computed"
    """It changes the numbers of training by rounding at most: it may change, and is printed."""
    FREE = "decides no number"
    """It may change, and nothing is printed."""
    UNKNOWN = "is unknown to this version"
    """A checkpoint of another version has it, with a value that may change numbers: it is refused."""


EFFECTS = {
    Kind.WEIGHTS: "cannot fit",
    Kind.MEANT: "changes numbers",
    Kind.CONTENT: "harmless",
    Kind.TRAINING: "changes numbers",
    Kind.RUNNING: "harmless",
    Kind.FREE: "harmless",
    Kind.UNKNOWN: "unknown to this version",
}
"""The effect of a change on a run that resumes, in words for the user."""


_WORDS = {
    Kind.WEIGHTS: """
        model.vocab_size model.hidden model.layers model.ffn_hidden model.tie_embeddings
        model.norm model.head_bias
        model.mixers
        model.layers: count first repeat
        model.mtp.depth
        model.moe: experts ffn_hidden bias every first_dense zero_experts copy_experts constant_experts lora_rank
            shared_experts shared_ffn_hidden shared_mix
        """,
    Kind.MEANT: """
        seed train.seq_len data.heldout
        model: norm_eps rope_theta embedding_multiplier residual_multiplier logits_divisor
        model.rope_scaling: kind factor original_seq_len low_freq_factor high_freq_factor beta_fast beta_slow truncate
            mscale mscale_all_dim attention_factor short_factor long_factor short_mscale long_mscale
        model.moe: top_k activation normalize normalize_min scale selection_bias lora_alpha zero_variant
        """,
    Kind.CONTENT: """
        data: kind path text_key split tokenizer
        """,
    Kind.TRAINING: """
        model.init_std model.mtp.loss_weight
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
        train: init eval eval_every resume_changed
        data.cache cluster.memory_gib
        launch: launcher link_gbit ray_address timeout_s max_failures threads env slurm
        output: runs checkpoint_every keep export export_checkpoints tensorboard wandb log_every record_routing
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


NAMED_MIXERS = "model.mixers."
"""Prefix of the sections of mixers that have names; they have the keys of `model.attention`."""


HELD_OUT = "train.eval"
"""The key of the held-out texts that have names."""


def table_key(key: str) -> str:
    """The key of `KINDS` for `key`: "model.attention.heads" for "model.mixers.local.heads"."""
    if key.startswith(f"{HELD_OUT}."):
        return HELD_OUT
    _, dot, rest = key.removeprefix(NAMED_MIXERS).partition(".")
    return f"{MIXERS.key}.{rest}" if key.startswith(NAMED_MIXERS) and dot else key


HARMLESS_SECTIONS = ("launch.", "output.", "measure.", "cluster.")
"""Prefixes of sections whose keys change no number, those of other versions included."""


def harmless(key: str, value: Any) -> bool:
    """True if a key that this version does not know changes no number: its section has none that do, or it is off.

    A feature that is off is null, false, 0, "none" or empty, here and in every other version.
    """
    return key.startswith(HARMLESS_SECTIONS) or not value or value == "none"


@dataclass(frozen=True)
class Change:
    """A key whose value differs from the checkpoint's. `given`: its kind, where that is not the schema's."""

    key: str
    saved: Any
    now: Any
    given: Kind | None = None

    @property
    def kind(self) -> Kind:
        """The kind of the key."""
        if self.given is not None:
            return self.given
        known = KINDS.get(table_key(self.key)) or (Kind.WEIGHTS if GIVEN in (self.saved, self.now) else None)
        return known or (Kind.FREE if harmless(self.key, self.saved) else Kind.UNKNOWN)

    @property
    def effect(self) -> str:
        """ "harmless", "changes numbers", "cannot fit" or "unknown to this version"."""
        return EFFECTS[self.kind]

    def __str__(self) -> str:
        return f"{self.key}: saved {_shown(self.saved)}, now {_shown(self.now)}"

    def row(self) -> str:
        """ "model.moe.experts: saved 4, now 8 (cannot fit)"."""
        return f"{self} ({self.effect})"

    def arrow(self) -> str:
        """ "train.optimizer.lr: 0.003 → 0.5"."""
        return f"{self.key}: {_shown(self.saved)} → {_shown(self.now)}"


ABSENT = "absent"
"""The value of a key that another version alone knows."""
GIVEN = "given"
"""The value of a section that is there, where the other one is null."""


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
