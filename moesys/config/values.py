"""A configuration from values of a program, checked as those of a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from moesys.config.schema import Config
from moesys.config.translate import problems_of
from moesys.config.tree import Entry
from moesys.errors import ConfigError


def config_of(values: Mapping[str, Any]) -> Config:
    """The configuration with these sections.

    Raises:
        ConfigError: keys that do not exist, or values that are illegal, all at once.
    """
    tree = _entry(values)
    try:
        return Config.model_validate(tree.plain())
    except ValidationError as error:
        raise ConfigError(problems_of(error, tree)) from None


def _entry(value: Any) -> Entry:
    """A value as if it had been read from a file."""
    if isinstance(value, Mapping):
        return Entry({str(key): _entry(item) for key, item in value.items()}, "")
    if isinstance(value, (list, tuple)):
        return Entry([_entry(item) for item in value], "")
    return Entry(value, "", str(value))
