"""The link model of a cluster: a latency and a bandwidth for each kind of link. Needs no torch.

The model is Hockney's (α–β, Parallel Computing 20, 1994): seconds = α + bytes / β. `moesys bench a2a
--profile FILE` fits it and writes the profile that predictions read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from moesys.errors import MoesysError
from moesys.files import write_whole
from moesys.measure.explain.link_load import limits


class ProfileError(MoesysError):
    """A file is no cluster profile, or lacks a link that is needed."""

    exit_code = 2


@dataclass(frozen=True)
class LinkModel:
    """seconds = alpha + bytes · per_byte.

    Attributes:
        error: median over the points of |fitted − measured| / measured.
        worst: the largest such error.
        smallest, largest: bytes of the points. Beyond them the model extrapolates.
    """

    alpha: float
    per_byte: float
    error: float
    worst: float
    smallest: float
    largest: float

    def seconds(self, size: float) -> float:
        """Seconds for `size` bytes; 0 for none."""
        return self.alpha + size * self.per_byte if size > 0 else 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes per second of very large messages."""
        return 1 / self.per_byte if self.per_byte > 0 else float("inf")

    def faster(self, factor: float) -> LinkModel:
        """The same latency with `factor` times the bandwidth."""
        return LinkModel(self.alpha, self.per_byte / factor, self.error, self.worst, self.smallest, self.largest)


def fit(points: Sequence[tuple[float, float]]) -> LinkModel:
    """The link model with the least Σ (relative error)² over points (bytes, seconds), all above 0.

    The weight 1 / seconds lets a microsecond of a small message count as much as a millisecond of a large one. Latency
    and
    bandwidth are never negative.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("there is nothing to fit")
    # With u = 1/t and v = b/t: least Σ (α·u + p·v − 1)².
    rows = [(1 / t, b / t) for b, t in points]
    uu, uv, vv = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    su, sv = sum(u for u, _ in rows), sum(v for _, v in rows)
    determinant = uu * vv - uv * uv
    alpha, per_byte = 0.0, sv / vv if vv > 0 else 0.0
    if len({b for b, _ in points}) > 1 and determinant > 0:
        alpha, per_byte = (su * vv - sv * uv) / determinant, (sv * uu - su * uv) / determinant
    if alpha < 0:
        alpha, per_byte = 0.0, sv / vv
    if per_byte < 0:
        alpha, per_byte = su / uu, 0.0
    errors = [abs(alpha + b * per_byte - t) / t for b, t in points]
    sizes = [b for b, _ in points]
    return LinkModel(alpha, per_byte, median(errors), max(errors), min(sizes), max(sizes))


@dataclass(frozen=True)
class Profile:
    """The links of a cluster.

    Attributes:
        lines: models by "collective group": "all_to_all intra" a node, "all_to_all inter" nodes (all ranks of a node at
            once), "all_reduce world", …. Bytes are those that a rank contributes. For all-to-all and send_recv they are
            the
            limiting ones: of a rank to others inside its node, or of a *node* to others.
        facts: place and time of the measurement.
    """

    lines: Mapping[str, LinkModel]
    facts: Mapping[str, Any]

    def exchange(self, sent: Sequence[Sequence[float]], nodes: Sequence[object]) -> float:
        """Seconds of an all-to-all in which rank i sends `sent[i][j]` bytes to rank j on node `nodes[j]`.

        The slower one counts: the busiest rank inside its node, or the busiest node to and from others.

        Raises:
            ProfileError: bytes use a link that was not measured.
        """
        return self.seconds(*limits(sent, nodes))

    def seconds(self, inside: float, between: float) -> float:
        """`exchange` from its limits: bytes of the busiest rank inside its node, and of the busiest node."""
        within = self._line("all_to_all intra").seconds(inside) if inside else 0.0
        return max(within, self._line("all_to_all inter").seconds(between) if between else 0.0)

    def collective(self, kind: str, size: float, nodes: Sequence[object]) -> float:
        """Seconds of another collective, to which each rank of a group on `nodes` contributes `size` bytes."""
        several = len(set(nodes))
        group = "intra" if several == 1 else "inter" if several == len(nodes) else "world"
        return self._line(f"{kind} {group}").seconds(size)

    def faster(self, factor: float) -> Profile:
        """The profile with `factor` times the bandwidth between nodes, or of the only kind of link."""
        several = any(name.endswith(" inter") for name in self.lines)
        slow = {name: not several or not name.endswith(" intra") for name in self.lines}
        return Profile(
            {name: line.faster(factor) if slow[name] else line for name, line in self.lines.items()}, self.facts
        )

    def _line(self, name: str) -> LinkModel:
        if name not in self.lines:
            known = ", ".join(self.lines) or "nothing"
            raise ProfileError(f"the cluster profile has no {name!r} (it has {known}); measure it: moesys bench a2a")
        line = self.lines[name]
        if line.per_byte <= 0:
            raise ProfileError(
                f"the cluster profile has no bandwidth of {name!r} (β = ∞): up to {line.largest:,.0f} bytes took no "
                f"longer than {line.smallest:,.0f}\n    remedy: measure larger messages: moesys bench a2a --max 64M"
            )
        return line

    def save(self, path: Path) -> None:
        """Write YAML, all of it or nothing."""
        text = yaml.safe_dump(
            {**self.facts, "lines": {name: asdict(line) for name, line in self.lines.items()}}, sort_keys=False
        )
        write_whole(path, "# Links of a cluster, from `moesys bench a2a --profile`: seconds, bytes.\n" + text)

    @classmethod
    def load(cls, path: Path) -> Profile:
        """The inverse of `save`.

        Raises:
            ProfileError: there is no such file, or it is no profile.
        """
        remedy = f"write one: moesys bench a2a CONFIG --profile {path}"
        try:
            facts = yaml.safe_load(path.read_bytes())
            lines = {str(name): LinkModel(**_numbers(line)) for name, line in facts.pop("lines").items()}
        except (OSError, RecursionError) as error:
            why = getattr(error, "strerror", None) or "is nested too deeply"
            raise ProfileError(f"measure.profile: {path}: {why}\n    remedy: {remedy}") from None
        except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
            detail = f" ({error})" if isinstance(error, ValueError) else ""
            raise ProfileError(f"{path} is no cluster profile{detail}\n    remedy: {remedy}") from None
        return cls(lines, facts)


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a line. Raises ValueError for negative or infinite ones."""
    found = {key: float(value) for key, value in line.items()}
    for key, value in found.items():
        if not (isfinite(value) and value >= 0):
            raise ValueError(f"{key} is {value:g}: it must be a number of at least 0")
    return found
