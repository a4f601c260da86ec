"""What the sources are like, counted from their syntax trees: sizes, annotations, docstrings, shapes of tensors."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("moesys", "parallel", "kernels", "launchers", "benchmarks")

SHAPE = re.compile(r"\[[^\]]*\]")
"""In a docstring: [T, H]."""

NAMED = re.compile(r"_[A-Z][A-Za-z0-9]*$")
"""Of a name: x_TH has its shape."""

SHAPELESS = re.compile(r"scalar|any shape|one number|of no dimension|same shape|shape of|elementwise|anything")
"""In a docstring, where a tensor's shape is none, or any."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Function:
    """A function or method, and the class and file that it is in."""

    path: Path
    node: ast.FunctionDef | ast.AsyncFunctionDef
    owner: ast.ClassDef | None
    public: bool

    @property
    def place(self) -> str:
        """ "parallel/mesh.py:91 ParallelMesh.group"."""
        name = f"{self.owner.name}.{self.node.name}" if self.owner else self.node.name
        path = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path.name
        return f"{path}:{self.node.lineno} {name}"

    @property
    def lines(self) -> int:
        """From `def` to its end."""
        assert self.node.end_lineno is not None
        return self.node.end_lineno - self.node.lineno + 1

    @cached_property
    def arguments(self) -> list[ast.arg]:
        """All but self or cls."""
        a = self.node.args
        first = 1 if self.owner and not self.marked("staticmethod") else 0
        given = [*a.posonlyargs, *a.args][first:] + a.kwonlyargs
        return given + [argument for argument in (a.vararg, a.kwarg) if argument]

    def marked(self, decorator: str) -> bool:
        """Whether it has this decorator, as in `@overload` or `@x.setter`."""
        return any(ast.unparse(d).split(".")[-1] == decorator for d in self.node.decorator_list)

    @property
    def annotated(self) -> bool:
        """Whether all arguments have types, and what it returns has one."""
        returns = self.node.returns is not None or self.node.name == "__init__"
        return returns and all(argument.annotation for argument in self.arguments)

    @property
    def tensors(self) -> list[str]:
        """Names of the arguments that are tensors."""
        return [
            a.arg for a in self.arguments if a.annotation and ast.unparse(a.annotation) in ("Tensor", "torch.Tensor")
        ]


@dataclass(frozen=True)
class Source:
    """All modules of some folders."""

    trees: dict[Path, ast.Module]

    @cached_property
    def lines(self) -> dict[Path, int]:
        """Of each file."""
        return {path: len(path.read_text().splitlines()) for path in self.trees}

    @cached_property
    def functions(self) -> list[Function]:
        """All, nested ones too."""
        return [f for path, tree in self.trees.items() for f in _functions(path, tree, None, True)]

    @cached_property
    def classes(self) -> dict[str, list[ast.ClassDef]]:
        """By name."""
        found: dict[str, list[ast.ClassDef]] = {}
        for tree in self.trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, []).append(node)
        return found

    def said(self, function: Function) -> str:
        """The docstrings that a reader has of it: its own or, of a method, that of what it overrides; a module's
        `forward` and `__init__` may be told by the class."""
        own = ast.get_docstring(function.node) or ""
        if function.owner is None:
            return own
        inherited = "" if own else self._inherited(function.owner, function.node.name)
        told = function.node.name in ("forward", "__init__", "__call__")
        return own + inherited + (ast.get_docstring(function.owner) or "" if told else "")

    def _inherited(self, owner: ast.ClassDef, method: str) -> str:
        for base in (ast.unparse(base).split("[")[0].split(".")[-1] for base in owner.bases):
            for parent in self.classes.get(base, []) if base != owner.name else []:
                found = next((n for n in parent.body if getattr(n, "name", "") == method), None)
                text = ast.get_docstring(found) if isinstance(found, ast.FunctionDef) else ""  # type: ignore[assignment]
                if text or (text := self._inherited(parent, method)):
                    return text
        return ""


def source(*folders: str, root: Path = ROOT) -> Source:
    """All modules of these folders, each once: links inside the package are not followed."""
    paths = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    return Source({path: ast.parse(path.read_text()) for path in paths if path.resolve() == path})


def _functions(path: Path, node: ast.AST, owner: ast.ClassDef | None, public: bool) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        named = public and not (getattr(child, "name", None) or "_").startswith("_")
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Function(path, child, owner, named)
            yield from _functions(path, child, None, False)
        elif isinstance(child, ast.ClassDef):
            yield from _functions(path, child, child, named)
        else:
            yield from _functions(path, child, owner, public)


def code_lines(text: str) -> int:
    """Lines of a module that run: neither blank, nor comments, nor docstrings."""
    told: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            told.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    words = (word for word in tokenize.generate_tokens(io.StringIO(text).readline) if word.type not in silent)
    return len({line for word in words for line in range(word.start[0], word.end[0] + 1)} - told)
