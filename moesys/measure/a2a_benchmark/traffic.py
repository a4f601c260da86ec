"""Byte matrices of the benchmark: even, by Zipf's law, or from a file. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from moesys.errors import MoesysError
from moesys.words import plural

Matrix = list[list[int]]
"""[sender][receiver] bytes."""


class TrafficError(MoesysError):
    """A byte matrix cannot be read."""

    exit_code = 2


def even(ranks: int, size: int, grain: int) -> Matrix:
    """Each rank sends `size` bytes in equal parts of whole elements of `grain` bytes."""
    part = size // ranks // grain * grain
    return [[part] * ranks for _ in range(ranks)]


def zipf(ranks: int, size: int, grain: int, skew: float) -> Matrix:
    """Each rank sends `size` bytes, to rank r in proportion to 1 / (r + 1)^skew. All ranks overload the same rank."""
    weights = [1 / (rank + 1) ** skew for rank in range(ranks)]
    row = [int(size * weight / sum(weights)) // grain * grain for weight in weights]
    return [list(row) for _ in range(ranks)]


def scaled(matrix: Matrix, size: int, grain: int) -> Matrix:
    """The same pattern, with `size` bytes from the rank that sends most."""
    most = max(map(sum, matrix))
    return [[int(value * size / most) // grain * grain for value in row] for row in matrix]


def read(path: Path, ranks: int) -> Matrix:
    """The matrix in a text file: one line for each sender, with the bytes to each receiver.

    Blanks or commas separate numbers.

    Raises:
        TrafficError: it cannot be read, or is not of `ranks` × `ranks` numbers of at least 0, some of them above 0.
    """
    try:
        lines = [line.replace(",", " ").split() for line in path.read_text().splitlines()]
        matrix = [[int(word) for word in line] for line in lines if line and not line[0].startswith("#")]
    except OSError as error:
        raise TrafficError(f"--matrix {path}: {error.strerror}") from None
    except ValueError as error:
        raise TrafficError(f"--matrix {path}: {error}; write whole numbers of bytes") from None
    if len(matrix) != ranks or any(len(row) != ranks for row in matrix):
        shape = f"{plural(len(matrix), 'row')} of {sorted({len(row) for row in matrix})} numbers"
        raise TrafficError(f"--matrix {path} has {shape}, and the group has {ranks} ranks: write {ranks} × {ranks}")
    if min(map(min, matrix)) < 0 or max(map(max, matrix)) == 0:
        raise TrafficError(f"--matrix {path}: bytes must be at least 0, and some must be above 0")
    return matrix
