"""What the schema allows, in plain words."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from moesys.config.schema import AtMost, Config, Section

_NOUNS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
}
_PATTERNS = {
    r"^[A-Za-z0-9._-]+$": "letters, digits, dots, dashes and underscores",
    r"^[a-z][a-z0-9-]*$": "small letters, digits and dashes, as in the long options of sbatch, without their dashes",
    r"^[A-Za-z_][A-Za-z0-9_]*$": "letters, digits and underscores, the first no digit",
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "letters, digits, dots, dashes and underscores, the first a letter or digit",
}


def type_at(key: Sequence[str], root: type[Section] = Config) -> Any | None:
    """The annotation of a key, constraints included; None where the schema `root` has no such key."""
    kind: Any = root
    for name in key:
        section, names = section_of(kind), mapping_of(kind)
        if section is not None and name in section.model_fields:
            kind = annotation(section.model_fields[name])
        elif names is not None:
            kind = names
        else:
            return None
    return kind


def annotation(field: FieldInfo) -> Any:
    """The type of a field with its constraints, as it was written."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def alternatives(kind: Any) -> list[Any]:
    """The members of a union; the type itself where it is none."""
    if get_origin(kind) in (Union, types.UnionType):
        return [inner for member in get_args(kind) for inner in alternatives(member)]
    return [kind]


def section_of(kind: Any) -> type[Section] | None:
    """The section class that `kind` is, or may be."""
    return next((k for k in alternatives(kind) if isinstance(k, type) and issubclass(k, Section)), None)


def mapping_of(kind: Any) -> Any | None:
    """The type of the values, where `kind` is a mapping of free names."""
    return next((get_args(k)[1] for k in alternatives(kind) if get_origin(k) is dict), None)


def names_of(kind: Any) -> Any | None:
    """The type of the names, where `kind` is a mapping of free names."""
    return next((get_args(k)[0] for k in alternatives(kind) if get_origin(k) is dict), None)


def nullable(kind: Any) -> bool:
    """Whether null is legal."""
    return type(None) in alternatives(kind)


def choices(kind: Any) -> list[str]:
    """The words that are legal."""
    return [str(word) for k in alternatives(kind) if get_origin(k) is Literal for word in get_args(k)]


def accepts(kind: Any, scalar: type) -> bool:
    """Whether `scalar` (int, float, str, bool) is legal, constraints aside."""
    return any((get_args(k)[0] if get_origin(k) is Annotated else k) is scalar for k in alternatives(kind))


def limits(kind: Any) -> set[float]:
    """The upper bounds that `describe` does not name, of numbers that no real run comes near."""
    own = {rule.most for rule in _rules(kind) if isinstance(rule, AtMost)}
    return own.union(*(limits(inner) for inner in get_args(kind)))


def fits(kind: Any, number: float) -> bool:
    """Whether a number is within the bounds of `kind`."""
    for rule in _rules(kind):
        low, above = getattr(rule, "ge", None), getattr(rule, "gt", None)
        high = getattr(rule, "most", getattr(rule, "le", None))
        below = getattr(rule, "lt", None)
        if (low is not None and number < low) or (above is not None and number <= above):
            return False
        if (high is not None and number > high) or (below is not None and number >= below):
            return False
    return True


def _rules(kind: Any) -> list[Any]:
    """The constraints of an annotated type."""
    found = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return [rule for each in found for rule in (each.metadata if isinstance(each, FieldInfo) else [each])]


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if (inner := section_of(annotation(field))) is not None:
            yield from keys(inner, f"{prefix}{name}.")


def describe(kind: Any) -> str:
    """What is legal, to stand after "must be": "a whole number of at least 1, or auto"."""
    if words := choices(kind):
        others = [k for k in alternatives(kind) if get_origin(k) is not Literal]
        listed = " or ".join(words) if len(words) < 3 else f"one of {', '.join(words)}"
        return ", or ".join([*(describe(k) for k in others), listed])
    return ", or ".join(_describe(k) for k in alternatives(kind))


def _describe(kind: Any, plural: bool = False) -> str:
    rules = _rules(kind)
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if kind is type(None):
        return "null"
    if (section := section_of(kind)) is not None:
        return f"a section with the keys {', '.join(section.model_fields)}"
    if get_origin(kind) is list:
        return f"a list of {_describe(get_args(kind)[0], plural=True)}"
    if get_origin(kind) is tuple:
        members = get_args(kind)
        return f"a list of {len(members)} {_describe(members[0], plural=True)}"
    if get_origin(kind) is dict:
        return f"a mapping of names to {describe(get_args(kind)[1])}"
    return " ".join([_NOUNS[kind][plural], *_bounds(rules)])


def _bounds(rules: list[Any]) -> Iterator[str]:
    """Constraints in words: "of at least 0 and below 1"."""
    bound = {n: getattr(r, n) for r in rules for n in ("ge", "gt", "le", "lt") if getattr(r, n, None) is not None}
    if "ge" in bound and "le" in bound:
        yield f"from {bound['ge']} to {bound['le']}"
    else:
        words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
        yield from [" and ".join(f"{words[n]} {value}" for n, value in bound.items())] if bound else []
    for pattern in (p for r in rules if (p := getattr(r, "pattern", None))):
        yield f"of {_PATTERNS.get(pattern, f'the form {pattern}')}"
