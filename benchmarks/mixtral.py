"""transformers' Mixtral, trained as a configuration of ours says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count

import numpy as np
import torch
from torch import Tensor, nn

from moesys.comparisons import other_system
from moesys.config.differences import defaults, flat
from moesys.config.schema import Config
from moesys.errors import MoesysError
from moesys.files import json_text
from moesys.measure import checkout
from moesys.models.parts.model import mixers
from moesys.train.loop import Trainer
from moesys.train.optimizer import build, learning_rate

SHAPE = (
    "vocab_size", "hidden", "layers", "tie_embeddings", "norm_eps", "rope_theta", "init_std", "attention.heads",
    "attention.kv_heads", "attention.head_dim", "moe.experts", "moe.top_k", "moe.ffn_hidden", "moe.balance_loss",
)  # fmt: skip
"""Keys of `model` that Mixtral has too."""

LACKING = ("sequence_balance_loss", "global_balance_loss", "z_loss", "importance_loss", "load_loss")
"""Losses of `model.moe` that it has not."""

TRAINING = {"dtype": "float32", "freeze": [], "optimizer.kind": "adamw", "recompute": "none", "compile": False}
"""Keys of `train` that have no other value here, because only one side would follow it."""


def comparable(config: Config) -> Config:
    """`config` without the losses that Mixtral lacks, so that both sides compute the same.

    Raises:
        MoesysError: the model or its training is one that Mixtral's is not.
    """
    _check(config)
    assert config.model.moe is not None
    moe = config.model.moe.model_copy(update=dict.fromkeys(LACKING, 0.0))
    return config.model_copy(update={"model": config.model.model_copy(update={"moe": moe})})


def check(config: Config) -> None:
    """Refuse what Mixtral cannot be, before anything starts.

    Raises:
        MoesysError: the model or its training is another, or transformers is not installed.
    """
    _check(config)
    with checkout.hidden():
        other_system("transformers", "bench train")


def _check(config: Config) -> None:
    usual, model = defaults(), flat(config.model_dump(mode="json")["model"])
    free = {*SHAPE, *(f"moe.{loss}" for loss in LACKING), "ffn_hidden"}
    odd = {
        f"model.{key}": value
        for key, value in model.items()
        if key not in free and value != usual.get(f"model.{key}", value)
    }
    train = flat(config.model_dump(mode="json")["train"])
    odd |= {f"train.{key}": train[key] for key, value in TRAINING.items() if train[key] != value}
    plain = isinstance(config.model.layers, int) and config.model.moe is not None
    if plain and not odd:
        return
    found = ", ".join(f"{key} is {json_text(value)}" for key, value in odd.items())
    raise MoesysError(
        "bench train compares with Mixtral in float32: every layer MoE, gqa, top_k, no shared experts"
        f"{'; ' + found if plain else ''}\n    remedy: configs/quickstart.yaml is such a model"
    )


def build_model(config: Config, vocabulary: int) -> nn.Module:
    """`MixtralForCausalLM` of the configuration's shape and balance loss."""
    with checkout.hidden():
        from transformers import MixtralConfig, MixtralForCausalLM

    m, moe = config.model, config.model.moe
    heads, kv_heads, head_dim, _ = mixers(m)[0].head_sizes()
    assert moe is not None
    theirs = MixtralConfig(
        vocab_size=vocabulary, hidden_size=m.hidden, intermediate_size=moe.ffn_hidden, num_hidden_layers=m.depth,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, num_local_experts=moe.experts,
        num_experts_per_tok=moe.top_k, router_aux_loss_coef=moe.balance_loss, output_router_logits=True,
        tie_word_embeddings=m.tie_embeddings, max_position_embeddings=config.train.seq_len, use_cache=False,
        rms_norm_eps=m.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta},
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return MixtralForCausalLM(theirs)


NAMES = (
    ("embed.", "model.embed_tokens."),
    ("head.", "lm_head."),
    ("layers.", "model.layers."),
    ("norm.", "model.norm."),
    (".attention_norm.", ".input_layernorm."),
    (".attention.", ".self_attn."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".ffn.gate.projection.", ".mlp.gate."),
    (".ffn.experts.fc1", ".mlp.experts.gate_up_proj"),
    (".ffn.experts.fc2", ".mlp.experts.down_proj"),
)
"""Parts of the names of parameters here and there."""


@torch.no_grad()
def copy_weights(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Give `model` the `weights` of ours: equal weights route equal tokens, so that both sides compute equal sizes.

    Their experts' matrices are transposed, the gate's rows before the linear part's.
    """
    theirs = dict(model.named_parameters())
    for name, weight in weights.items():
        for ours, other in NAMES:
            name = other + name.removeprefix(ours) if not ours.startswith(".") and name.startswith(ours) else name
            name = name.replace(ours, other) if ours.startswith(".") else name
        if name in theirs:
            transposed = weight.flatten(2).mT if ".experts." in name else weight
            theirs.pop(name).copy_(transposed)
    if theirs:
        raise MoesysError(f"bench train knows no weights for {', '.join(theirs)} of this version of transformers")


def step(config: Config, trainer: Trainer) -> Callable[[], float]:
    """A function that makes the next training step, and returns the mean cross-entropy of its tokens.

    It starts from the weights that `trainer` has now, and takes its batches, optimizer and learning rates.
    """
    t = config.train
    model = build_model(config, trainer.vocab_size)
    copy_weights(trainer.engine.weights(), model)
    optimizer = build(t.optimizer, dict(model.named_parameters()), lambda name: "norm" not in name)
    batches, numbers = _batches(config, trainer, trainer.seen), count(trainer.step + 1)
    passes = t.global_batch // t.micro_batch

    def one() -> float:
        total = torch.zeros(())
        for chunk in next(batches).chunk(passes):
            labels = chunk[:, 1:].contiguous()
            out = model(input_ids=chunk[:, :-1], labels=labels, shift_labels=labels)
            (out.loss / passes).backward()
            total += (out.loss - model.router_aux_loss_coef * out.aux_loss).detach()
        if t.optimizer.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), t.optimizer.clip)
        rate = learning_rate(t, next(numbers))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        return total.item() / passes

    return one


def _batches(config: Config, trainer: Trainer, seen: int) -> Iterator[Tensor]:
    size = config.train.global_batch
    while True:
        yield torch.from_numpy(np.stack([trainer.samples[n] for n in range(seen, seen + size)]))
        seen += size
