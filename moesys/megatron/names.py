"""Parameters of a Megatron-Core `GPTModel` by this project's names, shapes and slices.

`pieces` says of each parameter of a rank's model which parts of which parameters of a `Decoder` it is. Everything
that moves weights between the two iterates over it: initialisation, proofs, conversion.

H hidden, F inner size, h heads of size d, g groups of them with one key each, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moesys.config.schema import ModelConfig
from moesys.megatron.scope import Groups
from moesys.megatron.weights import Place
from moesys.models.size import weights

Cut = tuple[int, int, int]
"""(dim, number, count): part `number` of `count` equal ones along `dim`."""


@dataclass(frozen=True)
class Piece:
    """A part of a parameter of this project inside a tensor of Megatron's.

    Attributes:
        name, shape: of the whole parameter.
        view: of Megatron's tensor; its elements in order are those of the part.
        cuts: which part.
        spread: whether ranks of the tensor group ("tp") or of the expert group ("ep") hold the others, or none ("").
    """

    name: str
    shape: tuple[int, ...]
    view: Tensor
    cuts: tuple[Cut, ...] = ()
    spread: str = ""

    @property
    def index(self) -> tuple[slice, ...]:
        """Where the part lies in the whole."""
        at = [slice(0, size) for size in self.shape]
        for dim, number, count in self.cuts:
            size = self.shape[dim] // count
            at[dim] = slice(number * size, (number + 1) * size)
        return tuple(at)

    @torch.no_grad()
    def write(self, part: Tensor) -> None:
        """Fill Megatron's tensor with the part, or with one number."""
        self.view.copy_(part.reshape(self.view.shape) if part.ndim else part)

    def read(self) -> Tensor:
        """The part, in its own shape."""
        return self.view.reshape([at.stop - at.start for at in self.index])


LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.linear_fc([12])\.weight|linear_fc([12])\.weight(\d+))")

REPLICATED = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "attention_norm.weight",
    "pre_mlp_layernorm.weight": "ffn_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "ffn_norm.weight",
    "self_attention.q_layernorm.weight": "attention.q_norm.weight",
    "self_attention.k_layernorm.weight": "attention.k_norm.weight",
    "mlp.router.weight": "ffn.gate.projection.weight",
    "mlp.router.bias": "ffn.gate.projection.bias",
    "mlp.router.expert_bias": "ffn.gate.selection_bias",
    "mlp.shared_experts.gate_weight": "ffn.mix.projection.weight",
}
"""Of a block: what tensor ranks hold alike, by Megatron's names."""


class Names:
    """The parameters of a model of this shape, as the rank at `place` has them."""

    def __init__(self, model: ModelConfig, vocab_size: int, place: Place):
        self.model, self.place = model, place
        self.shapes = {weight.name: weight.shape for weight in weights(model, vocab_size)}

    def pieces(self, chunk: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> Iterator[Piece]:
        """Of a `GPTModel`, or a pipeline stage of one: its parameters', or of `tensors` like them by their names."""
        first: dict[int, int] = {}
        for local, block in enumerate(chunk.decoder.layers):  # type: ignore[union-attr, arg-type]
            first[local] = block.layer_number - 1
        for name, tensor in (dict(chunk.named_parameters()) if tensors is None else tensors).items():
            if match := LAYER.fullmatch(name):
                yield from self._block(f"layers.{first[int(match[1])]}.", match[2], tensor.detach())
            else:
                yield from self._edge(name, tensor.detach())

    def _piece(self, name: str, view: Tensor, *cuts: Cut, spread: str = "") -> Piece:
        return Piece(name, self.shapes.get(name, tuple(view.shape)), view, cuts, spread)

    def _edge(self, name: str, tensor: Tensor) -> Iterator[Piece]:
        rows = (0, self.place.tp_rank, self.place.tp)
        if name == "decoder.final_layernorm.weight":
            yield self._piece("norm.weight", tensor)
        elif name == "embedding.word_embeddings.weight":
            yield self._piece("embed.weight", tensor, rows, spread="tp")
        elif name == "output_layer.weight":
            head = "embed.weight" if self.model.tie_embeddings else "head.weight"
            yield self._piece(head, tensor, rows, spread="tp")
        else:
            raise KeyError(name)

    def _block(self, block: str, name: str, tensor: Tensor) -> Iterator[Piece]:
        if name in REPLICATED:
            yield self._piece(block + REPLICATED[name], tensor)
        elif name.startswith("mlp.moe."):
            yield self._moe(block, name.removeprefix("mlp.moe."), tensor)
        elif name.startswith("mlp.experts."):
            yield self._expert(block, name, tensor)
        else:
            yield from self._dense(block, name, tensor)

    def _moe(self, block: str, name: str, tensor: Tensor) -> Piece:
        spread = {"experts": "ep", "shared": "tp"}.get(name.split(".")[0], "")
        return self._piece(f"{block}ffn.{name}", tensor, *self.place.cuts(name), spread=spread)

    def _expert(self, block: str, name: str, tensor: Tensor) -> Piece:
        """Of one of Megatron's own experts, [G · F, H] or [H, F]."""
        match = EXPERT.fullmatch(name)
        if match is None:
            raise KeyError(name)
        number, product = (int(match[1]), match[2]) if match[1] else (int(match[4]), match[3])
        moe, p = self.model.moe, self.place
        assert moe is not None
        expert = p.ep_rank * (moe.experts // p.ep) + number
        own = f"experts.fc{product}"
        cuts = [(0, expert, moe.experts), *p.cuts(own)[1:]]
        view = tensor.t()[None] if product == "2" else tensor.unflatten(0, (1 + moe.gated, -1)).permute(2, 0, 1)[None]
        return self._piece(f"{block}ffn.{own}", view, *cuts, spread="ep")

    def _dense(self, block: str, name: str, tensor: Tensor) -> Iterator[Piece]:
        tp = (self.place.tp_rank, self.place.tp)
        a = self.model.attention
        if name == "self_attention.linear_qkv.weight":
            # Rows of each group: the queries of its heads, its key, its value.
            heads = a.heads // (a.kv_heads or a.heads)
            grouped = tensor.unflatten(0, (-1, heads + 2, self.model.head_dim))
            parts = {"q": grouped[:, :heads], "k": grouped[:, heads], "v": grouped[:, heads + 1]}
            for kind, view in parts.items():
                yield self._piece(f"{block}attention.{kind}_proj.weight", view, (0, *tp), spread="tp")
        elif name == "self_attention.linear_proj.weight":
            yield self._piece(f"{block}attention.o_proj.weight", tensor, (1, *tp), spread="tp")
        elif (part := name.removeprefix("mlp.").removeprefix("shared_experts.")) in FEED_FORWARD:
            own = f"{block}ffn." + ("shared." if "shared_experts" in name else "")
            names = FEED_FORWARD[part]
            gated = own + "gate_proj.weight" in self.shapes
            names = names if gated else names[-1:]
            for kind, view in zip(names, tensor.chunk(len(names)), strict=True):
                yield self._piece(f"{own}{kind}.weight", view, (int(part == "linear_fc2.weight"), *tp), spread="tp")
        else:
            raise KeyError(name)


FEED_FORWARD = {"linear_fc1.weight": ("gate_proj", "up_proj"), "linear_fc2.weight": ("down_proj",)}


def place_of(groups: Groups) -> Place:
    """This rank's place in Megatron's groups."""
    ep, etp, tp = groups.ep, groups.expt_tp, groups.tp
    return Place(ep.rank(), ep.size(), etp.rank(), etp.size(), tp.rank(), tp.size())


def gathered(pieces: Iterator[Piece], groups: Groups) -> dict[str, Tensor]:
    """The whole parameters that `pieces` are parts of, on the CPU. Collective over this rank's stage."""
    found: dict[str, Tensor] = {}
    spread: dict[str, dist.ProcessGroup] = {}
    for piece in pieces:
        if piece.name not in found:
            found[piece.name] = torch.zeros(piece.shape, dtype=piece.view.dtype, device=piece.view.device)
        found[piece.name][piece.index] = piece.read()
        if piece.spread:
            spread[piece.name] = groups.tp if piece.spread == "tp" else groups.tp_ep
    for name, group in spread.items():
        if group.size() > 1:
            dist.all_reduce(found[name], group=group)
    return {name: value.cpu() for name, value in found.items()}
