"""Docstrings as the site shows them: they are plain text, in which "[layer][expert]" is no link."""

from __future__ import annotations

from typing import Any

import griffe


class PlainBrackets(griffe.Extension):
    """Escapes a bracket that follows another, in the docstring of every object."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute that it reads."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("][", "]\\[")
