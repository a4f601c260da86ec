"""Initial values: a rank draws its slice alone, and it is the slice of what torch draws for the whole."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moesys.models.parts.axes import Axis, Weight
from moesys.parallel import jump, normals
from moesys.parallel.initialise import initial
from moesys.parallel.normals import Normals

SHAPES = [(1,), (15,), (16,), (17,), (31,), (1000,), (3, 5), (4, 4), (5, 7), (7, 16), (13, 33), (64, 48), (6, 5, 7)]


def splits(size: int) -> list[slice]:
    """Of a dim: all of it, even and uneven parts as FSDP and tp make them, an empty one."""
    parts = [slice(0, size), slice(0, 0), slice(size, size)]
    for ranks in (2, 3, 4):
        each = -(-size // ranks)
        parts += [slice(min(r * each, size), min((r + 1) * each, size)) for r in range(ranks)]
    return parts


@pytest.mark.parametrize("far, chunk", [(2**60, 2**20), (0, 2**20), (40, 50), (2**60, 1)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_part_is_the_slice_of_the_whole(shape, far, chunk, monkeypatch):
    monkeypatch.setattr(normals, "FAR", far)
    monkeypatch.setattr(normals, "CHUNK", chunk)
    drawn = Normals(shape, "7/layers.0.weight", 0.02)
    whole = drawn.whole()
    for slices in product(*(splits(size) for size in shape[:2])):
        part = drawn.part(slices)
        assert part.dtype == torch.float32 and torch.equal(part, whole[slices]), slices


def test_the_whole_is_what_it_always_was():
    found = Normals((40, 3), "1/embed.weight", 0.5).whole().flatten()[[0, 1, 119]]
    assert found.tolist() == pytest.approx(EMBED, abs=0), "golden losses hang on these"


EMBED = [0.4581378400325775, 0.753584623336792, 0.039245784282684326]


@pytest.mark.parametrize("words", [0, 1, 623, 624, 625, 19937, 5_000_011])
def test_a_jump_is_as_many_draws(words):
    found = []
    for move in (jump.advance, jump.draw):
        generator = torch.Generator().manual_seed(words)
        move(generator, words)
        found.append(torch.empty(2000).normal_(generator=generator))
    assert torch.equal(*found)


def test_a_generator_that_is_not_known_is_moved_by_drawing(monkeypatch):
    monkeypatch.setattr(jump, "works", lambda: False)
    monkeypatch.setattr(jump, "advance", None)
    monkeypatch.setattr(normals, "FAR", 0)
    drawn = Normals((50, 20), "key", 1.0)
    assert torch.equal(drawn.part((slice(30, 40),)), drawn.whole()[30:40])


class Made(TorchDispatchMode):
    """Counts random numbers, and the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.random = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.normal_, torch.ops.aten.uniform_):
            self.random += out.numel()
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("name, shape", [("embed.weight", (2**13, 2**11)), ("l.ffn.experts.fc1", (4, 2**13, 2**10))])
def test_a_rank_draws_what_it_holds(name, shape):
    """The last 32nd of the rows, and of the columns, of a weight."""
    assert jump.works()
    one = [slice(0, 1) for _ in shape[:-2]]
    rows = (*one, slice(shape[-2] * 31 // 32, shape[-2]), slice(0, shape[-1]))
    held = shape[-2] * shape[-1] // 32
    weight = Weight(
        name, tuple(Axis("expert" if len(shape) > 2 and not dim else "hidden", n) for dim, n in enumerate(shape))
    )
    with Made() as made:
        initial(weight, rows, 1, 0.02)
    assert made.random <= held + 16 and made.largest <= max(held, normals.CHUNK)
    columns = (*one, slice(0, shape[-2]), slice(0, shape[-1] // 32))
    with Made() as made:
        initial(weight, columns, 1, 0.02)
    assert made.largest <= max(held, normals.CHUNK), "rows go by in chunks"
