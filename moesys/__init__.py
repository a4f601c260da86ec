"""moesys: launch, choose and measure the training of Mixture-of-Experts language models.

As a library it offers the names in `__all__`; docs/library.md shows them at work. Each is imported when it is first
used: `import moesys` alone loads neither torch, nor pydantic, nor Ray.

    layer = moesys.MoELayer(moesys.TopKGate(512, experts=8, top_k=2), moesys.Experts(8, 512, 1024))
    y = layer(torch.randn(4, 128, 512))    # [batch, sequence, hidden]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moesys.version import __version__ as __version__

if TYPE_CHECKING:  # the same names for type checkers and editors; a test compares both lists
    from moesys.config.schema import Config as Config
    from moesys.errors import ConfigError as ConfigError
    from moesys.errors import MoesysError as MoesysError
    from moesys.measure.explain.explanation import Explanation as Explanation
    from moesys.measure.record.loop_recorder import CommunicationRecorder as CommunicationRecorder
    from moesys.moe.capacity import Capacity as Capacity
    from moesys.moe.experts import Experts as Experts
    from moesys.moe.gates.expert_choice import ExpertChoiceGate as ExpertChoiceGate
    from moesys.moe.gates.gate import Gate as Gate
    from moesys.moe.gates.top_k import TopKGate as TopKGate
    from moesys.moe.layer import MoELayer as MoELayer
    from moesys.moe.layer import moe_layers as moe_layers
    from moesys.moe.losses import Balance as Balance
    from moesys.parallel.clip import clip_grad_norm_ as clip_grad_norm_
    from moesys.parallel.user_model import expert_parallel as expert_parallel
    from moesys.parallel.user_model import update_gates as update_gates
    from moesys.train.library import build_moe_layer as build_moe_layer
    from moesys.train.library import build_trainer as build_trainer
    from moesys.train.library import load_config as load_config
    from moesys.train.loop import Trainer as Trainer

_MODULES = {
    "Balance": "moesys.moe.losses",
    "Capacity": "moesys.moe.capacity",
    "CommunicationRecorder": "moesys.measure.record.loop_recorder",
    "Config": "moesys.config.schema",
    "ConfigError": "moesys.errors",
    "ExpertChoiceGate": "moesys.moe.gates.expert_choice",
    "Experts": "moesys.moe.experts",
    "Explanation": "moesys.measure.explain.explanation",
    "Gate": "moesys.moe.gates.gate",
    "MoELayer": "moesys.moe.layer",
    "MoesysError": "moesys.errors",
    "TopKGate": "moesys.moe.gates.top_k",
    "Trainer": "moesys.train.loop",
    "build_moe_layer": "moesys.train.library",
    "build_trainer": "moesys.train.library",
    "clip_grad_norm_": "moesys.parallel.clip",
    "expert_parallel": "moesys.parallel.user_model",
    "load_config": "moesys.train.library",
    "moe_layers": "moesys.moe.layer",
    "update_gates": "moesys.parallel.user_model",
}
"""The module of every public name."""

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    """A public name, from its module (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
