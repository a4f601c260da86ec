"""What one rank holds and moves in one training step, in the terms that every dimension answers in.

Needs no torch: 4,096 ranks are planned on a laptop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from moesys.config.schema import Config
from moesys.models.parts.axes import Weight
from moesys.models.parts.model import Placed, parts
from moesys.models.size import frozen
from moesys.parallel.degrees import Degrees


@dataclass(frozen=True)
class Stage:
    """Stage `index` of `count`: these layers, with the embedding if first, norm and head if last.

    The last one also has the blocks of multi-token prediction, as its last layers.
    """

    index: int
    count: int
    layers: range

    @property
    def first(self) -> bool:
        """Whether the embedding is on it."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether the head is on it."""
        return self.index == self.count - 1

    def holds(self, weight: Weight, shared: bool) -> bool:
        """Whether a weight of the model lies on this stage; `shared`: the embedding lies on both ends."""
        if weight.layer is not None:
            return weight.layer in self.layers
        if weight.looked_up:
            return self.first or (shared and self.last)
        return self.last


@dataclass(frozen=True)
class Collective:
    """`calls` collectives per step over the group along `axes`.

    `bytes` is what one rank contributes to one call, its own part included (nccl-tests' S): the
    buffer of an all-reduce or all-to-all, the gathered size of an all-gather or reduce-scatter. `level`:
    "inter" nodes or "intra" a node, or "ends" of a pipeline, where a part of the group takes part at a time. `small`:
    it moves numbers beside the model's own (counts, names, statistics, sums of a step).
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    calls: int
    level: str = ""
    small: bool = False


def merged(moves: Iterable[Collective]) -> list[Collective]:
    """The same with one entry for all calls that are alike, in the order of the first of each."""
    calls: Counter[Collective] = Counter()
    for move in moves:
        calls[replace(move, calls=0)] += move.calls
    return [replace(move, calls=count) for move, count in calls.items()]


BUCKET_BYTES = 64 * 2**20
"""Most bytes of gradients that are summed together: messages stay large, copies bounded. A larger one is alone."""


def buckets(sizes: Iterable[float], most: float = BUCKET_BYTES) -> list[float]:
    """Sums of consecutive sizes in bytes, each at most `most` unless one alone is larger."""
    found: list[float] = []
    for size in sizes:
        if not found or found[-1] + size > most:
            found.append(0.0)
        found[-1] += size
    return found


def counting_passes(config: Config, dp: int) -> int:
    """Forward passes over the global batch before a step's own, which tell gates its load: 0 or 1.

    A balance loss over the global batch needs one, unless the step is one micro-batch per data rank.
    """
    moe, t = config.model.moe, config.train
    several = t.global_batch > dp * t.micro_batch
    return int(moe is not None and moe.global_balance_loss > 0 and several)


@dataclass(frozen=True)
class StepShape:
    """One training step as a rank of one pipeline stage sees it."""

    config: Config
    degrees: Degrees
    vocab_size: int
    stage: Stage
    model_shards: Callable[[Weight, Degrees], int]
    """Ways that all dimensions but data split a weight."""
    data_shards: Callable[[Weight, Degrees], int]
    """Ways that data parallelism splits what is left."""
    kept_rows: Callable[[StepShape], float]
    """Rows that the dispatcher leaves with the experts, per token of a rank."""
    stages: tuple[Stage, ...]
    """All stages of the rank."""

    @property
    def leads(self) -> bool:
        """Whether it is the rank's first stage, which answers for what a rank does once."""
        return self.stage == self.stages[0]

    @property
    def micro_batches(self) -> int:
        """Passes through the model per step."""
        t = self.config.train
        return t.global_batch // (self.degrees.dp * t.micro_batch)

    @property
    def sequence_tokens(self) -> int:
        """Tokens of one micro-batch, over the ranks that share it."""
        return self.config.train.micro_batch * self.config.train.seq_len

    @property
    def layers(self) -> int:
        """The number of its blocks."""
        return len(self.stage.layers)

    @property
    def forwards(self) -> int:
        """Forward passes per micro-batch, communication included: full recomputation repeats each."""
        return 1 + (self.config.train.recompute == "full") + self.counting

    @property
    def counting(self) -> int:
        """Forward passes over the global batch before those of the step."""
        return counting_passes(self.config, self.degrees.dp)

    @property
    def arrived_rows(self) -> float:
        """Rows that experts keep for backward because they travelled, per token of a rank."""
        return self.kept_rows(self)

    @property
    def width(self) -> int:
        """Bytes of one element of activations and communicated weights."""
        return 2 if self.config.train.dtype == "bfloat16" else 4

    def size(self, axes: tuple[str, ...]) -> int:
        """Ranks of the group along `axes`."""
        return prod(self.degrees.sizes(axes))

    def weights(self) -> list[Weight]:
        """Weights of the stage, in full."""
        return self._weights

    @cached_property
    def _weights(self) -> list[Weight]:
        return self._weights_of(self.stage)

    def _weights_of(self, stage: Stage) -> list[Weight]:
        shared = self.config.model.ends_share_embedding
        near = [placed for placed in self._model if placed.layer is None or placed.layer in stage.layers]
        return [w for placed in near for w in placed.weights() if stage.holds(w, shared)]

    @cached_property
    def _model(self) -> list[Placed]:
        return list(parts(self.config.model, self.vocab_size))

    @cached_property
    def rank_weights(self) -> list[list[Weight]]:
        """Weights of each stage of the rank, in full."""
        return [self._weights if stage == self.stage else self._weights_of(stage) for stage in self.stages]

    def trained(self, weight: Weight) -> bool:
        """Whether a weight has a gradient."""
        return not frozen(weight, self.config.train.freeze)

    def local(self, weight: Weight) -> float:
        """Elements of a weight on one rank, before data sharding."""
        return weight.numel / self.model_shards(weight, self.degrees)

    @cached_property
    def blocks(self) -> list[Placed]:
        """The parts of the stage's blocks."""
        return [placed for placed in self._model if placed.layer in self.stage.layers]

    @property
    def edges(self) -> list[Placed]:
        """The parts beside its blocks: the embedding on the first stage, the last norm and the head on the last.

        With multi-token prediction the last stage has the embedding, too.
        """
        whole = [placed for placed in self._model if placed.layer is None]
        reads = self.stage.first or (self.stage.last and self.config.model.predicted > 0)
        return whole[:1] * reads + whole[1:] * self.stage.last

    def held(
        self,
        routed: bool | None = None,
        layer: int | None = None,
        unsharded: bool = False,
        trained: bool = False,
        where: Callable[[Weight], bool] = lambda _: True,
    ) -> float:
        """Elements of weights on one rank, of all or of routed experts or others, of all layers or one.

        `unsharded`: before data sharding. `trained`: without those that are frozen. `where`: of which weights.
        """
        total = 0.0
        for weight in self.weights():
            if not where(weight) or (trained and frozen(weight, self.config.train.freeze)):
                continue
            if routed in (None, weight.routed) and layer in (None, weight.layer):
                ways = self.model_shards(weight, self.degrees)
                total += weight.numel / ways / (1 if unsharded else self.data_shards(weight, self.degrees))
        return total
