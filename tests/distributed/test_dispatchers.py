"""Every dispatcher against the definition of a layer of experts, in real processes."""

from __future__ import annotations

import pytest
import torch
from journeys import ROUTINGS, WAYS, E, F, everything, together, whole


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    return together(everything, 4, tmp_path_factory.mktemp("everything"))


@pytest.mark.parametrize("routing,count", ROUTINGS)
@pytest.mark.parametrize("name", WAYS)
def test_computes_the_definition(found, name, routing, count):
    expected = whole(4, count, routing)
    _, _, ep, etp = WAYS[name]
    for chunks in (1, 3):
        fc1, fc2 = torch.zeros_like(expected["fc1"]), torch.zeros_like(expected["fc2"])
        for rank, every in enumerate(found):
            mine = every[name, chunks, routing, count]
            for key in ("out", "x", "weight"):
                torch.testing.assert_close(mine[key], expected[f"{key} {rank}"], rtol=1e-12, atol=1e-12)
            i, j = divmod(rank, etp)
            experts, inner = slice(i * E // ep, (i + 1) * E // ep), slice(j * F // etp, (j + 1) * F // etp)
            fc1[experts, :, :, inner], fc2[experts, inner] = mine["fc1"], mine["fc2"]
        torch.testing.assert_close(fc1, expected["fc1"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fc2, expected["fc2"], rtol=1e-12, atol=1e-12)
