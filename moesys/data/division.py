"""Divides documents into training and held-out ones.

A document is held out if a hash of its name, or of its number in a token file, falls below the share. So adding
documents to a corpus moves none of the others, and neither the seed nor the order of files matters.

The hash cannot meet the share with few documents, or very different sizes. If it gives either side less than a quarter
of its share of the corpus, the end of the corpus is held out instead: from the document boundary nearest to the share
if that leaves both sides a quarter of theirs, else (with a single file, for example) from the exact share, inside a
document.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

ENOUGH = 0.25
"""Part of its share that either side must get from a division between documents."""


@dataclass(frozen=True)
class Division:
    """Documents for training and held-out documents.

    `heldout`: bool [documents]. `cut`: if positive, the first `cut` units of the first held-out document
    belong to training.
    """

    heldout: np.ndarray
    cut: int = 0

    @property
    def first(self) -> int:
        """The first held-out document."""
        return int(self.heldout.argmax())

    def cut_of(self, document: int) -> int:
        """Units at the beginning of a held-out document that belong to training."""
        return self.cut if document == self.first else 0

    def totals(self, sizes: np.ndarray) -> tuple[int, int]:
        """Units for training and units held out."""
        heldout = int(sizes[self.heldout].sum()) - self.cut
        return int(sizes.sum()) - heldout, heldout


def hashed_names(names: Iterable[str], share: float) -> np.ndarray:
    """True for each name with a hash below `share`: bool [names]."""
    digests = (blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest() for name in names)
    return np.fromiter((int.from_bytes(d, "big") < share * 2**64 for d in digests), bool)


def hashed_numbers(count: int, share: float) -> np.ndarray:
    """True for each number 0 … count - 1 with a hash below `share`: bool [count].

    SplitMix64 (Steele et al. 2014): token files have too many documents for a cryptographic hash.
    """
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) < np.uint64(int(share * 2**64))


def divide(sizes: np.ndarray, hashed: np.ndarray, share: float) -> Division:
    """Divide documents by the rule above.

    Args:
        sizes: int64 [documents], bytes or tokens.
        hashed: bool [documents], those that the hash holds out.
        share: of the corpus to hold out, between 0 and 1.
    """
    total = int(sizes.sum())
    least, most = ENOUGH * share * total, total - ENOUGH * (1 - share) * total
    if 0 < sizes[hashed].sum() < total and least <= sizes[hashed].sum() <= most:
        return Division(hashed)
    ends = np.cumsum(sizes)
    target = round((1 - share) * total)
    boundary = int(ends[np.abs(ends - target).argmin()]) if total else 0
    if 0 < boundary < total and least <= total - boundary <= most:
        return Division(ends > boundary)
    target = min(max(target, 1), total - 1)
    heldout = ends > target
    before = int(ends[~heldout][-1]) if not heldout.all() else 0
    return Division(heldout, target - before)
