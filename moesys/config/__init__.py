"""The YAML of a run: its schema and how it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesys.config.schema import Config as Config


def __getattr__(name: str) -> Any:
    """`Config`, which needs pydantic, when it is asked for: descriptions of parts are read without it."""
    if name == "Config":
        from moesys.config.schema import Config

        return Config
    raise AttributeError(name)
