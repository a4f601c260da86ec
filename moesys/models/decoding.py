"""Decoding: a model is given sequences piece by piece, and gives the logits of the token that follows.

with decoding(model) as decode:
    logits_BV = decode(prompt_BS)        # all of the prompt in one pass
    logits_BV = decode(next_B1)          # one token more

Attention remembers keys and values of the tokens before. A model in which a token's output depends on other tokens in
another way (a gate that routes whole sequences, a mixer without a cache) computes the whole sequence again for each
piece: that is slower, and as exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from moesys.models.decoder import Decoder
from moesys.models.parts.gates.kind import GateKind, describe
from moesys.models.parts.model import block
from moesys.moe.layer import moe_layers

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


class Decode(Protocol):
    """A model in the middle of some sequences."""

    def __call__(self, tokens_BS: Tensor) -> Tensor:
        """Logits [B, V], float32 or wider, of the token after `tokens_BS`, int64 [B, S], which go on the sequences."""


class LastToken(nn.Module):
    """A head that sees the last token alone: the logits of a long prompt are many, and not needed."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, x_BSH: Tensor) -> Tensor:
        """Logits [B, 1, V] of x [B, S, H]."""
        out: Tensor = self.head(x_BSH[:, -1:])
        return out


class _Stepwise:
    """Decodes by remembering; see `Decode`."""

    def __init__(self, model: Decoder):
        self._model, self._done = model, 0

    def __call__(self, tokens_BS: Tensor) -> Tensor:
        end = self._done + tokens_BS.shape[1]
        self._model.positions = torch.arange(self._done, end, device=tokens_BS.device)
        self._done = end
        return _last(self._model, tokens_BS, self._model.positions)


class _Anew:
    """Decodes by computing the whole sequence for each piece; see `Decode`."""

    def __init__(self, model: Decoder):
        self._model, self._seen_BN = model, torch.empty(0)

    def __call__(self, tokens_BS: Tensor) -> Tensor:
        self._seen_BN = torch.cat((self._seen_BN, tokens_BS), 1) if len(self._seen_BN) else tokens_BS
        positions = torch.arange(self._seen_BN.shape[1], device=tokens_BS.device)
        return _last(self._model, self._seen_BN, positions)


@torch.inference_mode()
def _last(model: Decoder, tokens_BS: Tensor, positions: Tensor) -> Tensor:
    numbers_BS = positions.expand_as(tokens_BS)
    logits_B1V: Tensor = model(tokens_BS, torch.stack((numbers_BS, tokens_BS), -1))
    return logits_B1V[:, -1].to(torch.promote_types(logits_B1V.dtype, torch.float32))


@contextmanager
def decoding(model: Decoder, length: int | None = None) -> Iterator[Decode]:
    """A `Decode` of new sequences, for a whole model on one device; afterwards the model is as it was.

    `length`: tokens of the whole sequences at most. A scaling of rotary positions may depend on it, and keys that are
    remembered keep theirs; None: the tokens so far decide, as they would in one pass over them.
    """
    training, positions, before = model.training, model.positions, model.length
    model.length = length
    stepwise = not recomputed(model.config)
    with ExitStack() as stack:
        assert model.head is not None
        stack.enter_context(_replaced(model, "head", LastToken(model.head)))
        if stepwise:
            for name, built in model.layers.items():
                mixer = block(model.config, int(name)).mixer
                for owner, attribute, cache in mixer.caches(built.get_submodule("attention")):
                    stack.enter_context(_replaced(owner, attribute, cache))
        model.eval()
        try:
            yield _Stepwise(model) if stepwise else _Anew(model)
        finally:
            model.positions, model.length = positions, before
            model.train(training)
            for layer in moe_layers(model).values():
                layer.statistics.take()


@contextmanager
def _replaced(owner: nn.Module, attribute: str, module: nn.Module) -> Iterator[None]:
    before = getattr(owner, attribute)
    setattr(owner, attribute, module)
    try:
        yield
    finally:
        setattr(owner, attribute, before)


def recomputed(model: ModelConfig) -> str:
    """The reason why each token computes the whole sequence again; "" if the model can remember."""
    for layer in range(model.depth):
        mixer = block(model, layer).mixer
        if not mixer.remembers:
            return f"mixer {mixer.kind} has no cache"
    gate = None if model.moe is None else describe(model.moe)
    if gate is not None and not gate.token_by_token:
        return f"gate {gate.kind} routes whole sequences"
    return ""


def dropless(model: ModelConfig) -> ModelConfig:
    """The model without a limit on the tokens of an expert.

    A capacity is a share of a micro-batch. Of one token at a time it would be another one than in training, and what
    it drops would depend on how a text is cut into pieces.
    """
    moe = model.moe
    if moe is None or moe.capacity_factor is None or "drop" in cast(GateKind, describe(moe)).ignores:
        return model
    none = {"capacity_factor": None, "eval_capacity_factor": None, "min_capacity": 0, "pad_to_capacity": False}
    return model.model_copy(update={"moe": moe.model_copy(update=none)})
