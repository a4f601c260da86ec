"""A model's weights out of a folder, a part of one at a time: each rank reads what it holds and nothing else.

source = ReleasedWeights(fit(folder, config.model, vocab_size))
source.read_into(part, "layers.0.ffn.experts.fc1", ((4, 8), (0, 64), (0, 2), (0, 32)))     # experts 4 to 7
"""

from __future__ import annotations

from math import prod

from torch import Tensor

from moesys.errors import FileError
from moesys.hub.fit import Fit
from moesys.hub.mapping import Box, Stored, meet, sizes
from moesys.hub.tensors import FolderTensors


class ReleasedWeights:
    """The weights of a released model, by our names."""

    def __init__(self, fit: Fit):
        self.fit = fit
        self.files = FolderTensors(fit.folder)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were asked of the files."""
        return self.files.bytes_read

    def read_into(self, out: Tensor, name: str, box: Box) -> None:
        """Write the part `box` of the weight `name` into `out`, of the part's shape [b − a, …] and any type.

        Beside `out` there is never more than a part of one tensor of the files.

        Raises:
            FileError: a file cannot be read.
        """
        filled = 0
        for s in self.fit.stored[name]:
            shared = meet(box, s.box)
            if shared is not None:
                place = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(shared, box, strict=True))
                # Turned over in the files' narrow type first: half the time of turning while widening.
                out[place].copy_(self._part(s, shared).contiguous())
                filled += prod(sizes(shared))
        if filled != out.numel():
            rule = f"{name} is filled in {filled:,} of {out.numel():,} elements by its files"
            raise FileError(f"{self.fit.folder.path}: {rule}")

    def _part(self, s: Stored, box: Box) -> Tensor:
        """The part of a weight that lies in one tensor, in the weight's order."""
        size, order = sizes(box), [d for run in s.dims for d in run]
        found = self.files.read(s.name, s.taken(box)).reshape([size[d] for d in order])
        return found.permute(sorted(range(len(order)), key=lambda place: order[place])).reshape(size)
