"""What tests of LoRA experts do inside worker processes, importable by name."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from moesys.models.parts.axes import Weight


def draw_all_factors() -> None:
    """Let LoRA's second factors start as the first ones do: as zeros they would hide the first ones' gradients."""
    from moesys.parallel import initialise

    initialise._fill = partial(_fill, initialise._fill)  # type: ignore[assignment]


def _fill(plain: Any, parameter: Any, weight: Weight, seed: int, std: float) -> None:
    if "lora_b" in weight.name:
        weight = replace(weight, name=weight.name.replace("lora_b", "lora_second"), start=None)
    plain(parameter, weight, seed, std)
