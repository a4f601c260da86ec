"""Helpers that tests import."""

from __future__ import annotations


def changed(base: dict, *changes: dict) -> dict:
    """A deep copy of `base` with nested `changes` laid over it."""
    result = {k: changed(v) if isinstance(v, dict) else v for k, v in base.items()}
    for change in changes:
        for key, value in change.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = changed(result[key], value) if both else value
    return result
