"""The section of the YAML that describes MoE layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from moesys.config.registry import GATES, kinds, section
from moesys.config.section import (
    AtMost,
    Dim,
    Experts,
    Factor,
    FewExperts,
    Layers,
    NonNegativeFloat,
    PositiveFloat,
    Section,
)

if TYPE_CHECKING:
    GateConfig: TypeAlias = Any
else:
    GateConfig = section(GATES, "top_k", "GateConfig")


class MoEConfig(Section):
    experts: Experts
    """Routed experts per MoE layer."""
    top_k: Experts = 2
    """Experts that each token is sent to."""
    ffn_hidden: Dim
    """Inner size of one expert."""
    activation: Literal["swiglu", "geglu", "clipped_swiglu", "gelu", "relu", "relu2"] = "swiglu"
    """Activation of the experts: gated (swiglu, geglu, GPT-OSS's clipped_swiglu) or not (gelu, relu, relu2: squared
    ReLU)."""
    bias: bool = False
    """Biases on the experts' two products."""
    gate: GateConfig = GateConfig()
    every: Layers = 1
    """Of the layers after `first_dense`, every n-th is MoE (the n-th, 2n-th, …)."""
    first_dense: Annotated[int, Field(ge=0), AtMost(1024)] = 0
    """The first layers that are dense."""
    normalize: bool = True
    """Divide the chosen experts' probabilities by their sum (Mixtral, Qwen3) or leave them (OLMoE)."""
    normalize_min: NonNegativeFloat = 0.0
    """With normalize: the least sum that they are divided by (ERNIE-4.5: moe_norm_min)."""
    scale: PositiveFloat = 1.0
    """Factor on the routing weights (DeepSeek's routed_scaling_factor)."""
    capacity_factor: Factor | None = None
    """C = ceil(capacity_factor · T · k / E) tokens per expert and micro-batch; null: dropless."""
    eval_capacity_factor: Factor | None = None
    """The same in evaluation; default: capacity_factor. E / k drops nothing."""
    min_capacity: Annotated[int, Field(ge=0), AtMost(2**24)] = 0
    """Smallest C, if there is a capacity_factor."""
    drop: Literal["weight", "position", "choice", "priority"] = "weight"
    """Assignments that a full expert drops. weight: those of lowest weight. position: the latest in the micro-batch.
    choice: last choices before first ones, then the latest (GShard, Switch). priority: last choices before first ones,
    then tokens whose best score is lowest (V-MoE)."""
    pad_to_capacity: bool = False
    """Give every expert exactly C rows of each device, with fillers: no shape depends on the data."""
    balance_loss: NonNegativeFloat = 0.01
    """Coefficient α of the load-balancing loss α · E · Σ f_e · P_e over a micro-batch (GShard, Switch)."""
    sequence_balance_loss: NonNegativeFloat = 0.0
    """Coefficient of the same over each sequence, averaged over sequences (DeepSeek-V2, DeepSeek-V3)."""
    global_balance_loss: NonNegativeFloat = 0.0
    """Coefficient of the same over the global batch (Qwen3), all ranks and all micro-batches. With several
    micro-batches per step it costs a forward pass more: f_e must be known before the first backward."""
    balance_counts: Literal["chosen", "scores", "first"] = "chosen"
    """Assignments that count in the shares f_e of these three losses. chosen: each token's top_k experts, selection
    bias and groups included, before drops. scores: its top_k largest scores, without bias and groups (DeepSeek-V3,
    Megatron-Core). first: its first choice alone (GShard, DeepSpeed)."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient β of the router z-loss β · mean(logsumexp²) (ST-MoE)."""
    importance_loss: NonNegativeFloat = 0.0
    """Coefficient of CV² of the experts' summed weights in a micro-batch (Shazeer et al. 2017)."""
    load_loss: NonNegativeFloat = 0.0
    """Coefficient of CV² of the experts' smooth load in a micro-batch (Shazeer et al. 2017); needs gate.noise."""
    bias_rate: NonNegativeFloat = 0.0
    """Rate u of loss-free balancing (DeepSeek-V3: 0.001): a bias per expert, for selection only, grows after each
    step by u · sign(mean load − load), loads of the global batch; 0: no bias, or one that stays as it is."""
    selection_bias: bool = False
    """A bias per expert, for selection only, although bias_rate is 0: that of the weights that a run starts from, which
    then stays as it is. A bias_rate above 0 has one anyway."""
    zero_experts: FewExperts = 0
    """Experts beside `experts` that give zero: a token that chooses them uses fewer (AdaMoE's null experts, MoE++)."""
    copy_experts: FewExperts = 0
    """Experts beside `experts` that give their input back (MoE++)."""
    constant_experts: FewExperts = 0
    """Experts beside `experts` that mix their input with a learned vector (MoE++)."""
    zero_variant: Literal["moe++", "adamoe"] = "moe++"
    """moe++: weights of zero-computation experts are normalised with the others, and count by zero_tau in balancing
    losses. adamoe: weights of the chosen true experts are normalised alone, and each zero expert counts as their mean
    in balancing losses; for zero_experts alone."""
    zero_tau: Annotated[float, Field(gt=0, le=1)] = 1.0
    """moe++: weight τ of zero-computation experts in balancing losses; a true expert's capacity is γ·τ·T·k / (τ·E + Z)
    (the paper has 0.75)."""
    lora_rank: Dim | None = None
    """Rank r of experts that are changes W + lora_alpha / r · A·B of one frozen dense feed-forward, A and B each
    expert's own (MoLoRA, LoRAMoE); null: whole experts."""
    lora_alpha: PositiveFloat | None = None
    """Numerator of the factor on these changes; default: lora_rank, a factor of 1."""
    shared_experts: FewExperts = 0
    """Experts that every token passes through, beside the routed ones."""
    shared_ffn_hidden: Dim | None = None
    """Inner size of one shared expert; default: ffn_hidden. Shared experts have the routed ones' activation, and
    no biases."""
    shared_mix: Literal["add", "gate", "residual", "cmr"] = "add"
    """How the output d of shared experts joins the routed output r. add: r + d (DeepSeekMoE). gate: r + g · d, g a
    sigmoid of the token (Qwen2-MoE). residual: both weighed by a softmax of the token (DeepSpeed's Residual-MoE).
    cmr: g · r + (1 − g) · d, g a sigmoid of the token (NLLB's conditional MoE routing)."""
    cmr_budget: Annotated[float, Field(gt=0, le=1)] = 0.8
    """shared_mix cmr: share p of the output that should come from the routed experts."""
    cmr_loss: NonNegativeFloat = 0.1
    """shared_mix cmr: coefficient of |mean of g over a micro-batch − p|."""

    @property
    def gated(self) -> bool:
        """Whether the experts' activation has a gate."""
        return self.activation in ("swiglu", "geglu", "clipped_swiglu")

    @property
    def zero_computation(self) -> int:
        """Z: experts that the gate can choose beside the routed ones."""
        return self.zero_experts + self.copy_experts + self.constant_experts

    @property
    def router(self) -> Any:
        """The description of the gate (`moesys.models.parts.gates.kind.GateKind`)."""
        return kinds(GATES)[self.gate.kind](self)

    @property
    def cmr_coefficient(self) -> float:
        """Coefficient of the loss of conditional MoE routing; 0 where there is none."""
        return self.cmr_loss if self.shared_mix == "cmr" else 0.0

    @property
    def shared_width(self) -> int:
        """Inner size of all shared experts together; they are computed as one feed-forward."""
        return self.shared_experts * (self.shared_ffn_hidden or self.ffn_hidden)
