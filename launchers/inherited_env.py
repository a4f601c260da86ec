"""Variables that other launchers leave in the environment of a shell, and that would mislead ours.

`torchrun`, `mpirun` and `srun` give their processes a rank, and tell PyTorch that an agent runs the rendezvous store.
Workers that inherit these variables wait for a store that nobody starts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

NAMES = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
PREFIXES = ("TORCHELASTIC_", "OMPI_", "PMI_", "PMIX_", "MV2_COMM_", "MPI_LOCAL", "HYDRA_")
"""torchrun; Open MPI; the process managers of MPICH, Intel MPI and MVAPICH, and Slurm's for these."""


def is_inherited(name: str) -> bool:
    """True if another launcher gives its processes a variable of this name."""
    return name in NAMES or name.startswith(PREFIXES)


def cleaned(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without the variables of other launchers."""
    return {name: value for name, value in environment.items() if not is_inherited(name)}


def clear() -> None:
    """Remove them from this process's environment, which Ray's processes inherit."""
    for name in filter(is_inherited, list(os.environ)):
        del os.environ[name]
