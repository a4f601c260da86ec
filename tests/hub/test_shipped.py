"""The shipped shapes of released models are what the families' files can say."""

from pathlib import Path

import pytest

from moesys.config.load import load
from moesys.hub.family import families

MODELS = Path(__file__).parents[2] / "configs" / "models"
KINDS = {
    "mixtral": "mixtral",
    "olmoe": "olmoe",
    "qwen3": "qwen3_moe",
    "deepseek-v2": "deepseek_v2",
    "deepseek-v3": "deepseek_v3",
    "gpt-oss": "gpt_oss",
}
"""Families by the beginning of a file's name."""


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_model_can_be_written_as_its_family(path: Path) -> None:
    family = families()[next(kind for start, kind in KINDS.items() if path.stem.startswith(start))]
    assert family.differences(load(path).config.model) == []
