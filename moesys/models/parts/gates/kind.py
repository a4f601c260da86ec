"""The base of all descriptions of gates, and the sets of keys that several share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from moesys.config.registry import GATES, Described, kinds, used, users
from moesys.config.section import AtMost, Experts, Field, Fraction, Section, Seed
from moesys.errors import Problem
from moesys.models.parts.axes import Axis, Exchange, Kept, Weight

if TYPE_CHECKING:
    import torch

    from moesys.config.schema import MoEConfig
    from moesys.data.corpus import Corpus
    from moesys.moe.gates import Gate

ZERO = frozenset({"zero_experts", "copy_experts", "constant_experts", "zero_variant", "zero_tau"})
CAPACITY = frozenset({"eval_capacity_factor", "min_capacity", "drop", "pad_to_capacity"})
BALANCE = frozenset(
    {
        *("balance_loss", "sequence_balance_loss", "global_balance_loss", "balance_counts"),
        *("importance_loss", "load_loss", "bias_rate", "selection_bias"),
    }
)
WEIGHTS = frozenset({"normalize", "normalize_min", "scale"})
FIXED = frozenset({"capacity_factor"}) | CAPACITY | BALANCE | ZERO
NOT_LEARNED = frozenset({"z_loss"}) | FIXED | WEIGHTS


class ForceKeys(Section):
    """Routing by force, for benchmarks."""

    force: Literal["none", "balanced", "skewed"] = "none"
    """Replaces the choice of gates that send each token to top_k experts, for benchmarks, by the token's number.
    Weights stay the gate's own. none: the gate chooses. balanced: experts in turn. skewed: at random, expert e with a
    chance ∝ 1 / (e + 1)^skew."""
    skew: Annotated[float, Field(ge=0), AtMost(64)] = 1.0
    """Zipf's exponent of force skewed."""
    seed: Seed = 0
    """Where experts are drawn, as by force skewed: another seed chooses others."""


class RandomKeys(Section):
    """Randomness in training."""

    noise: Literal["none", "gaussian"] = "none"
    """In training add N(0, 1) times a learned width per expert to the logits (noisy
    top-k, Shazeer et al. 2017)."""
    jitter: Fraction = 0.0
    """In training multiply the gate's input by uniform numbers from 1 ± jitter (Switch)."""


class BiasKeys(Section):
    """A bias on the logits."""

    bias: bool = False
    """A learned bias on the logits (GPT-OSS)."""


class ChoiceKeys(RandomKeys, ForceKeys):
    """Token choice among scores, by groups."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """The function from logits to scores. The softmax over the selected logits alone (Mixtral, GPT-OSS)
    is softmax with normalize: true."""
    groups: Experts = 1
    """Equal groups of experts; each token uses the best `groups_kept` of them."""
    groups_kept: Experts = 1
    """Groups that a token uses."""
    group_score: Literal["max", "top2"] = "max"
    """A group's score is its best expert's (DeepSeek-V2) or the sum of its two best (DeepSeek-V3)."""
    second: Literal["always", "random"] = "always"
    """With model.moe.top_k 2. random: in training keep the second expert with probability min(1, 2·g), g its
    share of the two weights (GShard)."""


STEPS = dict.fromkeys(("jitter", "second", "path", "force", "skew"), "TRAINING")
SHAPES = dict.fromkeys(("bias", "noise", "dim", "slots"), "WEIGHTS")


@dataclass(frozen=True)
class GateKind(Described):
    """A kind of gate in an MoE layer.

    Attributes:
        moe: the section of the layer's keys.
        ignores: keys of `model.moe` about routing that it does not use.
        even: its experts all take part, or choose their tokens: balance means nothing there, or is given.
        counted: its tokens go to experts, as can be recorded and replayed; not so where experts get mixtures.
        seeded: it draws by `seed` without force.
        for_megatron: the plug-in for Megatron-Core takes it by `--moesys-gate`.
        whole: what it computes over, where parallelism must not split that: by axis, the reason.
        recorded: it routes the tokens of a recording, and no other text.
    """

    moe: MoEConfig
    ignores: ClassVar[frozenset[str]] = frozenset()
    even: ClassVar[bool] = False
    counted: ClassVar[bool] = True
    seeded: ClassVar[bool] = False
    for_megatron: ClassVar[bool] = False
    whole: ClassVar[Mapping[str, str]] = {}
    recorded: ClassVar[bool] = False
    decides = STEPS | SHAPES

    @property
    def candidates(self) -> int:
        """Experts that the gate can choose: routed ones, and those without computation."""
        return self.moe.experts + self.moe.zero_computation

    @property
    def choices(self) -> int:
        """Candidates that each row is sent to."""
        return self.moe.top_k

    @property
    def mean_choices(self) -> float:
        """Routed experts that compute for one row: k, or on average what balance leaves of it beside Z."""
        return self.choices * self.moe.experts / self.candidates

    @property
    def active(self) -> float:
        """Share of the routed experts' weights that one token uses."""
        return self.mean_choices / self.moe.experts

    @property
    def token_by_token(self) -> bool:
        """Whether evaluation routes a token by that token alone, beside what capacity drops.

        Otherwise its routing depends on other tokens of the micro-batch or the sequence: decoding cannot remember.
        """
        return True

    @property
    def weighted(self) -> bool:
        """Whether assignments have weights, which are sent to experts."""
        return self.counted

    @property
    def learned(self) -> bool:
        """Whether these weights have gradients."""
        return any(True for _ in self.weights(1))

    @property
    def even_rows(self) -> bool:
        """Whether all ranks send as many rows to each expert, which is known beforehand."""
        return False

    def assignments(self, tokens: int, ranks: int, seq_len: int) -> float:
        """Assignments of `tokens` of one rank to routed experts, where as many `ranks` share a micro-batch.

        On average, and before any is dropped.
        """
        return tokens * self.rows_per_token(seq_len) * self.mean_choices

    def rows_per_token(self, seq_len: int) -> float:
        """Rows per token of a sequence: a row is a token, unless experts get slots."""
        return 1.0

    def multiply_adds(self, weight: Weight, seq_len: int) -> float:
        """Multiply-adds per token and element of a matrix of the gate, or of the routed experts."""
        return self.rows_per_token(seq_len) * self.active if weight.routed else 1.0

    def flops(self, hidden: int) -> float:
        """FLOPs of one token's forward pass beside matrices."""
        return 0.0

    def weights(self, hidden: int) -> Iterator[Weight]:
        """Its parameters: one linear map from tokens to candidates."""
        yield Weight("projection.weight", (Axis("candidate", self.candidates), Axis("hidden", hidden)))

    def kept(self, hidden: int, shape: Any) -> Iterator[Kept]:
        """What it keeps for backward beside tokens and experts' rows; `shape`: a `moesys.parallel.cost.StepShape`."""
        yield Kept(4 * self.candidates, "tokens", width=4)
        yield Kept(self.candidates, "tokens", plain=False, selective=True, width=4)

    def exchanges(self, tokens: int, sequences: int) -> Iterator[Exchange]:
        """Collectives of one forward pass in training over `tokens` of `sequences`, the whole micro-batch."""
        yield from ()

    @property
    def step_statistics(self) -> int:
        """Numbers that all ranks of a stage sum once after a step."""
        return 0

    @property
    def first_statistics(self) -> int:
        """Numbers that they sum before a step, too, after a forward pass over the global batch."""
        return 0

    def check(self) -> list[Problem]:
        """Rules between its keys that are broken, beside those of all gates."""
        return []

    def check_files(self, layers: Sequence[int]) -> list[Problem]:
        """Faults of files that it reads, for a model with MoE blocks `layers`. A dry run does not ask."""
        return []

    def build(self, hidden: int, layer: int) -> Gate:
        """The gate of block `layer`, whose number makes random routing differ between layers."""
        raise NotImplementedError

    def prepare(self, gates: Mapping[int, Gate], corpus: Corpus, device: torch.device) -> None:
        """Give the built gates of this rank, by block, what they know of files and of the training data.

        Raises:
            DataError: a file is missing, or is not of this model.
        """


def experts_apart(shape: Any) -> bool:
    """Whether experts lie between the parts that selective recomputation repeats (`Block.parts`).

    So they do where rows travel, and where FSDP gathers experts as they are called. `shape`: as for `GateKind.kept`.
    """
    d = shape.degrees
    apart: bool = d.ep * d.etp * d.dp_shard > 1
    return apart


NUMBER, SCORE = 8, 4
"""Bytes of a token's number, and of a score."""


def gathered_scores(tokens: int, experts: int) -> Iterator[Exchange]:
    """All tokens' scores, and the numbers that order them."""
    yield Exchange("all_gather", SCORE * tokens * experts)
    yield Exchange("all_gather", NUMBER * tokens)


class BalancedAssignment(GateKind):
    """The base of gates that balance the assignment of all tokens of a micro-batch in training."""

    keys = ForceKeys
    for_megatron = True
    ignores = FIXED | WEIGHTS

    def exchanges(self, tokens: int, sequences: int) -> Iterator[Exchange]:
        """All tokens' scores, which are balanced together."""
        if self.moe.gate.force == "none":
            yield from gathered_scores(tokens, self.moe.experts)


def describe(moe: MoEConfig) -> GateKind:
    """The gate of an MoE layer."""
    made: GateKind = kinds(GATES)[moe.gate.kind](moe)
    return made


def unused(moe: MoEConfig) -> list[Problem]:
    """Keys of the gate, and of routing, that its kind does not use."""
    kind, problems = moe.gate.kind, []
    for key, info in type(moe.gate).model_fields.items():
        if key != "kind" and key not in used(GATES, kind) and getattr(moe.gate, key) != info.default:
            rule = f"gate {kind} does not use it; {', '.join(users(GATES, key))} do"
            problems.append(Problem(f"model.moe.gate.{key}", rule, "remove it, or choose another gate"))
    fields: dict[str, Any] = type(moe).model_fields
    for key in sorted(describe(moe).ignores):
        # A coefficient of 0 asks for nothing.
        if getattr(moe, key) not in (fields[key].default, 0):
            rule = f"gate {kind} does not use it"
            problems.append(Problem(f"model.moe.{key}", rule, "remove it, or choose another gate"))
    return problems
