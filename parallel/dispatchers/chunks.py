"""Chunks of a micro-batch's tokens: consecutive, nearly equal, in the order of the tokens.

T tokens, A assignments.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from moesys.kernels.permute import Permutation


def chunk_bounds(tokens: int, chunks: int) -> list[int]:
    """First token of each chunk, and the end of the last: [chunks + 1]."""
    return [tokens * i // chunks for i in range(chunks + 1)]


def chunk_of(token_A: Tensor, tokens: int, chunks: int) -> Tensor:
    """The chunk of each token [A], by `chunk_bounds`."""
    return ((token_A + 1) * chunks - 1) // max(1, tokens)


def split_by_chunk(p: Permutation, tokens: list[int], rows: list[int]) -> list[Permutation]:
    """One permutation per chunk, of one sorted by chunk, then expert; `tokens`, `rows`: ends of the chunks, from 0."""
    if len(rows) == 2:
        return [p]
    counts = p.counts_E.view(len(rows) - 1, -1)
    return [
        Permutation(
            token_A=p.token_A[a:b] - t,
            row_A=p.row_A[a:b] - a,
            offsets_T1=p.offsets_T1[t : u + 1] - a,
            order_A=p.order_A[a:b] - a,
            counts_E=count,
        )
        for (t, u), (a, b), count in zip(pairwise(tokens), pairwise(rows), counts, strict=True)
    ]
