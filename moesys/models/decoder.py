"""A plain decoder of blocks, or any consecutive part of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from moesys.models.block import Block, PredictionBlock
from moesys.models.layers import LayerNorm, Linear, RMSNorm, norm
from moesys.models.rotary import rotary_angles
from moesys.models.size import by_name

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


class Embedding(nn.Embedding):
    """Token embedding [B, S] int64 → [B, S, H]."""


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head; in training also blocks of multi-token prediction.

    A pipeline stage is the same class with parts removed (`keep`): blocks keep their global numbers,
    so that a parameter's name does not depend on the layout.

    Attributes:
        dtype: type of the stream between blocks.
        first: whether its input are tokens; else it is the stream of the stage before it.
        described: every parameter of the whole model by its name, as its part describes it.
        positions: sequence positions of the tokens that this device holds, int64 [S]; None: 0 … S−1.
        length: tokens of a whole sequence, where they are more than this device holds; None: as many as the last
            position says.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.vocab_size, self.dtype = config, vocab_size, dtype
        self.positions: Tensor | None = None
        self.length: int | None = None
        self._tables: tuple[tuple[int, torch.device, Tensor | None], dict[int, tuple[Tensor, Tensor]]] | None = None
        self.embed: Embedding | None = Embedding(vocab_size, config.hidden)
        self.first = True
        kinds = [Block] * config.depth + [PredictionBlock] * config.predicted
        self.layers = nn.ModuleDict({str(i): kind(config, i) for i, kind in enumerate(kinds)})
        self.norm: RMSNorm | LayerNorm | None = norm(config.norm, config.hidden, config.norm_eps)
        self.head: Linear | None = Linear(config.hidden, vocab_size, bias=config.head_bias)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.described = by_name(config, vocab_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give all parameters, those of the parts too, their initial values: matrices N(0, `config.init_std`²).

        Norms, biases and the like keep what their own modules start with. Training starts from
        `moesys.parallel.initialise`, whose numbers depend on no layout.
        """
        for name, parameter in self.named_parameters():
            if self.described[name].initial is None:
                parameter.normal_(0.0, self.config.init_std)

    def blocks(self) -> list[Block]:
        """Its blocks, in order; those of multi-token prediction are the last ones."""
        return cast("list[Block]", list(self.layers.values()))

    def keep(self, layers: range, first: bool, last: bool) -> Decoder:
        """Remove all but these layers, the embedding unless `first`, norm and head unless `last`.

        Multi-token prediction, on the last stage, needs the embedding, too.
        """
        for name in list(self.layers):
            if int(name) not in layers:
                del self.layers[name]
        self.first = first
        if not first and not (last and self.config.predicted):
            self.embed = None
        if not last:
            self.norm = self.head = None
        return self

    def forward(self, x: Tensor, tokens_BS2: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] of tokens int64 [B, S]; a stage takes and gives its part, stream [B, S, H].

        `tokens_BS2` int64 [B, S, 2]: number and id of each token, for MoE layers (`MoELayer.forward`). Multi-token
        prediction of depth D runs where they are [B, S, 2 + D], with the ids of the D tokens after each one: logits
        are then [(1 + D)·B, S, V], those of the next token first. Without gradients its blocks run, for the sake of
        their gates, and logits are [B, S, V].
        """
        ahead_BSD = None if tokens_BS2 is None or self.head is None else tokens_BS2[..., 2:]
        later: Sequence[Tensor] = ()
        if ahead_BSD is not None and ahead_BSD.shape[-1]:
            x, *later = self._embed_ahead(x, ahead_BSD)
        elif self.first:
            x = self._embed(x)
        tables = self._rotary(x.shape[1], x.device)
        numbered_BS2 = None if tokens_BS2 is None else tokens_BS2[..., :2]
        for block in self.blocks():
            if not isinstance(block, PredictionBlock):
                x = block(x, *tables[block.rotary_dim], numbered_BS2)
        if self.head is None or self.norm is None:
            return x
        outputs = [self.norm(x)]
        if later and tokens_BS2 is not None:
            outputs += self._predict(outputs[0], tables, tokens_BS2, later)
        alone = len(outputs) == 1 or not torch.is_grad_enabled()
        x, divisor = outputs[0] if alone else torch.cat(outputs), self.config.logits_divisor
        return self.head(x if divisor == 1 else x / divisor)

    def _predict(
        self, h_BSH: Tensor, tables: Mapping[int, tuple[Tensor, Tensor]], tokens: Tensor, later: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """What the head takes of each depth of multi-token prediction [B, S, H]; `tokens` int64 [B, S, 2 + D]."""
        blocks = (block for block in self.blocks() if isinstance(block, PredictionBlock))
        for depth, (block, embedded_BSH) in enumerate(zip(blocks, later, strict=True), 1):
            numbered_BS2 = torch.stack((tokens[..., 0], tokens[..., 1 + depth]), -1)
            h_BSH = block(h_BSH, *tables[block.rotary_dim], numbered_BS2, embedded_BSH)
            yield h_BSH

    def _embed(self, id_BS: Tensor) -> Tensor:
        assert self.embed is not None
        out: Tensor = self.embed(id_BS).to(self.dtype)
        factor = self.config.embedding_multiplier
        return out if factor == 1 else out * factor

    def _embed_ahead(self, x: Tensor, ahead_BSD: Tensor) -> tuple[Tensor, ...]:
        """The stream and the embeddings of the D tokens after each one [B, S, H], looked up together."""
        id_DBS = ahead_BSD.movedim(-1, 0)
        if not self.first:
            return x, *self._embed(id_DBS.flatten(0, 1)).chunk(len(id_DBS))
        id_DBS = torch.cat((x[None], id_DBS))
        return self._embed(id_DBS.flatten(0, 1)).chunk(len(id_DBS))

    def _rotary(self, tokens: int, device: torch.device) -> dict[int, tuple[Tensor, Tensor]]:
        """Tables of the positions [S, d] for every size d that a block turns, made once for all passes of as many
        tokens."""
        if torch.compiler.is_compiling():
            return self._angles(tokens, device)
        held = tokens, device, self.positions
        if self._tables is None or self._tables[0][:2] != held[:2] or self._tables[0][2] is not held[2]:
            # Made within inference they could not be used in training.
            with torch.inference_mode(False), torch.no_grad():
                self._tables = held, self._angles(tokens, device)
        return self._tables[1]

    def _angles(self, tokens: int, device: torch.device) -> dict[int, tuple[Tensor, Tensor]]:
        positions = torch.arange(tokens, device=device) if self.positions is None else self.positions
        theta, scaling, length = self.config.rope_theta, self.config.rope_scaling, 0
        if scaling is not None and scaling.kind == "longrope":
            length = self.length or (tokens if self.positions is None else int(positions.max()) + 1)
        sizes = {block.rotary_dim for block in self.blocks()}
        return {size: rotary_angles(positions, size, theta, scaling, length) for size in sorted(sizes)}
