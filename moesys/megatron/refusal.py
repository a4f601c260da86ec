"""The error of a Megatron-Core configuration that the plug-in refuses."""

from __future__ import annotations

from collections.abc import Sequence

from moesys.errors import ConfigError, MoesysError, Problem


class Refusal(ConfigError):
    """A `ConfigError` that keeps its text through Megatron-Core's `build_module`.

    `build_module` creates every error again from its text and the name of the module, once for each enclosing module.
    Such text is kept, without these names.
    """

    def __init__(self, problems: Sequence[Problem] | str):
        if isinstance(problems, str):
            self.problems = ()
            MoesysError.__init__(self, problems.partition(" when instantiating ")[0])
        else:
            super().__init__(problems)
