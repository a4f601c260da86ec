"""Where a key that does not exist may have been meant to stand."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from moesys.config import legal
from moesys.config.registry import DISPATCHERS, GATES, MIXERS, kinds
from moesys.config.schema import Config, Section

ELSEWHERE: dict[str, str] = {
    "hidden_size": "model.hidden",
    "num_layers": "model.layers",
    "num_hidden_layers": "model.layers",
    "intermediate_size": "model.ffn_hidden",
    "ffn_hidden_size": "model.ffn_hidden",
    "tie_word_embeddings": "model.tie_embeddings",
    "rms_norm_eps": "model.norm_eps",
    "initializer_range": "model.init_std",
    "lm_head_bias": "model.head_bias",
    "logits_scaling": "model.logits_divisor",
    "rope_type": "model.rope_scaling.kind",
    "original_max_position_embeddings": "model.rope_scaling.original_seq_len",
    "attention_bias": "model.attention.bias",
    "attention_multiplier": "model.attention.softmax_scale",
    "partial_rotary_factor": "model.attention.rotary_fraction",
    "sliding_window": "model.attention.window",
    "moe_norm_min": "model.moe.normalize_min",
    "num_attention_heads": "model.attention.heads",
    "num_key_value_heads": "model.attention.kv_heads",
    "num_query_groups": "model.attention.kv_heads",
    "num_experts": "model.moe.experts",
    "num_local_experts": "model.moe.experts",
    "n_routed_experts": "model.moe.experts",
    "n_shared_experts": "model.moe.shared_experts",
    "num_experts_per_tok": "model.moe.top_k",
    "moe_router_topk": "model.moe.top_k",
    "moe_intermediate_size": "model.moe.ffn_hidden",
    "moe_ffn_hidden_size": "model.moe.ffn_hidden",
    "moe_layer_freq": "model.moe.every",
    "first_k_dense_replace": "model.moe.first_dense",
    "norm_topk_prob": "model.moe.normalize",
    "routed_scaling_factor": "model.moe.scale",
    "router_aux_loss_coef": "model.moe.balance_loss",
    "aux_loss": "model.moe.balance_loss",
    "seq_aux_loss": "model.moe.sequence_balance_loss",
    "global_aux_loss": "model.moe.global_balance_loss",
    "moe_aux_loss_coeff": "model.moe.balance_loss",
    "moe_z_loss_coeff": "model.moe.z_loss",
    "router_z_loss_coef": "model.moe.z_loss",
    "moe_router_bias_update_rate": "model.moe.bias_rate",
    "moe_router_topk_scaling_factor": "model.moe.scale",
    "moe_expert_capacity_factor": "model.moe.capacity_factor",
    "moe_token_drop_policy": "model.moe.drop",
    "moe_pad_expert_input_to_capacity": "model.moe.pad_to_capacity",
    "moe_router_score_function": "model.moe.gate.score",
    "scoring_func": "model.moe.gate.score",
    "moe_input_jitter_eps": "model.moe.gate.jitter",
    "router_jitter_noise": "model.moe.gate.jitter",
    "moe_router_num_groups": "model.moe.gate.groups",
    "n_group": "model.moe.gate.groups",
    "moe_router_group_topk": "model.moe.gate.groups_kept",
    "topk_group": "model.moe.gate.groups_kept",
    "mtp_num_layers": "model.mtp.depth",
    "num_nextn_predict_layers": "model.mtp.depth",
    "mtp_loss_scaling_factor": "model.mtp.loss_weight",
    "data_parallel": "parallel.dp",
    "data_parallel_size": "parallel.dp",
    "tensor_parallel": "parallel.tp",
    "tensor_parallel_size": "parallel.tp",
    "tensor_model_parallel_size": "parallel.tp",
    "sequence_parallel": "parallel.sp",
    "pipeline_parallel": "parallel.pp",
    "pipeline_parallel_size": "parallel.pp",
    "pipeline_model_parallel_size": "parallel.pp",
    "context_parallel": "parallel.cp",
    "context_parallel_size": "parallel.cp",
    "expert_parallel": "parallel.ep",
    "expert_parallel_size": "parallel.ep",
    "expert_model_parallel_size": "parallel.ep",
    "expert_tensor_parallel_size": "parallel.etp",
    "fsdp": "parallel.dp_shard",
    "batch_size": "train.global_batch",
    "global_batch_size": "train.global_batch",
    "micro_batch_size": "train.micro_batch",
    "sequence_length": "train.seq_len",
    "seq_length": "train.seq_len",
    "max_steps": "train.steps",
    "train_iters": "train.steps",
    "precision": "train.dtype",
    "activation_checkpointing": "train.recompute",
    "learning_rate": "train.optimizer.lr",
    "grad_clip": "train.optimizer.clip",
    "clip_grad": "train.optimizer.clip",
    "warmup_steps": "train.schedule.warmup",
    "dataset": "data.path",
    "gpus_per_node": "cluster.ranks_per_node",
    "num_nodes": "cluster.nodes",
}
"""Names of Hugging Face configurations, Megatron-Core and DeepSpeed for our keys."""


SAME: tuple[tuple[str, ...], ...] = (
    ("cuda", "gpu", "gpus", "nvidia", "nccl"),
    ("cpu", "gloo", "host"),
    ("float32", "fp32", "f32", "float", "single"),
    ("bfloat16", "bf16", "float16", "fp16", "f16", "half", "mixed"),
    ("fp8", "float8", "float8_e4m3", "e4m3", "fp8_e4m3"),
    ("adamw", "adam", "fused_adam", "adam_w"),
    ("apex", "fusedadam"),
    ("swiglu", "silu", "swish"),
    ("relu2", "squared_relu", "relu_squared"),
    ("interleaved-1f1b", "interleaved", "vpp"),
    ("zero-bubble", "zb", "zb_h1", "zbv"),
    ("wsd", "warmup_stable_decay", "trapezoidal", "linear"),
    ("huggingface", "hf", "datasets"),
    ("megatron", "mcore", "indexed", "mmap"),
    ("megatron", "megatron_core", "megatron_lm"),
    ("text", "txt", "jsonl", "json"),
    ("local", "torchrun", "processes", "multiprocessing"),
    ("slurm", "sbatch", "srun"),
    ("hosts", "netns", "namespaces"),
    ("selective", "partial", "some"),
    ("gaussian", "normal"),
    ("none", "off", "no", "false", "never"),
    ("full", "all", "block"),
    ("balanced", "uniform"),
)
"""Words of our choices, each with other words for the same thing."""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def choice(word: str, words: Iterable[str]) -> str | None:
    """The one of the legal `words` that `word` stands for: another name of it, another spelling, or a slip."""
    words = list(words)
    bare = {_plain(w).replace("_", ""): w for w in words}
    asked = _plain(word).replace("_", "")
    if asked in bare:
        return bare[asked]
    if asked in ("on", "yes", "true"):
        return None  # no word of ours in particular
    known = [*SAME, *((kind, *d.aliases) for slot in (MIXERS, GATES, DISPATCHERS) for kind, d in kinds(slot).items())]
    meant = [ours for ours, *others in known if ours in words and asked in (o.replace("_", "") for o in others)]
    return meant[0] if meant else nearest(word, words, 0.5)


def nearest(word: str, words: Iterable[str], likeness: float = 0.6) -> str | None:
    """The one of `words` that `word` most likely stands for; `likeness` is difflib's ratio, at least."""
    plain, asked = {_plain(w): w for w in words}, _plain(word)
    found = difflib.get_close_matches(asked, list(plain), 1, likeness)
    found = found or [w for w in plain if len(asked) > 2 and asked in w]
    return plain[found[0]] if found else None


def keys_like(section: str, name: str, root: type[Section] = Config) -> list[str]:
    """Dotted keys of `root` that an unknown key `name` in `section` ("" for the top) may stand for, best first."""
    known = list(legal.keys(root))
    prefix = f"{section}." if section else ""
    siblings = [k.removeprefix(prefix) for k in known if k.startswith(prefix) and "." not in k[len(prefix) :]]
    beside = nearest(name, siblings if section or root is not Config else [*siblings, "include"])
    same = [k for k in known if k.rpartition(".")[2] == _plain(name)]
    if root is Config and _plain(name) in ELSEWHERE:
        same.append(ELSEWHERE[_plain(name)])
    # A key of a section inside this one is likelier than a key of a far one.
    same.sort(key=lambda k: not k.startswith(prefix))
    return list(dict.fromkeys(([prefix + beside] if beside else []) + same))[:3]
