"""The base class of the dispatchers of expert parallelism: slices of experts, chunks, and overlapped work.

T tokens, A assignments, H hidden, R ranks of the group, E experts of which each rank holds E/ep, F inner size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.kernels.permute import sort_by_expert
from moesys.moe.dispatch import Assignments, Dispatcher, ExpertsFunction
from moesys.parallel.async_collectives import AsyncCollective, Codec
from moesys.parallel.comm import Tag, Work
from moesys.parallel.dispatchers.payload import Fp8Rows

ChunkSteps = Generator[None, None, Tensor]
"""Dispatch, experts and combine of one chunk of tokens. It yields while its collectives run, so that others can use the
time, and returns the tokens' weighted sums [T, H]."""


@dataclass(eq=False, repr=False)
class ExpertParallelDispatcher(Dispatcher):
    """Sends tokens to the ranks that hold their experts.

    Args:
        experts: E of the layer.
        group: R = ep · etp ranks; rank i·etp + j holds slice j of the experts i·E/ep … (i+1)·E/ep − 1.
        ep, etp: how many ways the experts, and each expert's inner size, are split.
        chunks: pieces of the token stream; one is sent while another is computed.
        overlap_shared: whether `overlapped_work` runs while the first rows are sent.
        payload: "model": rows are sent in their own type; "fp8": those to experts as in `Fp8Rows`.

    An expert that is split `etp` ways along its inner size is the sum of `etp` smaller experts. So a row goes to each
    of them, and its source rank adds the partial results. Slices need no collective of their own, and ranks may hold
    any number of rows, none included. A *place* is one slice of one expert: rank · E/ep + the expert's number on that
    rank.
    """

    experts: int
    group: dist.ProcessGroup
    ep: int
    etp: int
    chunks: int = 1
    overlap_shared: bool = True
    payload: str = "model"

    def __post_init__(self) -> None:
        super().__init__(self.experts)
        self.local = self.experts // self.ep
        self.places = self.ep * self.etp * self.local
        self.layer = ""
        """Name of the layer, for the tags of its collectives."""

    def tag(self, part: str, level: str = "flat") -> Tag:
        """The tag of this layer's collectives; `part`: "dispatch" or "combine"."""
        return Tag(level, self.layer, part)

    communicates = True

    # The host knows the sizes only after the exchange of counts: there is nothing to compile.
    @torch.compiler.disable
    def __call__(self, x_TH: Tensor, routing: Assignments, experts: ExpertsFunction) -> Tensor:
        token_A, place_A, weight_A = self._slices(routing.token_A, routing.expert_A, routing.weight_A)
        return self._interleave(self.chunk_steps(x_TH, token_A, place_A, weight_A, self.chunks, experts, routing.rows))

    @torch.compiler.disable
    def run(self, rows_AH: Tensor, counts_E: Tensor, experts: ExpertsFunction, each: int | None = None) -> Tensor:
        row_A = torch.arange(len(rows_AH), device=rows_AH.device)
        expert = torch.arange(self.experts, device=rows_AH.device)
        expert_A = expert.repeat_interleave(counts_E, output_size=len(rows_AH))
        token_A, place_A, _ = self._slices(row_A, expert_A, None)
        return self._interleave(self.chunk_steps(rows_AH, token_A, place_A, None, 1, experts, each))

    @abstractmethod
    def chunk_steps(
        self,
        x_TH: Tensor,
        token_A: Tensor,
        place_A: Tensor,
        weight_A: Tensor | None,
        chunks: int,
        experts: ExpertsFunction,
        each: int | None = None,
    ) -> list[ChunkSteps]:
        """The steps of each chunk of the tokens (`chunk_bounds`); `token_A` ascending, `weight_A` None for 1.

        Every count is exchanged before any row, so that the host waits for the device once. `each`: how many
        assignments every rank has for every place; None where that is not known.
        """

    def codec(self, like: Tensor) -> Codec | None:
        """The encoding of rows like `like` [T, H] that are sent to experts; None: as they are."""
        return Fp8Rows(like.shape[1], like.dtype) if self.payload == "fp8" else None

    def _slices(
        self, token_A: Tensor, expert_A: Tensor, weight_A: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens, places and weights of every assignment, once per slice of its expert."""
        if self.etp == 1:
            return token_A, expert_A, weight_A  # the place of an expert is its number
        slices = torch.arange(self.etp, device=expert_A.device) * self.local
        first = (expert_A // self.local) * (self.etp * self.local) + expert_A % self.local
        place_A = (first[:, None] + slices).flatten()
        weight_A = None if weight_A is None else weight_A[:, None].expand(-1, self.etp).flatten()
        return token_A.repeat_interleave(self.etp), place_A, weight_A

    def _interleave(self, chunks: Sequence[ChunkSteps]) -> Tensor:
        """Run all chunks in turn, step by step, and `overlapped_work` after the first step."""
        parts: dict[int, Tensor] = {}
        try:
            _step(chunks, parts)
            if self.overlap_shared and self.overlapped_work is not None:
                self.overlapped_work()
            while len(parts) < len(chunks):
                _step(chunks, parts)
        finally:
            # Recomputation in backward ends by an exception once it has what it needs.
            for steps in chunks:
                steps.close()
        return parts[0] if len(parts) == 1 else torch.cat([parts[i] for i in range(len(chunks))])


def _step(chunks: Sequence[ChunkSteps], parts: dict[int, Tensor]) -> None:
    """Advance every chunk by one step, and keep the results of those that end in `parts`."""
    for number, steps in enumerate(chunks):
        if number not in parts:
            try:
                next(steps)
            except StopIteration as end:
                parts[number] = end.value


def in_progress(*collectives: AsyncCollective | Work | None) -> Generator[None, None, None]:
    """Yield while these collectives run, and discard their results where the chunk is closed."""
    try:
        yield
    except GeneratorExit:
        for collective in collectives:
            if collective is not None:
                collective.discard()
        raise


def compute_experts(
    x_TH: Tensor, token_A: Tensor, expert_A: Tensor, weight_A: Tensor | None, local: int, experts: ExpertsFunction
) -> Tensor:
    """Each token's weighted sum over this rank's experts [T, H]; `token_A` ascending, `expert_A` < local."""
    p = sort_by_expert(token_A, expert_A, len(x_TH), local)
    return experts(x_TH, p.counts_E, None if weight_A is None else weight_A.index_select(0, p.order_A), p)
