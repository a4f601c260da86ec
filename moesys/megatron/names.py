"""Parameters of a Megatron-Core `GPTModel` by this project's names, shapes and slices.

`ParameterNames.pieces` maps each parameter of a rank's model to the parts of parameters of a `Decoder` that it holds.
Initialisation, proofs, checkpoints and conversion iterate over it.

H hidden, F inner size, h heads of size d, g groups of them with one key each, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moesys.config.schema import ModelConfig
from moesys.megatron.experts import own_name
from moesys.megatron.scope import ProcessGroups
from moesys.megatron.weights import Place
from moesys.models.parts.model import mixers
from moesys.models.size import weights

Cut = tuple[int, int, int]
"""(dim, number, count): part `number` of `count` equal ones along `dim`."""


@dataclass(frozen=True)
class Piece:
    """A part of a parameter of this project inside a parameter of Megatron's.

    Attributes:
        name, shape: of the whole parameter of this project.
        rows: of Megatron's tensor, along dim 0; None: all.
        cuts: the part of the whole that they are.
        spread: the group whose ranks hold the other parts: "tp", "ep", or "" if none does.
        transposed: True if they are stored as in one of Megatron's own experts, [G · F, H] and [H, F].
    """

    name: str
    shape: tuple[int, ...]
    rows: slice | None = None
    cuts: tuple[Cut, ...] = ()
    spread: str = ""
    transposed: bool = False

    @property
    def index(self) -> tuple[slice, ...]:
        """The slices of the whole that are the part."""
        at = [slice(0, size) for size in self.shape]
        for dim, number, count in self.cuts:
            size = self.shape[dim] // count
            at[dim] = slice(number * size, (number + 1) * size)
        return tuple(at)

    def view(self, tensor: Tensor) -> Tensor:
        """The part, in its own shape, of a tensor that is like Megatron's parameter. `tensor` has any shape."""
        tensor = tensor if self.rows is None else tensor[self.rows]
        if not self.transposed:
            return tensor
        parts = [at.stop - at.start for at in self.index]
        return tensor.t()[None] if len(parts) == 3 else tensor.unflatten(0, parts[2:]).permute(2, 0, 1)[None]


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
    "mlp.shared_experts.gate_weight": "ffn.mix.projection.weight",
}
"""Parameters of a block that all tensor ranks hold alike, by Megatron's names."""


SELECTION = ("mlp.moe.gate.selection_bias", "mlp.router.expert_bias")
"""ParameterNames of the buffer of a block that only the choice of experts uses."""


def _number(chunk: nn.Module, match: re.Match[str]) -> int:
    """The number in the model, from 0, of a block of this pipeline stage."""
    return int(chunk.decoder.layers[int(match[1])].layer_number) - 1  # type: ignore[union-attr, index]


class ParameterNames:
    """The parameters of a model of this shape, as the rank at `place` has them."""

    def __init__(self, model: ModelConfig, vocab_size: int, place: Place):
        self.model, self.place = model, place
        self.shapes = {weight.name: weight.shape for weight in weights(model, vocab_size)}

    def pieces(self, chunk: nn.Module) -> Iterator[tuple[nn.Parameter, list[Piece]]]:
        """Every parameter of a `GPTModel`, or of a pipeline stage of one, with its pieces."""
        for name, parameter in chunk.named_parameters():
            if match := LAYER.fullmatch(name):
                yield parameter, self._block(f"layers.{_number(chunk, match)}.", match[2], parameter)
            else:
                yield parameter, [self._edge(name)]

    def kept(self, chunk: nn.Module) -> Iterator[tuple[Tensor, list[Piece]]]:
        """The selection biases of gates, which are no parameters, with their pieces."""
        for name, buffer in chunk.named_buffers():
            if (match := LAYER.fullmatch(name)) and match[2] in SELECTION:
                own = f"layers.{_number(chunk, match)}.ffn.gate.selection_bias"
                yield buffer, [Piece(own, tuple(buffer.shape))]

    def _piece(
        self, name: str, *cuts: Cut, rows: slice | None = None, spread: str = "", transposed: bool = False
    ) -> Piece:
        return Piece(name, self.shapes[name], rows, cuts, spread, transposed)

    def _edge(self, name: str) -> Piece:
        rows = (0, self.place.tp_rank, self.place.tp)
        if name == "decoder.final_layernorm.weight":
            return self._piece("norm.weight")
        if name == "embedding.word_embeddings.weight":
            return self._piece("embed.weight", rows, spread="tp")
        if name == "output_layer.weight":
            return self._piece("embed.weight" if self.model.tie_embeddings else "head.weight", rows, spread="tp")
        raise KeyError(name)

    def _block(self, block: str, name: str, parameter: Tensor) -> list[Piece]:
        if name in REPLICATED:
            return [self._piece(block + REPLICATED[name])]
        if name.startswith("mlp.moe."):
            own = own_name(name.removeprefix("mlp.moe."))
            spread = {"experts": "ep", "shared": "tp"}.get(own.split(".")[0], "")
            return [self._piece(f"{block}ffn.{own}", *self.place.cuts(own), spread=spread)]
        if match := EXPERT.fullmatch(name):
            return [self._expert(block, int(match[1] or match[4]), match[2] or match[3])]
        if name.startswith("self_attention.linear_qkv."):
            return list(self._attention(f"{block}attention.", name.rpartition(".")[2]))
        if name == "self_attention.linear_proj.weight":
            cut = (1, self.place.tp_rank, self.place.tp)
            return [self._piece(f"{block}attention.o_proj.weight", cut, spread="tp")]
        return self._feed_forward(f"{block}ffn.", name, len(parameter))

    def _expert(self, block: str, number: int, product: str) -> Piece:
        """The piece of a weight of one of Megatron's own experts on this rank."""
        moe, p, own = self.model.moe, self.place, f"experts.fc{product}"
        assert moe is not None
        cuts = [(0, p.ep_rank * (moe.experts // p.ep) + number, moe.experts), *p.cuts(own)[1:]]
        return self._piece(f"{block}ffn.{own}", *cuts, spread="ep", transposed=True)

    def _attention(self, block: str, leaf: str) -> Iterator[Piece]:
        """Rows of each group in the weight or the bias: the queries of its heads, its key, its value."""
        p = self.place
        every, groups, d, _ = mixers(self.model)[0].head_sizes()
        heads, mine, end = every // groups, groups // p.tp, 0
        for group in range(p.tp_rank * mine, (p.tp_rank + 1) * mine):
            for kind, size in (("q", heads * d), ("k", d), ("v", d)):
                rows, end = slice(end, end + size), end + size
                yield self._piece(f"{block}{kind}_proj.{leaf}", (0, group, groups), rows=rows, spread="tp")

    def _feed_forward(self, block: str, name: str, count: int) -> list[Piece]:
        p, shared = self.place, "shared_experts." in name
        own, name = block + "shared." * shared, name.replace("shared_experts.", "")
        if name == "mlp.linear_fc2.weight":
            return [self._piece(f"{own}down_proj.weight", (1, p.tp_rank, p.tp), spread="tp")]
        if name != "mlp.linear_fc1.weight":
            raise KeyError(name)
        kinds = [kind for kind in ("gate", "up") if f"{own}{kind}_proj.weight" in self.shapes]
        size = count // len(kinds)
        return [
            self._piece(
                f"{own}{kind}_proj.weight",
                (0, p.tp_rank, p.tp),
                rows=slice(i * size, (i + 1) * size),
                spread="tp",
            )
            for i, kind in enumerate(kinds)
        ]


def place_of(groups: ProcessGroups) -> Place:
    """This rank's place in Megatron's groups."""
    ep, etp, tp = groups.ep, groups.expt_tp, groups.tp
    return Place(ep.rank(), ep.size(), etp.rank(), etp.size(), tp.rank(), tp.size())


Part = tuple[Piece, Tensor]
"""A piece, and its part of a tensor."""


def gathered(parts: Iterable[Part], groups: ProcessGroups) -> dict[str, Tensor]:
    """The whole tensors that `parts` are of, on the CPU. Collective over this rank's stage."""
    found: dict[str, Tensor] = {}
    spread: dict[str, dist.ProcessGroup] = {}
    for piece, part in parts:
        if piece.name not in found:
            found[piece.name] = torch.zeros(piece.shape, dtype=part.dtype, device=part.device)
        found[piece.name][piece.index] = part
        if piece.spread:
            spread[piece.name] = groups.tp if piece.spread == "tp" else groups.tp_ep
    for name, group in spread.items():
        if group.size() > 1:
            dist.all_reduce(found[name], group=group)
    return {name: value.cpu() for name, value in found.items()}
