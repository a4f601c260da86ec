"""transformers' Mixtral, trained as a configuration of ours says."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from moesys.comparisons import other_system
from moesys.config.schema import Config
from moesys.errors import MoesysError
from moesys.measure import checkout
from moesys.models.parts.model import mixers
from moesys.train.loop import Trainer
from moesys.train.optimizer import build


def check(config: Config) -> None:
    """Refuse what Mixtral cannot be: before anything starts.

    Raises:
        MoesysError: the model is another, or transformers is not installed.
    """
    m = config.model
    if (
        m.moe is None
        or m.attention.kind != "gqa"
        or m.attention.window
        or not isinstance(m.layers, int)
        or m.moe.shared_experts
        or m.moe.every > 1
        or m.moe.first_dense
    ):
        raise MoesysError(
            "bench train compares with Mixtral: every layer MoE, gqa, no shared experts\n"
            "    remedy: configs/quickstart.yaml is such a model"
        )
    with checkout.hidden():
        other_system("transformers", "bench train")


def build_model(config: Config, vocabulary: int) -> nn.Module:
    """`MixtralForCausalLM` of the configuration's shape and losses."""
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
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return MixtralForCausalLM(theirs)


def step(config: Config, trainer: Trainer) -> Callable[[], None]:
    """A function that makes the next training step, on the batches of `trainer` and with its optimizer."""
    t = config.train
    model = build_model(config, trainer.vocab_size)
    optimizer = build(t.optimizer, dict(model.named_parameters()), lambda name: "norm" not in name)
    batches = _batches(config, trainer)
    passes = t.global_batch // t.micro_batch

    def one() -> None:
        for chunk in next(batches).chunk(passes):
            labels = chunk[:, 1:].contiguous()
            out = model(input_ids=chunk[:, :-1], labels=labels, shift_labels=labels)
            (out.loss / passes).backward()
        if t.optimizer.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), t.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()

    return one


def _batches(config: Config, trainer: Trainer) -> Iterator[Tensor]:
    size, seen = config.train.global_batch, 0
    while True:
        yield torch.from_numpy(np.stack([trainer.samples[n] for n in range(seen, seen + size)]))
        seen += size
