"""A plain decoder of blocks, or any consecutive part of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from moesys.models.block import Block
from moesys.models.layers import Linear, RMSNorm
from moesys.models.rotary import rotary_angles
from moesys.models.size import by_name

if TYPE_CHECKING:
    from moesys.config.schema import ModelConfig


class Embedding(nn.Embedding):
    """Token embedding [B, S] int64 → [B, S, H]."""


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head.

    A pipeline stage is the same class with parts removed (`keep`): blocks keep their global numbers,
    so that a parameter's name does not depend on the layout.

    Attributes:
        dtype: type of the stream between blocks.
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
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in range(config.depth)})
        self.norm: RMSNorm | None = RMSNorm(config.hidden, config.norm_eps)
        self.head: Linear | None = Linear(config.hidden, vocab_size, bias=False)
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
        """Its blocks, in order."""
        return cast("list[Block]", list(self.layers.values()))

    def keep(self, layers: range, first: bool, last: bool) -> Decoder:
        """Remove all but these layers, the embedding unless `first`, norm and head unless `last`."""
        for name in list(self.layers):
            if int(name) not in layers:
                del self.layers[name]
        if not first:
            self.embed = None
        if not last:
            self.norm = self.head = None
        return self

    def forward(self, x: Tensor, tokens_BS2: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] of tokens int64 [B, S]; a stage takes and gives its part, stream [B, S, H].

        `tokens_BS2` int64 [B, S, 2]: number and id of each token, for MoE layers (`MoELayer.forward`).
        """
        if self.embed is not None:
            x = self.embed(x).to(self.dtype)
        tables = self._rotary(x.shape[1], x.device)
        for block in self.blocks():
            x = block(x, *tables[block.rotary_dim], tokens_BS2)
        if self.head is not None and self.norm is not None:
            x = self.head(self.norm(x))
        return x

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
