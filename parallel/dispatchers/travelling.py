"""What all dispatchers of expert parallelism share: slices of experts, chunks, and work done meanwhile.

T tokens, A assignments, H hidden, R ranks of the group, E experts of which each rank holds E/ep, F inner size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.kernels.permute import Permutation, sort_by_expert
from moesys.moe.dispatch import Dispatcher, ExpertsFunction
from moesys.moe.routing import Routing
from moesys.parallel.comm import Pending, Way
from moesys.parallel.dispatchers.payload import Fp8Rows
from moesys.parallel.flight import Codec, Flight

Journey = Generator[None, None, Tensor]
"""The way of a chunk's tokens: it yields when something travels and others may use the time, and
returns the tokens' weighted sums [T, H]."""


class TravellingDispatcher(Dispatcher):
    """Sends tokens to the ranks that hold their experts.

    Args:
        experts: E of the layer.
        group: R = ep · etp ranks; rank i·etp + j holds slice j of the experts i·E/ep … (i+1)·E/ep − 1.
        ep, etp: how many ways the experts, and each expert's inner size, are split.
        chunks: pieces of the token stream; one travels while another is computed.
        overlap_shared: whether `meanwhile` is done while the first rows travel.
        payload: "model": rows travel in their own type; "fp8": those to experts as in `Fp8Rows`.

    An expert split `etp` ways along its inner size is the sum of `etp` smaller experts, so a row goes
    to each of them and the partial results are added where it came from: the numbers of a smaller
    expert need no collective of their own, and ranks may hold any number of rows, none included. A
    *place* is one slice of one expert: rank · E/ep + the expert's number on that rank.
    """

    def __init__(
        self,
        experts: int,
        group: dist.ProcessGroup,
        ep: int,
        etp: int,
        chunks: int = 1,
        overlap_shared: bool = True,
        payload: str = "model",
    ):
        super().__init__(experts)
        self.group, self.ep, self.etp = group, ep, etp
        self.chunks, self.overlap_shared, self.payload = chunks, overlap_shared, payload
        self.local = experts // ep
        self.places = ep * etp * self.local
        self.layer = ""
        """The name of the layer, for records of what travels."""

    def way(self, part: str, level: str = "flat") -> Way:
        """What rows of this layer travel for: "dispatch" or "combine"."""
        return Way(level, self.layer, part)

    travels = True

    # Sizes are known to the host only when counts have travelled: there is nothing to compile.
    @torch.compiler.disable
    def __call__(self, x_TH: Tensor, routing: Routing, experts: ExpertsFunction) -> Tensor:
        token_A, place_A, weight_A = self._slices(routing.token_A, routing.expert_A, routing.weight_A)
        return self._travel(self.journeys(x_TH, token_A, place_A, weight_A, self.chunks, experts, routing.rows))

    @torch.compiler.disable
    def run(self, rows_AH: Tensor, counts_E: Tensor, experts: ExpertsFunction, each: int | None = None) -> Tensor:
        row_A = torch.arange(len(rows_AH), device=rows_AH.device)
        expert = torch.arange(self.experts, device=rows_AH.device)
        expert_A = expert.repeat_interleave(counts_E, output_size=len(rows_AH))
        token_A, place_A, _ = self._slices(row_A, expert_A, None)
        return self._travel(self.journeys(rows_AH, token_A, place_A, None, 1, experts, each))

    @abstractmethod
    def journeys(
        self,
        x_TH: Tensor,
        token_A: Tensor,
        place_A: Tensor,
        weight_A: Tensor | None,
        chunks: int,
        experts: ExpertsFunction,
        each: int | None = None,
    ) -> list[Journey]:
        """One for each chunk of the tokens (`bounds`); `token_A` ascending, `weight_A` None for 1.

        Every count is exchanged before any row, so that the host waits for the device once. `each`: every rank has
        so many assignments for every place, where that is known.
        """

    def codec(self, like: Tensor) -> Codec | None:
        """How rows like [T, H] are written on their way to experts."""
        return Fp8Rows(like.shape[1], like.dtype) if self.payload == "fp8" else None

    def _slices(
        self, token_A: Tensor, expert_A: Tensor, weight_A: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Every assignment once per slice of its expert: tokens, places and weights."""
        if self.etp == 1:
            return token_A, expert_A, weight_A  # the place of an expert is its number
        slices = torch.arange(self.etp, device=expert_A.device) * self.local
        first = (expert_A // self.local) * (self.etp * self.local) + expert_A % self.local
        place_A = (first[:, None] + slices).flatten()
        weight_A = None if weight_A is None else weight_A[:, None].expand(-1, self.etp).flatten()
        return token_A.repeat_interleave(self.etp), place_A, weight_A

    def _travel(self, journeys: Sequence[Journey]) -> Tensor:
        """Take all journeys in turn, step by step, and do `meanwhile` after the first."""
        parts: dict[int, Tensor] = {}
        try:
            _step(journeys, parts)
            if self.overlap_shared and self.meanwhile is not None:
                self.meanwhile()
            while len(parts) < len(journeys):
                _step(journeys, parts)
        finally:
            # Recomputation in backward ends by an exception once it has what it needs.
            for journey in journeys:
                journey.close()
        return parts[0] if len(parts) == 1 else torch.cat([parts[i] for i in range(len(journeys))])


def _step(journeys: Sequence[Journey], parts: dict[int, Tensor]) -> None:
    for number, journey in enumerate(journeys):
        if number not in parts:
            try:
                next(journey)
            except StopIteration as arrived:
                parts[number] = arrived.value


def aloft(*flights: Flight | Pending | None) -> Generator[None, None, None]:
    """Yield while these are on their way."""
    try:
        yield
    except GeneratorExit:
        for flight in flights:
            if flight is not None:
                flight.abandon()
        raise


def bounds(tokens: int, chunks: int) -> list[int]:
    """Where each chunk of the tokens begins, and the end of the last."""
    return [tokens * i // chunks for i in range(chunks + 1)]


def chunk_of(token_A: Tensor, tokens: int, chunks: int) -> Tensor:
    """The chunk of each token, by `bounds`."""
    return ((token_A + 1) * chunks - 1) // max(1, tokens)


def compute(
    x_TH: Tensor, token_A: Tensor, expert_A: Tensor, weight_A: Tensor | None, local: int, experts: ExpertsFunction
) -> Tensor:
    """Each token's weighted sum over this rank's experts [T, H]; `token_A` ascending, `expert_A` < local."""
    p = sort_by_expert(token_A, expert_A, len(x_TH), local)
    return experts(x_TH, p.counts_E, None if weight_A is None else weight_A.index_select(0, p.order_A), p)


def cut(p: Permutation, tokens: list[int], rows: list[int]) -> list[Permutation]:
    """A permutation sorted by chunk, then expert, as one per chunk: `tokens` and `rows` are where they end, from 0."""
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
