"""The plug-in's options, and the layer that a Megatron-Core configuration describes.

Options that Megatron has are read from its `TransformerConfig`; `Options` holds the rest.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import Any, get_args

from torch.nn import functional

from moesys.config import registry
from moesys.config.registry import kinds
from moesys.config.schema import DispatchConfig, GateConfig, MoEConfig
from moesys.errors import Problem
from moesys.megatron import settings
from moesys.megatron.fields import unknown
from moesys.megatron.refusal import Refusal
from moesys.megatron.unsupported import unsupported
from moesys.models.parts.gates import rules as gate_rules

GATES = ("top_k", *(kind for kind, described in kinds(registry.GATES).items() if described.for_megatron))
"""Gates that need neither token ids nor token numbers, and keep no state between steps."""

KINDS = tuple(get_args(DispatchConfig.model_fields["kind"].annotation))
PAYLOADS = tuple(get_args(DispatchConfig.model_fields["payload"].annotation))


@dataclass(frozen=True)
class Options:
    """The options that Megatron lacks.

    Attributes:
        gate: one of `GATES`; "top_k" is Megatron's own token choice, by its definitions.
        dispatch: the dispatcher; None: as `moe_token_dispatcher_type` says, all-gather for "allgather" and all-to-all
            for others.
        chunks, payload: see `DispatchConfig`.
    """

    gate: str = "top_k"
    dispatch: str | None = None
    chunks: int = 1
    payload: str = "model"

    def dispatch_config(self, config: Any) -> DispatchConfig:
        """The dispatcher for a model of this `TransformerConfig`."""
        named = {"allgather": "all_gather"}.get(config.moe_token_dispatcher_type, "all_to_all")
        given = {"kind": self.dispatch or named, "chunks": self.chunks, "payload": self.payload}
        return DispatchConfig.model_validate(given | {"overlap_shared": config.moe_shared_expert_overlap})


def moe_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the plug-in's flags; to be handed to Megatron-LM as `extra_args_provider`."""
    group = parser.add_argument_group("moesys")
    group.add_argument("--moesys-gate", choices=GATES, default="top_k", help="how tokens are routed")
    group.add_argument("--moesys-dispatch", choices=KINDS, help="default: as --moe-token-dispatcher-type says")
    group.add_argument("--moesys-dispatch-chunks", type=_positive, default=1, help="chunks of a dispatch")
    group.add_argument("--moesys-dispatch-payload", choices=PAYLOADS, default="model", help="type of dispatched rows")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def from_args(args: Namespace) -> Options:
    """The options of parsed flags."""
    return Options(args.moesys_gate, args.moesys_dispatch, args.moesys_dispatch_chunks, args.moesys_dispatch_payload)


def from_transformer_config(config: Any, gate: str = "top_k") -> MoEConfig:
    """The MoE layer that a Megatron-Core `TransformerConfig` describes.

    Raises:
        Refusal: names every option that the plug-in cannot represent, and what to do.
    """
    problems = unsupported(config) + _unknown_fields(config) + _routing(config, gate) + _experts(config)
    if problems:
        raise Refusal(problems)
    balance, capacity = settings.balance(config), settings.capacity(config)
    moe = MoEConfig(
        experts=config.num_moe_experts,
        top_k=config.moe_router_topk,
        ffn_hidden=config.moe_ffn_hidden_size,
        activation=_activation(config),
        bias=config.add_bias_linear,
        gate=_gate(config, gate),
        normalize=_normalize(config),
        scale=settings.scale(config),
        capacity_factor=capacity.factor,
        drop=capacity.drop,
        pad_to_capacity=capacity.pad,
        balance_loss=balance.balance,
        sequence_balance_loss=balance.sequence_balance,
        global_balance_loss=balance.global_balance,
        z_loss=balance.z,
        bias_rate=config.moe_router_bias_update_rate if config.moe_router_enable_expert_bias else 0.0,
        shared_experts=int(config.moe_shared_expert_intermediate_size is not None),
        shared_ffn_hidden=config.moe_shared_expert_intermediate_size,
        shared_mix="gate" if config.moe_shared_expert_gate else "add",
    )
    if gate != "top_k" and (problems := gate_rules.check(moe)):
        raise Refusal(problems)
    return moe


def _gate(config: Any, kind: str) -> GateConfig:
    if kind != "top_k":
        return GateConfig.model_validate(kind)
    more: dict[str, Any] = {}
    if group_limited(config):
        kept = config.moe_router_group_topk
        more = {"groups": config.moe_router_num_groups, "groups_kept": kept}
        # The plug-in's gate counts as many experts of a group as Megatron does, which may be more than two.
        more["group_score"] = "max" if config.moe_router_topk // kept == 1 else "top2"
    return GateConfig(
        score=config.moe_router_score_function,
        bias=config.add_bias_linear,
        jitter=config.moe_input_jitter_eps or 0.0,
        **more,
    )


def group_limited(config: Any) -> bool:
    """True if tokens use only some groups of experts. Kimi-K2 has one group, and uses it."""
    return bool(config.moe_router_group_topk) and config.moe_router_group_topk < config.moe_router_num_groups


def _normalize(config: Any) -> bool:
    """True if weights are divided by their sum; Megatron does not divide a single sigmoid."""
    if config.moe_router_score_function == "sigmoid":
        return bool(config.moe_router_topk > 1)
    return not config.moe_router_pre_softmax


def _activation(config: Any) -> Any:
    """The kind of `moesys.kernels.activation`, or None."""
    name = getattr(config.activation_func, "__name__", "")
    if config.gated_linear_unit:
        limited = name == "quick_gelu" and (config.activation_func_clamp_value, config.glu_linear_offset) == (7.0, 1.0)
        plain = config.activation_func_clamp_value is None and config.glu_linear_offset == 0
        gated = {functional.silu: "swiglu", functional.gelu: "geglu"}.get(config.activation_func)
        return "clipped_swiglu" if limited else gated if plain else None
    known = {functional.gelu: "gelu", functional.relu: "relu"}
    return "relu2" if name == "squared_relu" else known.get(config.activation_func)


def _unknown_fields(config: Any) -> list[Problem]:
    """Problems of fields of the MoE layer that are newer than the releases that the plug-in knows."""
    rule = "not known to the plug-in, which was made for Megatron-Core 0.16 to 0.19"
    remedy = "leave it at its default, or use Megatron's own layer"
    return [Problem(name, rule, remedy, repr(getattr(config, name))) for name in unknown(config)]


def _experts(config: Any) -> list[Problem]:
    problems = []
    if _activation(config) is None:
        given = getattr(config.activation_func, "__name__", repr(config.activation_func))
        rule = "the plug-in's experts have silu, gelu and quick_gelu gated, or gelu, relu and squared_relu not gated"
        problems.append(Problem("activation_func", rule, "choose one of these", given))
    if config.moe_shared_expert_intermediate_size is not None and config.add_bias_linear:
        rule = "shared experts have no biases, as Megatron's have none"
        problems.append(Problem("add_bias_linear", rule, "--disable-bias-linear", "True"))
    return problems


def _routing(config: Any, gate: str) -> list[Problem]:
    problems = []
    if gate not in GATES:
        problems.append(Problem("moesys_gate", f"must be one of {', '.join(GATES)}", given=gate))
    kinds = {"aux_loss", "seq_aux_loss", "global_aux_loss", "none"}
    if unknown := set(settings.coefficients(config)) - kinds:
        rule, given = f"must be among {', '.join(sorted(kinds))}", ", ".join(sorted(unknown))
        problems.append(Problem("moe_router_load_balancing_type", rule, "for sinkhorn: --moesys-gate sinkhorn", given))
    if config.moe_router_score_function not in ("softmax", "sigmoid"):
        problems.append(
            Problem("moe_router_score_function", "softmax or sigmoid", given=config.moe_router_score_function)
        )
    return problems + _groups(config)


def _groups(config: Any) -> list[Problem]:
    if not group_limited(config):
        return []
    kept, top_k = config.moe_router_group_topk, config.moe_router_topk
    size = config.num_moe_experts // config.moe_router_num_groups
    if 1 <= top_k // kept <= size:
        return []
    rule = f"moe_router_topk({top_k}) // moe_router_group_topk({kept}) of a group's experts say how good it is: that "
    rule += f"must be from 1 to the experts of a group, {size}"
    return [Problem("moe_router_group_topk", rule, f"from {-(-top_k // size)} to {top_k}", str(kept))]
