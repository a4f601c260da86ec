"""A Megatron-Core configuration that the plug-in refuses."""

from __future__ import annotations

from collections.abc import Sequence

from moesys.errors import ConfigError, MoesysError, Problem


class Refusal(ConfigError):
    """A `ConfigError` that arrives whole.

    Megatron-Core's `build_module` makes every error anew, from its text and the name of the module, once for each
    module around: such text is taken as it is, without these names.
    """

    def __init__(self, problems: Sequence[Problem] | str):
        if isinstance(problems, str):
            self.problems = ()
            MoesysError.__init__(self, problems.partition(" when instantiating ")[0])
        else:
            super().__init__(problems)
