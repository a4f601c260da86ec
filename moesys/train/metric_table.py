"""The metrics of a run: their keys in metrics.jsonl, and their names on boards and in Prometheus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesys.measure.report.facts import TEXTS


@dataclass(frozen=True)
class Metric:
    """One metric, or one of a family whose members differ by a label.

    Attributes:
        tag: on TensorBoard and Weights & Biases, its group first; "" if its curve is meaningless, and not shown.
        family: its name for Prometheus, with its base unit; counters are without `_total`; "" if it is not exported.
        help: its meaning in a sentence.
        label: a label and its value, if the family has one.
        kind: a gauge, or a counter, which never falls.
    """

    tag: str
    family: str
    help: str
    label: tuple[str, str] | None = None
    kind: Literal["gauge", "counter"] = "gauge"


_AUXILIARY = "Auxiliary loss of the MoE layers in the last step, without its coefficient; balance losses are 1 at best."
_PART = "Time of the last measured step by what it went into; the parts add up to the step."
_LATER = "Mean cross-entropy of multi-token prediction in the last step, per token that a depth predicts."
_TEXT_LOSS = "Mean cross-entropy per token of a held-out text at the last evaluation."
_TEXT_BITS = "Cross-entropy of a held-out text in bits per byte at the last evaluation."
_CAUSE = "Time of the last measured step in which ranks waited for rows of experts, by cause."


def _auxiliary(kind: str) -> Metric:
    return Metric(f"moe/{kind}_loss", "moesys_auxiliary_loss", _AUXILIARY, ("kind", kind))


METRICS: dict[str, Metric] = {
    "loss": Metric("loss/train", "moesys_loss_nats", "Mean cross-entropy per token of the last step's global batch."),
    "heldout_loss": Metric(
        "loss/heldout", "moesys_heldout_loss_nats", "Mean cross-entropy per held-out token at the last evaluation."
    ),
    "heldout_bits_per_byte": Metric(
        "loss/heldout_bits_per_byte",
        "moesys_heldout_bits_per_byte",
        "Held-out cross-entropy in bits per byte of text at the last evaluation.",
    ),
    "lr": Metric("optimizer/learning_rate", "moesys_learning_rate", "Learning rate of the last step."),
    "grad_norm": Metric(
        "optimizer/gradient_norm", "moesys_gradient_norm", "Global L2 norm of all gradients before clipping."
    ),
    "skipped": Metric(
        "optimizer/skipped_steps",
        "moesys_skipped_steps",
        "Steps that updated nothing because loss or gradients were not finite.",
        kind="counter",
    ),
    "step": Metric("", "moesys_steps", "Steps that are done.", kind="counter"),
    "steps": Metric("", "moesys_planned_steps", "Steps that the run will have at its end."),
    "tokens": Metric("", "moesys_tokens", "Tokens that were trained on.", kind="counter"),
    "time": Metric("", "moesys_last_step_timestamp_seconds", "When the last step ended, in seconds since 1970."),
    "eta_s": Metric("", "", "Estimated seconds left."),
    "step_seconds": Metric("time/step_seconds", "moesys_step_duration_seconds", "Duration of the last step."),
    "tokens_per_second": Metric(
        "time/tokens_per_second", "moesys_tokens_per_second", "Tokens of the last step over its duration."
    ),
    "imbalance": Metric(
        "moe/imbalance",
        "moesys_expert_imbalance",
        "Load of the fullest expert over the mean load, mean over layers; 1 is even.",
    ),
    "rank_imbalance": Metric(
        "moe/rank_imbalance",
        "moesys_rank_imbalance",
        "Load of the fullest expert-parallel rank over the mean load, mean over layers; 1 is even.",
    ),
    "dropped": Metric(
        "moe/dropped_share", "moesys_dropped_assignments_ratio", "Share of assignments that capacity dropped."
    ),
    "zero_share": Metric(
        "moe/zero_share",
        "moesys_zero_assignments_ratio",
        "Share of assignments that went to zero-computation experts.",
    ),
    "dead_experts": Metric("moe/dead_experts", "moesys_dead_experts", "Experts that get no tokens any more."),
    "collapsed_layers": Metric(
        "moe/collapsed_layers", "moesys_collapsed_layers", "Layers whose tokens all go to as few experts as they can."
    ),
    **{
        kind: _auxiliary(kind.removesuffix("_loss"))
        for kind in ("balance", "sequence_balance", "global_balance", "z", "importance", "load_loss", "cmr")
    },
    "all_to_all_share": Metric(
        "comm/all_to_all_share",
        "moesys_all_to_all_ratio",
        "Share of the last step in which ranks waited for rows on their way to experts and back.",
    ),
    "exposed_share": Metric(
        "comm/measured_exposed_share",
        "moesys_measured_exposed_ratio",
        "Share of the last measured step in which ranks waited for rows of experts and did nothing else.",
    ),
    "wait_share": Metric(
        "comm/measured_wait_share",
        "moesys_measured_wait_ratio",
        "Share of the exposed all-to-all of the last measured step in which ranks waited for other ranks to send.",
    ),
}
"""By key in metrics.jsonl."""

CAUSES, PARTS, LATER = "seconds/all-to-all ", "seconds/", "mtp_loss_"

LOAD = Metric(
    "moe/load",
    "moesys_expert_assignments",
    "Assignments of tokens to an expert in the last step, before any was dropped, by MoE layer.",
)
LAYER_IMBALANCE = Metric(
    "moe/layer_imbalance",
    "moesys_layer_imbalance",
    "Load of the layer's fullest expert over the mean load in the last step; 1 is even.",
)
INFO = Metric("", "moesys_run_info", "1, with what the run is as labels.")


def metric(key: str) -> Metric:
    """The metric of a key. A key that the table lacks is shown by its own name, and not exported to Prometheus."""
    if key.startswith(CAUSES):
        cause = key.removeprefix(CAUSES)
        return Metric(f"comm/waiting_{_word(cause)}_seconds", "moesys_waiting_seconds", _CAUSE, ("cause", cause))
    if key.startswith(PARTS):
        part = key.removeprefix(PARTS)
        return Metric(f"time/{_word(part)}_seconds", "moesys_step_part_seconds", _PART, ("part", part))
    if key.startswith(LATER):
        return Metric(f"loss/{key}", "moesys_mtp_loss_nats", _LATER, ("depth", key.removeprefix(LATER)))
    if key.startswith(TEXTS):
        name, _, figure = key.removeprefix(TEXTS).rpartition("/")
        bits = figure == "bits_per_byte"
        family = "moesys_eval_bits_per_byte" if bits else "moesys_eval_loss_nats"
        return Metric(f"eval/{name}_{figure}", family, _TEXT_BITS if bits else _TEXT_LOSS, ("text", name))
    return METRICS.get(key) or Metric(f"other/{key}", "", "")


def _word(text: str) -> str:
    return text.replace(" ", "_").replace("-", "_")


def families() -> dict[str, Metric]:
    """One metric of every family that is exported to Prometheus, by the family's name."""
    texts = (metric(f"{TEXTS}/{figure}") for figure in ("loss", "bits_per_byte"))
    every = (*METRICS.values(), metric(CAUSES), metric(PARTS), *texts, metric(LATER), LOAD, LAYER_IMBALANCE, INFO)
    return {m.family: m for m in every if m.family}
