"""The base class of gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from moesys.moe.routing import GateOutput, MicroBatch, Tokens


class Gate(nn.Module):
    """Maps tokens x [T, H] to a `GateOutput`.

    Attributes:
        experts: E, the experts that the gate chooses from.
        forced: if set, names the experts [T, k] of tokens in place of gates that send every token to k.
        counts_first: whether the gate must know the global batch's statistics before a step's first forward
            pass; see `before_step`.
    """

    experts: int
    forced: Callable[[Tokens], Tensor] | None = None
    counts_first: bool = False

    def forward(self, x_TH: Tensor, tokens: Tokens, scope: MicroBatch) -> GateOutput:
        """The output for this device's tokens; `scope` gives statistics over all tokens of the micro-batch."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self.get_buffer(name)
            if new.is_floating_point() and new.dtype.itemsize < old.dtype.itemsize:
                # Buffers change by small steps, which bfloat16 would round away.
                self._buffers[name] = old.to(new.device)
        return self

    def state_dict_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers to be saved with the model."""
        left_out = self._non_persistent_buffers_set
        return ((name, buffer) for name, buffer in self.named_buffers() if name not in left_out)

    def reset_state(self) -> None:
        """Give buffers their initial values (a model is built on the meta device)."""

    def reset_parameters(self) -> None:
        """`reset_state`, under torch's name for the initialisation after `to_empty`."""
        self.reset_state()

    def count(self, counted: Tensor) -> None:
        """Add `GateOutput.counted` to the step's statistics: called once per pass, however often that runs.

        `counted` is a vector [N], its length the gate's own.
        """

    def step_statistics(self) -> Tensor | None:
        """A vector to sum over all devices that hold tokens of the global batch, or None."""
        return None

    def before_step(self, total: Tensor) -> None:
        """Take the sum of `step_statistics` of a forward-only pass over the global batch, if the gate `counts_first`.

        `total` is a vector [N], its length the gate's own.

        It is called before the step's own forward passes. A step of one micro-batch does not call it: its pass sums
        over the devices itself (`MicroBatch.sum_global`).
        """

    def after_step(self, total: Tensor) -> None:
        """Take the sum of `step_statistics`, once after each optimizer step.

        `total` is a vector [N], its length the gate's own.
        """

    def skip_step(self) -> None:
        """Forget the statistics of a step that the optimizer skipped, in place of `after_step`, if the host knows."""
