"""A family of released models: Mixtral's files under another name."""

from moesys.hub.families.mixtral import Mixtral


class ToyMoe(Mixtral):
    kind = "toy_moe"
    summary = "Mixtral by another name"
