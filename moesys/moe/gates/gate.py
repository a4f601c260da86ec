"""What every gate is."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from moesys.moe.routing import Decision, MicroBatch, Tokens


class Gate(nn.Module):
    """Maps tokens x [T, H] to a `Decision`.

    Attributes:
        experts: E, the experts that the gate chooses from.
    """

    experts: int

    def forward(self, x_TH: Tensor, tokens: Tokens, scope: MicroBatch) -> Decision:
        """What to do with this device's tokens; `scope` answers for all tokens of the micro-batch."""
        raise NotImplementedError

    def state_dict_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers to be saved with the model."""
        left_out = self._non_persistent_buffers_set
        return ((name, buffer) for name, buffer in self.named_buffers() if name not in left_out)

    def reset_state(self) -> None:
        """Give buffers their initial values (a model is built on the meta device)."""

    def step_statistics(self) -> Tensor | None:
        """A vector to be summed over all devices that hold tokens of the global batch, or None."""
        return None

    def after_step(self, total: Tensor) -> None:
        """Called once after each optimizer step with the sum of `step_statistics`."""
