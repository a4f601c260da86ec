"""The way to `benchmarks`: comparisons with other systems, which a checkout of the repository has and a wheel has not.

Commands that compare are of this package; what they run is looked for when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from moesys import shipped
from moesys.errors import MoesysError

PACKAGE = "moesys.benchmarks"


class NoComparisonError(MoesysError):
    """A comparison cannot be run with this installation."""

    exit_code = 2


def found(name: str) -> ModuleType | None:
    """The module `name` of the benchmarks; None where this installation has none of them."""
    try:
        import_module(PACKAGE)
    except ModuleNotFoundError as error:
        if error.name != PACKAGE:
            raise
        return None
    return import_module(f"{PACKAGE}.{name}")


def demanded(name: str, command: str) -> ModuleType:
    """The module `name` of the benchmarks, which `command` ("bench train") runs.

    Raises:
        NoComparisonError: this installation has none of them.
    """
    module = found(name)
    if module is None:
        raise NoComparisonError(
            f"{command} compares with another system; comparisons come with the repository alone, and the package "
            f"in {shipped.FOLDER} was installed without them\n"
            f"    remedy: in a checkout of the repository: pip install --editable ., then moesys {command}"
        )
    return module


def other_system(module: str, command: str) -> ModuleType:
    """The module of another system that `command` compares with.

    Raises:
        NoComparisonError: it is not installed.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        remedy = f"pip install {package}"
        raise NoComparisonError(
            f"{command} compares with {package}, which is not installed\n    remedy: {remedy}"
        ) from None
