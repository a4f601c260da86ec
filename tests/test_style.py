"""What the house promises of its sources, counted. That imports make no circle is in `test_structure`."""

from __future__ import annotations

from statistics import median, quantiles

import pytest
from style import FOLDERS, NAMED, SHAPE, SHAPELESS, Source, code_lines, source


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


def test_there_are_tests_enough(package):
    """Lines that run: a docstring needs no test."""
    tested, tests = (sum(code_lines(path.read_text()) for path in s.trees) for s in (package, source("tests")))
    assert tests / tested >= 0.7


def unannotated(package: Source) -> list[str]:
    return [f.place for f in package.functions if f.public and not f.annotated]


def silent(package: Source) -> list[str]:
    free = ("overload", "setter")
    return [f.place for f in package.functions if f.public and not package.said(f) and not any(map(f.marked, free))]


def shapeless(package: Source) -> list[str]:
    """Tensors without a shape in their name, as in `x_TH`, or in the docstrings that a reader has of the function."""
    found = []
    for f in package.functions:
        said = package.said(f)
        if f.public and not SHAPE.search(said) and not SHAPELESS.search(said):
            found += [f"{f.place}: {name}" for name in f.tensors if not NAMED.search(name)]
    return found


@pytest.mark.parametrize("missing", [unannotated, silent, shapeless])
def test_public_functions_are_annotated_and_documented(package, missing):
    assert not missing(package), "\n".join(missing(package))


TOY = '''
class Base:
    def told(self, x_TH: Tensor) -> None:
        """Say it."""

class Below(Base):
    def told(self, x_TH: Tensor) -> None: ...
    def untold(self, x): ...
    def _own(self, x): ...

def spread(x: Tensor, y: Tensor) -> Tensor:
    """The sum of x [T, H] and y."""

def secret(x: Tensor) -> Tensor:
    """The same."""
'''


def test_what_is_missing_is_found(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    package = source(".", root=tmp_path)
    assert unannotated(package) == ["toy.py:8 Below.untold"] == silent(package)
    assert shapeless(package) == ["toy.py:14 secret: x"]
    assert code_lines(TOY) == 8
