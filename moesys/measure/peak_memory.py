"""The peak memory of a computation in bytes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch

from moesys.kernels.cpu import memory_pool


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors alive at once during `step`, beyond those alive before it.

    On CPU it counts tensors of this thread, and large ones that kernels allocate in any thread.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        memory_pool.recorded() as kernels,
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = sorted([*kernels, *((e.start_ns(), e.nbytes()) for e in events)], key=lambda change: change[0])
    return max(accumulate((bytes_ for _, bytes_ in changes), initial=0))
