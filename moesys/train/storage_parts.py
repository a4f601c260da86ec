"""Rectangular parts of a tensor, as `torch.distributed.checkpoint` writes and reads them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from moesys.errors import CheckpointError
from moesys.train.manifest import damaged
from moesys.train.storage import Reader, read_metadata


class Parts(Tensor):
    """The rectangular parts of a tensor that this rank holds, as `torch.distributed.checkpoint` asks for them.

    Args:
        shape: of the whole tensor.
        dtype: of the parts.
    """

    held: dict[tuple[int, ...], Tensor]
    """By their first elements."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype) -> Parts:
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        made.held = {}
        return made

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(first), part.size()) for first, part in self.held.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.held[tuple(index.offset)]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{function} of the parts of a tensor")


class PartReader:
    """Reads parts of a checkpoint's tensors in one process, without the rest.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """

    def __init__(self, folder: Path):
        self.folder, self.metadata = folder, read_metadata(folder)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, by its name in the model.

        Raises:
            CheckpointError: the checkpoint lacks it.
        """
        found = self.metadata.state_dict_metadata.get(f"model.{name}")
        if not isinstance(found, TensorStorageMetadata):
            raise damaged(self.folder, f"it lacks {name}")
        return tuple(found.size)

    def read(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The part of a weight of shape `size` that begins at `start`, float32."""
        parts = Parts(self.shape(name), torch.float32)
        out = parts.held[start] = torch.empty(size)
        try:
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                dcp.load({"model": {name: parts}}, storage_reader=Reader(self.folder, self.metadata), no_dist=True)
        except CheckpointError:
            raise
        except Exception as error:  # whatever a damaged file makes its reader raise
            raise damaged(self.folder, f"{name} cannot be read: {str(error).strip().splitlines()[-1]}") from None
        return out
