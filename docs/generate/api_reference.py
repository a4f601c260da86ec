"""The reference of the library: what `import moesys` exports, and what of it lacks words."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

from pydantic import BaseModel

import moesys

PAGE = "reference/api.md"


def exported() -> dict[str, Any]:
    """Everything in `moesys.__all__`, by name."""
    return {name: getattr(moesys, name) for name in getattr(moesys, "__all__", ()) if not name.startswith("__")}


def path(name: str, thing: Any) -> str:
    """The place that defines a name: "moesys.moe.layer.MoELayer"; constants are known where they are exported."""
    if inspect.ismodule(thing):
        return thing.__name__
    if inspect.isclass(thing) or inspect.isroutine(thing):
        return f"{thing.__module__}.{thing.__qualname__}"
    return f"moesys.{name}"


def page() -> str:
    """A section for every exported name, filled in by mkdocstrings."""
    lines = ["# The library", "", _inside(moesys), "", "The [guide](../library.md) shows how they are used.", ""]
    for name, thing in exported().items():
        lines += [f"<span id='moesys.{name}'></span>", "", f"::: {path(name, thing)}", "    options:"]
        lines += [f"      heading: moesys.{name}", f"      toc_label: {name}", *_members(thing), ""]
    return "\n".join(lines)


def _members(thing: Any) -> list[str]:
    """The methods alone, for a section of the YAML: its keys have pages of their own."""
    if not (inspect.isclass(thing) and issubclass(thing, BaseModel)):
        return []
    return [f"      members: {[name for name in vars(thing) if _is_method(thing, name)]}"]


def _is_method(thing: type, name: str) -> bool:
    member = vars(thing)[name]
    return not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property))


def undocumented() -> list[str]:
    """Public names of the library without a docstring: what is exported, and the methods and properties of classes."""
    found = []
    for name, thing in exported().items():
        if (inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing)) and not _inside(thing):
            found.append(f"moesys.{name}")
        if inspect.isclass(thing):
            found += [f"moesys.{name}.{member}" for member in _undocumented_members(thing)]
    return found


def _undocumented_members(thing: type) -> Iterator[str]:
    for name in filter(partial(_is_method, thing), vars(thing)):
        if not inspect.getdoc(getattr(thing, name)):
            yield name


def _inside(thing: Any) -> str:
    """The docstring of the thing itself, not of what it inherits from."""
    return inspect.cleandoc(thing.__doc__ or "")
