"""The differences between two configurations, of this or other versions, key by key.

saved = saved_form(config)               # what a checkpoint keeps
differences(saved, saved_form(other))    # [Change("train.optimizer.lr", 0.003, 0.5)]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesys.config.changes import ABSENT, GIVEN, KINDS, NAMED_MIXERS, Change, Kind, harmless
from moesys.config.legal import annotation, mapping_of, section_of, type_at
from moesys.config.registry import GATES, MIXERS, users
from moesys.config.schema import Config, Section

SECRET = ("launch.env",)
"""Keys that config.yaml alone keeps, and without what `moesys.config.secret` knows to be secret: more may be."""


def saved_form(config: Config) -> dict[str, Any]:
    """The configuration as JSON without `SECRET` keys."""
    tree = config.model_dump(mode="json")
    for key in SECRET:
        section, _, name = key.rpartition(".")
        tree[section].pop(name)
    return tree


def defaults(section: type[Section] = Config, prefix: str = "") -> dict[str, Any]:
    """The default of every key that has one, by its dotted name; of a section only null, before its keys."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        key = prefix + name
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        if (inner := section_of(annotation(field))) is not None:
            found |= {} if field.is_required() or value is not None else {key: None}
            found |= defaults(inner, f"{key}.")
            found |= flat(value.model_dump(mode="json"), f"{key}.") if value is not None else {}
        elif not field.is_required():
            found[key] = list(value) if isinstance(value, tuple) else value
    return found


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value of a nested mapping; `launch.env` and its like, which hold free names, stay whole."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + name
        inner = isinstance(value, Mapping) and not _has_free_names(key)
        found |= flat(value, f"{key}.") if inner else {key: value}
    return found


def _has_free_names(key: str) -> bool:
    """True if the key holds a mapping of free names to values that are no sections."""
    kind = type_at(key.split("."))
    values = None if kind is None else mapping_of(kind)
    return values is not None and section_of(values) is None


def known(
    tree: Mapping[str, Any], section: type[Section] = Config, prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """The keys of a `saved_form` that this version knows, and the dotted names of others that may change numbers."""
    found: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in tree.items():
        key = prefix + name
        if name not in section.model_fields:
            rest = flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
            unknown += [inner for inner, setting in rest.items() if not harmless(inner, setting)]
            continue
        kind = annotation(section.model_fields[name])
        inner, named = section_of(kind), section_of(mapping_of(kind))
        if not isinstance(value, Mapping) or (inner is None and named is None):
            found[name] = value
        elif inner is not None:
            found[name], more = known(value, inner, f"{key}.")
            unknown += more
        elif named is not None:
            each = {word: known(inside, named, f"{key}.{word}.") for word, inside in value.items()}
            found[name] = {word: tree for word, (tree, _) in each.items()}
            unknown += [other for _, others in each.values() for other in others]
    return found, unknown


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Every key that differs between two `saved_form`s, except those of no effect; the gravest first.

    A key that one of them lacks, written by an older version, has its default there. A derived value (as many
    key heads as heads) equals the same one written out. A key that neither attention nor gate uses has no effect.
    """
    default = defaults()
    given = [_completed(flat(tree), default) for tree in (saved, now)]
    _mark_absent_mixers(*given)
    old, new = (_meant(values) for values in given)
    found = []
    for key in [*KINDS, *sorted((old.keys() | new.keys()) - KINDS.keys())]:
        if not (_present(key, old) and _present(key, new)) or _unused(key, old, new):
            continue
        change = Change(key, *(_value(key, values) for values in given))
        meant = [_value(key, values) for values in (old, new)]
        if change.saved != change.now and meant[0] != meant[1] and change.kind is not Kind.FREE:
            found.append(change)
    return found


def _completed(values: dict[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the default of every key that they lack."""
    found = dict(values)
    for key, value in default.items():
        given = any(other.startswith(f"{key}.") for other in values)
        if key not in found and not given and _present(key, found):
            found[key] = value
    own = {key.removeprefix(MIXERS.key): value for key, value in default.items() if key.startswith(f"{MIXERS.key}.")}
    return {f"{NAMED_MIXERS}{name}{rest}": value for name in _mixers(values) for rest, value in own.items()} | found


def _mixers(values: Mapping[str, Any]) -> list[str]:
    """The names of the mixers in `values`."""
    keys = (key.removeprefix(NAMED_MIXERS) for key in values if key.startswith(NAMED_MIXERS))
    return list(dict.fromkeys(key.partition(".")[0] for key in keys))


def _mark_absent_mixers(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Note in each of two sets of values the mixers that the other alone has: they are compared as a whole."""
    for values, other in ((old, new), (new, old)):
        absent = [name for name in _mixers(other) if name not in _mixers(values)]
        if f"{NAMED_MIXERS.removesuffix('.')}" not in values:
            values.update({f"{NAMED_MIXERS}{name}": ABSENT for name in absent})


def _unused(key: str, *each: Mapping[str, Any]) -> bool:
    """True if the kind of attention, or of gate, does not use the key in any of the sets of values."""
    section, _, name = key.rpartition(".")
    slot = GATES if section == GATES.key else MIXERS
    if section not in (GATES.key, MIXERS.key) and not section.startswith(NAMED_MIXERS):
        return False
    using = users(slot, name)
    return bool(using) and not any(values.get(f"{section}.kind") in using for values in each)


def _value(key: str, values: Mapping[str, Any]) -> Any:
    if key not in values and any(other.startswith(f"{key}.") for other in values):
        return GIVEN
    return values.get(key, ABSENT)


def _present(key: str, values: Mapping[str, Any]) -> bool:
    """True if no section around the key is null: then the section itself is what differs."""
    parts = key.split(".")
    return not any(".".join(parts[:n]) in values for n in range(1, len(parts)))


DERIVED = {
    "model.moe.shared_ffn_hidden": "model.moe.ffn_hidden",
    "model.moe.lora_alpha": "model.moe.lora_rank",
    "model.moe.eval_capacity_factor": "model.moe.capacity_factor",
}
"""Keys whose null stands for another key's value."""


def _meant(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the ones that null stands for. A section that is null stays null."""
    meant = dict(values)
    sections = [f"{MIXERS.key}.", *(f"{NAMED_MIXERS}{name}." for name in _mixers(values))]
    for key, other in {**DERIVED, **{f"{section}kv_heads": f"{section}heads" for section in sections}}.items():
        if meant.get(key) is None and meant.get(other) is not None:
            meant[key] = meant[other]
    for section in sections:
        hidden, heads = meant.get("model.hidden"), meant.get(f"{section}heads")
        if meant.get(f"{section}head_dim") is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
            meant[f"{section}head_dim"] = hidden // heads
    return meant
