"""Private names of other packages that the code uses are listed, each with what replaces it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "private-names.md"
FOLDERS = ("moesys", "parallel", "kernels", "launchers", "benchmarks")


def private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def used(source: str) -> set[str]:
    """Full names of other packages' private things that are imported or reached by attributes."""
    tree, known, found = ast.parse(source), dict[str, str](), set[str]()
    for node in ast.walk(tree):
        for name, full in _imported(node):
            known[name] = full
            if private(full):
                found.add(full)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (full := _chain(node, known)) is not None and private(full):
            found.add(full)
    longer = {name for name in found if any(other.startswith(name + ".") for other in found)}
    return found - longer


def _imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Names that an import binds, with what they stand for, of other packages alone."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            bound = alias.asname or alias.name.split(".")[0]
            yield bound, alias.name if alias.asname else bound
    elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] not in ("moesys", "__future__"):
        for alias in node.names:
            yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _chain(node: ast.expr, known: dict[str, str]) -> str | None:
    if isinstance(node, ast.Attribute):
        before = _chain(node.value, known)
        return None if before is None else f"{before}.{node.attr}"
    return known.get(node.id) if isinstance(node, ast.Name) else None


def test_every_private_name_is_listed_with_what_replaces_it():
    listed = re.findall(r"^\| `([^`]+)` \|[^|]+\|[^|]+\|$", PAGE.read_text(), re.M)
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if not _twice(path)]
    found = {name: path.relative_to(ROOT) for path in paths for name in used(path.read_text())}
    unlisted = {name: str(path) for name, path in found.items() if not any(_same(name, entry) for entry in listed)}
    assert len(found) > 10 and not unlisted, f"list these in {PAGE.name}, or use a public name"


def _twice(path: Path) -> bool:
    """Whether this is reached through one of the package's links to a folder of its own."""
    return path.parts[len(ROOT.parts)] == "moesys" and path.resolve() != path


def _same(name: str, entry: str) -> bool:
    return name == entry or name.startswith(entry + ".")


def test_what_is_private_is_seen():
    source = """
import torch, torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed import fake_pg
from ray import _private as inside
from moesys.parallel.comm import _start
torch._grouped_mm, torch.ops._c10d_functional.wait_tensor, dist.distributed_c10d._world, DTensor._spec
inside.worker, self._own, torch.__version__, _start
"""
    assert used(source) == {
        "torch._grouped_mm",
        "torch.ops._c10d_functional.wait_tensor",
        "torch.distributed.distributed_c10d._world",
        "torch.distributed.tensor.DTensor._spec",
        "torch.testing._internal.distributed.fake_pg",
        "ray._private.worker",
    }
