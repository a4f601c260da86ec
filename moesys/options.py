"""Types of command-line options: a wrong value ends in a message before anything starts."""

from __future__ import annotations

import argparse
import os
from math import isfinite
from pathlib import Path


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.isdigit() and len(text) <= 15) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def tolerance(text: str) -> float:
    """A finite number of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 0")
    return number


def seed(text: str) -> int:
    """A whole number of at least 0."""
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 0")
    return int(text)


def share(text: str) -> float:
    """A number above 0, at most 1."""
    number = tolerance(text) if text[:1] != "-" else 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0, at most 1")
    return number


def finite(text: str) -> float:
    """A finite number."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} must be a finite number")
    return number


def output(text: str) -> Path:
    """The path of a file that can be written: results of minutes must not be lost because a folder is missing."""
    path = Path(text)
    if "\0" in text or len(path.name) > 255:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}… cannot be the name of a file")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: give a file in it")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}: make it first")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: permission denied")
    return path
