"""Variables that other launchers leave in the environment of a shell, and that would mislead ours.

Within `torchrun`, `mpirun` or `srun` a process is told its rank, and PyTorch that an agent keeps the store at
which ranks meet. Workers that inherit this wait for a store that nobody starts.
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
    """Whether another launcher gives its processes a variable of this name."""
    return name in NAMES or name.startswith(PREFIXES)


def cleaned(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without the variables of other launchers."""
    return {name: value for name, value in environment.items() if not is_inherited(name)}


def clear() -> None:
    """Remove them from this process's environment: for what inherits it by itself, such as Ray."""
    for name in filter(is_inherited, list(os.environ)):
        del os.environ[name]
