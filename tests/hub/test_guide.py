"""The table of families in the guide is that of the classes."""

import re
from pathlib import Path

from moesys.hub.family import families

GUIDE = Path(__file__).parents[2] / "docs" / "weights.md"


def test_the_guide_names_every_family_and_its_models() -> None:
    table = GUIDE.read_text().split("|---|---|---|---|\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    said = {tuple(re.findall(r"`(\w+)`", kinds)): models.split(", ") for _, kinds, models, _ in rows}
    every = {family.kind: family for family in families().values()}
    assert said == {(kind, *family.also): list(family.released) for kind, family in every.items()}
