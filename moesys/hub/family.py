"""The base of all families of released models: what their files hold, and what their config.json means.

A family is one file in `moesys/hub/families`, or a plug-in's (entry points `moesys.families`). Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import ValidationError

from moesys.config.changes import KINDS, Kind, table_key
from moesys.config.differences import flat
from moesys.config.registry import FAMILIES, MIXERS, Described, kinds, used
from moesys.config.schema import ModelConfig
from moesys.hub import blocks
from moesys.hub.derived import Derived
from moesys.hub.experts import ExpertLayout, PerExpert
from moesys.hub.keys import DROPOUTS, GENERAL, GENERATION, GROUPED, REQUIRED, Key
from moesys.hub.mapping import Stored, identity
from moesys.hub.names import BLOCK_NAMES, MODEL_NAMES
from moesys.hub.rotary import Rotary
from moesys.models.parts.axes import Axis, Weight
from moesys.models.parts.mixer import Mixer
from moesys.models.parts.model import block
from moesys.models.size import weights

DECODED = ("fp8", "mxfp4")
"""Words of `quantization_config` for files that are decoded."""


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
        rotary: what its files say of rotary positions.
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
    left_out: ClassVar[tuple[str, ...]] = (r".*\.rotary_emb\.inv_freq", r".*\.(input|activation|k|v)_scale")
    rotary: ClassVar[Rotary] = Rotary()

    # ---- config.json -> our keys

    def read(self, raw: Mapping[str, Any], tensors: Collection[str] | None = None) -> Derived:
        """Our model section, as a config.json means it.

        Args:
            raw: config.json.
            tensors: names of the tensors in the files, where they are known: parts that config.json names and files
                lack are left out.
        """
        found = Derived(values=dict(self.always))
        for key in self.fields:
            self._read(key, raw, found)
        self.layers(raw, found)
        self.rotary.read(raw, found)
        self.more(raw, found)
        self.predict(raw, found, tensors)
        for name, value in self.only.items():
            self.require(raw, found, name, value)
        method = (raw.get("quantization_config") or {}).get("quant_method")
        if method not in (None, *DECODED):
            rule = f"is {method!r}, and only {' and '.join(DECODED)} are decoded"
            found.refuse(
                "quantization_config.quant_method", rule, "name a folder of the weights before they were packed"
            )
        for name in DROPOUTS:
            if raw.get(name):
                found.refuse(name, f"is {raw[name]}, and no part drops activations here", "set it to 0 in config.json")
        self._rest(raw, found)
        _spread(found)
        return found

    def _read(self, key: Key, raw: Mapping[str, Any], found: Derived) -> None:
        names = (key.theirs, *key.also)
        found.read.update(names)
        given = {name: raw[name] for name in names if raw.get(name) is not None}
        if len({repr(value) for value in given.values()}) > 1:
            found.refuse(key.theirs, "differs from " + ", ".join(f"{n}({v})" for n, v in given.items()), "keep one")
        absent = key.default if not any(name in raw for name in names) or key.default is REQUIRED else None
        value = next(iter(given.values()), absent)
        if value is REQUIRED:
            found.refuse(key.theirs, "is missing", "copy config.json again, or add the key")
        elif value is not None:
            found.values[key.ours] = value

    def require(self, raw: Mapping[str, Any], found: Derived, name: str, *followed: Any) -> None:
        """Refuse a key of config.json, unless it is absent, null or one of the values that are followed."""
        found.read.add(name)
        if raw.get(name) is not None and raw[name] not in followed:
            found.refuse(name, f"is {raw[name]!r}, and only {' or '.join(map(repr, followed))} is followed")

    def layers(self, raw: Mapping[str, Any], found: Derived) -> None:
        """Number of blocks, which of them are MoE, and which have a window."""
        found.read.add("num_hidden_layers")
        depth = raw.get("num_hidden_layers")
        if not isinstance(depth, int) or depth < 1:
            found.refuse("num_hidden_layers", "must be the number of blocks", "copy config.json again, or add the key")
            depth = 1
        moe = self.moe_blocks(raw, found, depth)
        if not any(moe):
            found.values = {key: value for key, value in found.values.items() if not key.startswith("moe.")}
        found.values |= blocks.arranged(self.windows(raw, found, depth), moe)

    def moe_blocks(self, raw: Mapping[str, Any], found: Derived, depth: int) -> Sequence[bool]:
        """Whether each block is MoE."""
        return [any(key.startswith("moe.") for key in found.values)] * depth

    def windows(self, raw: Mapping[str, Any], found: Derived, depth: int) -> Sequence[int | None]:
        """The window of each block; None: the whole sequence."""
        return [None] * depth

    def more(self, raw: Mapping[str, Any], found: Derived) -> None:
        """What no `Key` says."""

    def predict(self, raw: Mapping[str, Any], found: Derived, tensors: Collection[str] | None) -> None:
        """Blocks of multi-token prediction."""

    def _rest(self, raw: Mapping[str, Any], found: Derived) -> None:
        known = found.read | GENERAL | self.ignored | set(DROPOUTS)
        if settings := sorted(set(raw) & GENERATION - known):
            found.notes.append(f"generation settings, which training has not: {', '.join(settings)}")
        for name in sorted(set(raw) - known - GENERATION):
            if raw[name] not in (None, False, 0, "", [], {}):
                rule = f"{self.kind} files are not known to have it, and it may change numbers"
                found.refuse(name, rule, "remove it from config.json if it does not")

    # ---- our keys -> config.json

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The config.json of a model, without what tokens and types mean."""
        # Readers ask for the size of dense blocks where there are none, too.
        ours = meant(model) | {"ffn_hidden": model.ffn_hidden or (model.moe.ffn_hidden if model.moe else None)}
        raw: dict[str, Any] = {"model_type": self.kind, "architectures": [self.architecture], **self.only}
        for key in self.fields:
            if key.ours in ours and (ours[key.ours] is not None or key.default not in (None, REQUIRED)):
                value = ours[key.ours]
                raw |= dict.fromkeys((key.theirs, *key.also), value[0] if isinstance(value, tuple) else value)
        raw["num_hidden_layers"] = model.depth
        self.rotary.write(model, raw)
        self.write_more(model, raw)
        return raw

    def write_more(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        """What no `Key` says."""

    def differences(self, model: ModelConfig) -> list[str]:
        """What the family's files cannot say of a model: each key with its value, and the one that they would mean."""
        back = self.read(self.write(model))
        if back.problems:
            return [str(problem) for problem in back.problems]
        try:
            again, mine = meant(ModelConfig.model_validate(nested(back.values))), meant(model)
        except ValidationError as error:  # the model has sizes that these files cannot say
            return [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        return [
            f"model.{key}: {mine.get(key)!r}, and {self.kind} has {again.get(key)!r}" for key in differing(mine, again)
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

    def copies(self, model: ModelConfig) -> dict[str, str]:
        """Tensors of the files that are copies of one of our weights, which is named: not read, and written."""
        return {}

    def is_left_out(self, name: str, model: ModelConfig) -> bool:
        """True if a tensor of the files is not used, on purpose."""
        tied = model.tie_embeddings and name == self.names_of_model()["head.weight"]
        return tied or name in self.copies(model) or any(re.fullmatch(pattern, name) for pattern in self.left_out)


def buffers(model: ModelConfig) -> Iterator[Weight]:
    """What gates keep beside their weights: the bias for selection, float32 [E]."""
    m = model.moe
    if m is None or not (m.bias_rate or m.selection_bias):
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


def decides(key: str) -> bool:
    """True if a key below "model." changes what given weights compute, dropless and in evaluation."""
    kind = KINDS.get(table_key(f"model.{key}"))
    return kind not in (Kind.TRAINING, Kind.FREE)


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys that change what given weights compute, and differ between two models' `meant` values."""
    return [k for k in sorted(one.keys() | other.keys()) if decides(k) and one.get(k) != other.get(k)]


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
    """Every key that a model uses, dotted, with the values that null stands for.

    "layers" says which blocks are MoE. A key of mixers that differs between blocks is a tuple with the value of each.
    """
    found = flat(model.model_dump(mode="json"))
    places = ("layers", "attention", "mixers", "moe.every", "moe.first_dense")
    found = {key: value for key, value in found.items() if not key.startswith(places)}
    moe = [str(layer) for layer in range(model.depth) if model.is_moe(layer)]
    found["layers"] = f"{model.depth} blocks, MoE: {', '.join(moe) or 'none'}"
    each = [_mixer(model, layer) for layer in range(model.depth)]
    for key in dict.fromkeys(key for mixer in each for key in mixer):
        values = tuple(mixer.get(key) for mixer in each)
        found[f"attention.{key}"] = values[0] if all(value == values[0] for value in values) else values
    if len(moe) == model.depth:
        del found["ffn_hidden"]
    if (m := model.moe) is not None:
        found["moe.selection_bias"] = bool(m.bias_rate or m.selection_bias)
        found["moe.shared_ffn_hidden"] = m.shared_width or None
        del found["moe.shared_experts"]
        if not m.shared_experts:
            del found["moe.shared_mix"]
        if m.gate.groups == 1:
            del found["moe.gate.groups_kept"], found["moe.gate.group_score"]
    return found


def _mixer(model: ModelConfig, layer: int) -> dict[str, Any]:
    """The keys that a block's mixer uses."""
    section = model.mixer(layer)[0]
    found = {key: getattr(section, key) for key in ("kind", *used(MIXERS, section.kind))}
    found |= block(model, layer).mixer.meant()
    return found


def _spread(found: Derived) -> None:
    """Give every other mixer of a pattern the keys of `attention`."""
    shared = {key.removeprefix("attention."): v for key, v in found.values.items() if key.startswith("attention.")}
    names = sorted({key.split(".")[1] for key in found.values if key.startswith("mixers.")})
    for name in names:
        found.values = {f"mixers.{name}.{key}": value for key, value in shared.items()} | found.values
