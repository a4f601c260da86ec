"""What the house promises of its sources, counted. That imports make no circle is in `test_structure`."""

from __future__ import annotations

from statistics import median, quantiles

import pytest
from style import FOLDERS, NAMED, SHAPE, SHAPELESS, Source, source


@pytest.fixture(scope="module")
def package() -> Source:
    return source(*FOLDERS)


def test_files_are_short(package):
    long = [f"{path}: {lines} lines" for path, lines in package.lines.items() if lines > 500]
    assert not long
    assert median(package.lines.values()) <= 150


def test_functions_are_short(package):
    long = [f"{f.place}: {f.lines} lines" for f in package.functions if f.lines > 80]
    assert not long
    lines = [f.lines for f in package.functions]
    assert median(lines) <= 10 and quantiles(lines, n=10)[-1] <= 40


def test_public_functions_are_annotated(package):
    assert not [f.place for f in package.functions if f.public and not f.annotated]


def test_public_functions_are_documented(package):
    free = ("overload", "setter")
    silent = [f for f in package.functions if f.public and not package.said(f) and not any(map(f.marked, free))]
    assert not silent, "\n".join(f.place for f in silent)


def test_tensors_have_shapes(package):
    """In the name, as in `x_TH`, or in the docstring of the function, of what it overrides, or of its class."""
    shapeless = [
        f"{f.place}: {name}"
        for f in package.functions
        for name in f.tensors
        if f.public
        and not NAMED.search(name)
        and not (SHAPE.search(package.said(f)) or SHAPELESS.search(package.said(f)))
    ]
    assert not shapeless, "\n".join(shapeless)
