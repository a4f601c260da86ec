"""The base of all families of released models: what their files hold, and what their config.json means.

A family is one file in `moesys/hub/families`, or a plug-in's (entry points `moesys.families`). Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from moesys.config.differences import flat
from moesys.config.registry import Described, Slot, kinds
from moesys.config.schema import ModelConfig
from moesys.errors import Problem
from moesys.hub.experts import ExpertLayout, PerExpert
from moesys.hub.mapping import Stored, identity
from moesys.models.parts.axes import Axis, Weight
from moesys.models.parts.mixer import Mixer
from moesys.models.parts.model import block
from moesys.models.size import weights

FAMILIES = Slot("families of released models", "moesys.hub.families", "moesys.families", "model.from")

REQUIRED = object()
"""Default of a key that every config.json of a family has."""


@dataclass(frozen=True)
class Key:
    """A key of config.json, and ours that means the same.

    Attributes:
        theirs: its name; older files may have one of `also` instead, and both are written.
        ours: dotted, below "model."; "attention" is every mixer of the model.
        default: its value where files lack it. None: as our key's default.
        nullable: null is written where our key has no value, because the class of transformers has another default.
    """

    theirs: str
    ours: str
    default: Any = None
    also: tuple[str, ...] = ()
    nullable: bool = False


@dataclass
class Derived:
    """What a config.json says of a model.

    Attributes:
        values: dotted keys below "model." and their values.
        read: keys that were understood.
        notes: sentences on what it says that no number of the model hangs on here.
        problems: what would change numbers and cannot be followed; `Problem.key` is theirs.
    """

    values: dict[str, Any] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, key: str, rule: str, remedy: str = "use transformers for this model") -> None:
        """Note that the files' `key` cannot be followed."""
        self.problems.append(Problem(key, rule, remedy))


GENERAL = """
    _name_or_path architectures auto_map model_type transformers_version torch_dtype dtype use_cache bos_token_id
    eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id eod_token_id im_start_id im_end_id
    id2label label2id output_hidden_states output_attentions return_dict is_encoder_decoder chunk_size_feed_forward
    problem_type tokenizer_class quantization_config max_position_embeddings max_window_layers pretraining_tp
    attn_implementation _attn_implementation output_router_logits ep_size qk_head_dim num_experts_per_device
    use_return_dict torchscript pruned_heads gradient_checkpointing language_model_only
"""
"""Keys of config.json that no number of the model hangs on."""
GENERATION = """
    temperature top_k top_p typical_p do_sample max_length min_length max_new_tokens num_beams num_beam_groups
    repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size early_stopping bad_words_ids
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id prefix
    num_return_sequences output_scores remove_invalid_values return_dict_in_generate suppress_tokens
    begin_suppress_tokens
"""
"""Generation settings that older files have in config.json."""
DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "resid_dropout", "classifier_dropout")
"""Keys that must be 0: no part here drops activations."""

ROTARY = ("rope_theta", "rope_scaling", "rope_parameters")

COMMON = (
    Key("vocab_size", "vocab_size", REQUIRED),
    Key("hidden_size", "hidden", REQUIRED),
    Key("num_attention_heads", "attention.heads", REQUIRED),
    Key("rms_norm_eps", "norm_eps", 1e-6),
    Key("tie_word_embeddings", "tie_embeddings", False),
    Key("initializer_range", "init_std", 0.02),
)
"""Keys of all families."""
GROUPED = (
    *COMMON,
    Key("num_key_value_heads", "attention.kv_heads"),
    Key("head_dim", "attention.head_dim"),
)
"""Those of families with grouped-query attention."""


class Family(Described):
    """A family of released models.

    Attributes:
        kind: its `model_type`. `also`: others with the same files and arithmetic, for reading.
        architecture: name of transformers' class, for config.json.
        released: names of models of the family, for the guide.
        fields: keys of config.json that one of ours stands for.
        always: our keys, below "model.", with the values that the family's arithmetic has without a key of config.json.
        only: keys of config.json with the one value that is followed; they are written, too.
        ignored: more keys on which no number hangs.
        names: our weights' names, within a block or of the model, and theirs.
        block: what their names of a block's tensors begin with; {layer} is its number.
        experts: how the routed experts' matrices lie in the files.
        float32: our weights that stay float32 whatever the files' type, by their names within a block.
        left_out: patterns of tensors in files that are not used.
    """

    also: ClassVar[tuple[str, ...]] = ()
    architecture: ClassVar[str] = ""
    released: ClassVar[tuple[str, ...]] = ()
    fields: ClassVar[tuple[Key, ...]] = GROUPED
    always: ClassVar[Mapping[str, Any]] = {}
    only: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu"}
    ignored: ClassVar[frozenset[str]] = frozenset()
    names: ClassVar[Mapping[str, str]] = {}
    block: ClassVar[str] = "model.layers.{layer}."
    experts: ClassVar[ExpertLayout] = PerExpert("mlp.experts.{expert}.", "gate_proj", "up_proj", "down_proj")
    float32: ClassVar[frozenset[str]] = frozenset()
    left_out: ClassVar[tuple[str, ...]] = (r".*\.rotary_emb\.inv_freq",)

    # ---- config.json -> our keys

    def read(self, raw: Mapping[str, Any]) -> Derived:
        """Our model section, as a config.json means it."""
        found = Derived(values=dict(self.always))
        for key in self.fields:
            self._read(key, raw, found)
        self.layers(raw, found)
        self.rotary(raw, found)
        self.more(raw, found)
        for name, value in self.only.items():
            found.read.add(name)
            if name in raw and raw[name] != value and raw[name] is not None:
                found.refuse(name, f"is {raw[name]!r}, and only {value!r} is followed")
        for name in DROPOUTS:
            if raw.get(name):
                found.refuse(name, f"is {raw[name]}, and no part drops activations here", "set it to 0 in config.json")
        self._rest(raw, found)
        return found

    def _read(self, key: Key, raw: Mapping[str, Any], found: Derived) -> None:
        names = (key.theirs, *key.also)
        found.read.update(names)
        given = {name: raw[name] for name in names if raw.get(name) is not None}
        if len({repr(value) for value in given.values()}) > 1:
            found.refuse(key.theirs, "differs from " + ", ".join(f"{n}({v})" for n, v in given.items()), "keep one")
        value = next(iter(given.values()), key.default)
        if value is REQUIRED:
            found.refuse(key.theirs, "is missing", "copy config.json again, or add the key")
        elif value is not None:
            found.values[key.ours] = value

    def layers(self, raw: Mapping[str, Any], found: Derived) -> None:
        """Number of blocks, and which mixer each has."""
        self._read(Key("num_hidden_layers", "layers", REQUIRED), raw, found)

    def rotary(self, raw: Mapping[str, Any], found: Derived) -> None:
        """Rotary positions: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of older files."""
        from moesys.hub.rotary import read

        read(raw, found)

    def more(self, raw: Mapping[str, Any], found: Derived) -> None:
        """What no `Key` says."""

    def _rest(self, raw: Mapping[str, Any], found: Derived) -> None:
        known = found.read | {*GENERAL.split(), *self.ignored, *DROPOUTS}
        generation = set(GENERATION.split())
        settings = sorted(set(raw) & generation - known)
        if settings:
            found.notes.append(f"generation settings, which training has not: {', '.join(settings)}")
        for name in sorted(set(raw) - known - generation):
            if raw[name] not in (None, False, 0, "", [], {}):
                rule = f"{self.kind} files are not known to have it, and it may change numbers"
                found.refuse(name, rule, "remove it from config.json if it does not")

    # ---- our keys -> config.json

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The config.json of a model, without what tokens and types mean."""
        ours = meant(model)
        raw: dict[str, Any] = {"model_type": self.kind, "architectures": [self.architecture], **self.only}
        for key in self.fields:
            if (value := ours.get(key.ours)) is not None or key.nullable:
                raw |= dict.fromkeys((key.theirs, *key.also), value)
        raw["num_hidden_layers"] = model.depth
        self.write_rotary(model, raw)
        self.write_more(model, raw)
        return raw

    def write_rotary(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """Rotary positions, by the new keys and the old."""
        from moesys.hub.rotary import write

        write(model, raw)

    def write_more(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """What no `Key` says."""

    def differences(self, model: ModelConfig) -> list[str]:
        """What the family's files cannot say of a model: each key with its value, and the one that they would mean."""
        written = self.write(model)
        back = self.read(written)
        if back.problems:
            return [str(problem) for problem in back.problems]
        again = meant(ModelConfig.model_validate(nested(back.values)))
        mine = meant(model)
        return [
            f"model.{key}: {mine.get(key)!r}, and {self.kind} has {again.get(key)!r}"
            for key in sorted(mine.keys() | again.keys())
            if decides(key) and mine.get(key) != again.get(key)
        ]

    # ---- tensors

    def stored(self, weight: Weight, model: ModelConfig) -> Sequence[Stored]:
        """The tensors that hold a weight.

        Raises:
            KeyError: files of this family have no such weight.
        """
        if weight.layer is None:
            return [identity(self.names_of_model()[weight.name], weight.shape)]
        prefix = f"layers.{weight.layer}."
        inner, theirs = weight.name.removeprefix(prefix), self.block.format(layer=weight.layer)
        if inner.startswith("ffn.experts."):
            return self.experts.stored(inner.removeprefix("ffn.experts."), weight.shape, theirs)
        mixer = block(model, weight.layer).mixer
        return list(self.in_block(inner, weight, theirs, mixer))

    def in_block(self, inner: str, weight: Weight, prefix: str, mixer: Mixer) -> Iterable[Stored]:
        """The tensors of a weight of a block that is not of routed experts. `inner`: its name within the block."""
        rows = self.rows(inner, mixer)
        name = prefix + self.names_of_block()[inner]
        found = identity(name, weight.shape, rows)
        yield Stored(
            found.name, found.box, found.dims, rows, float32=inner in self.float32, leading=self.leading(inner)
        )

    def rows(self, inner: str, mixer: Mixer) -> tuple[int, ...] | None:
        """The files' row of each row of a weight, where they have another order."""
        return None

    def leading(self, inner: str) -> int:
        """Dims of size 1 that their tensor has before ours."""
        return 0

    def names_of_model(self) -> dict[str, str]:
        """Their name of each of our weights outside of blocks."""
        return MODEL_NAMES | {ours: name for ours, name in self.names.items() if ours in MODEL_NAMES}

    def names_of_block(self) -> dict[str, str]:
        """Their name of each of our weights in a block."""
        return BLOCK_NAMES | {ours: name for ours, name in self.names.items() if ours not in MODEL_NAMES}

    def weights(self, model: ModelConfig, vocab_size: int) -> Iterator[Weight]:
        """Every weight of a model, and every buffer of its gates that files have."""
        yield from weights(model, vocab_size)
        yield from buffers(model)

    def is_left_out(self, name: str, model: ModelConfig) -> bool:
        """True if a tensor of the files is not used, on purpose."""
        tied = model.tie_embeddings and name == self.names_of_model()["head.weight"]
        return tied or any(re.fullmatch(pattern, name) for pattern in self.left_out)


MODEL_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "norm.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
    "head.bias": "lm_head.bias",
}
_LINEAR = ("weight", "bias")
BLOCK_NAMES = {
    **{f"attention_norm.{p}": f"input_layernorm.{p}" for p in _LINEAR},
    **{f"ffn_norm.{p}": f"post_attention_layernorm.{p}" for p in _LINEAR},
    **{f"attention.{m}_proj.{p}": f"self_attn.{m}_proj.{p}" for m in "qkvo" for p in _LINEAR},
    **{f"attention.{m}_norm.weight": f"self_attn.{m}_norm.weight" for m in "qk"},
    "attention.q_a_proj.weight": "self_attn.q_a_proj.weight",
    "attention.q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.q_b_proj.weight": "self_attn.q_b_proj.weight",
    "attention.kv_a_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.kv_b_proj.weight": "self_attn.kv_b_proj.weight",
    "attention.sinks.weight": "self_attn.sinks",
    **{f"ffn.{m}_proj.weight": f"mlp.{m}_proj.weight" for m in ("gate", "up", "down")},
    **{f"ffn.shared.{m}_proj.weight": f"mlp.shared_experts.{m}_proj.weight" for m in ("gate", "up", "down")},
    "ffn.gate.projection.weight": "mlp.gate.weight",
    "ffn.gate.projection.bias": "mlp.gate.bias",
    "ffn.gate.selection_bias": "mlp.gate.e_score_correction_bias",
}
"""Names that most families have."""


def buffers(model: ModelConfig) -> Iterator[Weight]:
    """What gates keep beside their weights: the bias for selection, float32 [E]."""
    m = model.moe
    if m is None or not (m.bias_rate or getattr(m, "selection_bias", False)):
        return
    for layer in model.moe_blocks:
        yield Weight(f"layers.{layer}.ffn.gate.selection_bias", (Axis("candidate", m.experts),), "bias", layer)


def families() -> dict[str, Family]:
    """Every family by its `model_type`, those that read the same files included."""
    found: dict[str, Family] = {}
    for described in kinds(FAMILIES).values():
        family = described()
        found |= dict.fromkeys((family.kind, *family.also), family)
    return found


TRAINING = frozenset({"init_std"})
"""Keys of the model that decide no output of given weights, beside those of `model.moe` that are about training."""


def decides(key: str) -> bool:
    """True if a key below "model." changes what given weights compute, dropless and in evaluation."""
    from moesys.config.changes import KINDS, Kind, table_key

    kind = KINDS.get(table_key(f"model.{key}"))
    return kind is not Kind.TRAINING and key not in TRAINING and kind is not Kind.FREE


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of dotted keys."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree


def meant(model: ModelConfig) -> dict[str, Any]:
    """Every key of a model, dotted, with the values that null stands for."""
    found = flat(model.model_dump(mode="json"))
    for section in ("attention", *(f"mixers.{name}" for name in model.mixers)):
        heads = found[f"{section}.heads"]
        if found.get(f"{section}.kind") == "gqa":
            found[f"{section}.kv_heads"] = found[f"{section}.kv_heads"] or heads
            found[f"{section}.head_dim"] = found[f"{section}.head_dim"] or model.hidden // heads
    if model.moe is not None and model.moe.shared_experts:
        found["moe.shared_ffn_hidden"] = model.moe.shared_ffn_hidden or model.moe.ffn_hidden
    return found
