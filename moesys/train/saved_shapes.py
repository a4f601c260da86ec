"""The tensors that a checkpoint holds, by name and shape, and those that do not fit a model. Needs no torch.

`torch.distributed.checkpoint` describes its tensors in `.metadata`, a pickle of torch's classes. A launcher reads it
before workers start, where importing torch would take seconds: stand-ins take the place of these classes.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from moesys.config.schema import ModelConfig
from moesys.models.size import weights
from moesys.train.manifest import Meta, damaged, verify

METADATA = ".metadata"

CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}
"""Module → names that `.metadata` may use beside those of torch's types: classes that hold data, and one function that
looks a layout up."""

OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "BINPUT", "POP", "POP_MARK",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "SHORT_BINUNICODE", "BINUNICODE",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS",
    "GLOBAL", "STACK_GLOBAL", "NEWOBJ", "REDUCE", "BUILD",
}  # fmt: skip
"""Opcodes of a pickle of metadata. Others, that a flipped bit makes of these, let the unpickler ask for
gigabytes."""

GATE_BUFFER = re.compile(r"\.gate\.[^.]+$")
"""End of the name of what a gate keeps beside its weights; a checkpoint may lack it, or have it without use."""


def scan(content: bytes) -> None:
    """Raise UnpicklingError if a pickle has an opcode that no checkpoint's metadata has."""
    for opcode, _, _ in pickletools.genops(content):
        if opcode.name not in OPCODES:
            raise pickle.UnpicklingError(f"it has the opcode {opcode.name}, which no checkpoint does")


class _StandIn:
    """Takes the place of any class of torch: keeps the state that a pickle gives it."""

    def __new__(cls, *arguments: Any) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


class _ShapeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            return tuple if name == "Size" else name
        if name not in CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint does")
        return _StandIn


Shape = tuple[int, ...]


def read(meta: Meta) -> dict[str, Shape]:
    """The shape of every tensor in a checkpoint: "model.NAME" and "optimizer.NAME/SLOT".

    Raises:
        CheckpointError: `.metadata` is missing or damaged, or names what no checkpoint does.
    """
    if wrong := verify(meta.path, {n: facts for n, facts in meta.files.items() if n == METADATA}):
        raise damaged(meta.path, wrong)
    try:
        content = (meta.path / METADATA).read_bytes()
        if METADATA not in meta.files:
            scan(content)
        tensors = _ShapeUnpickler(io.BytesIO(content)).load().state_dict_metadata
        return {name: tuple(found.size) for name, found in tensors.items() if hasattr(found, "size")}
    except OSError as error:
        raise damaged(meta.path, f"{METADATA} cannot be read: {(error.strerror or str(error)).lower()}") from None
    except Exception as error:  # whatever a damaged pickle makes its reader raise
        raise damaged(meta.path, f"{METADATA} cannot be read: {str(error) or type(error).__name__}") from None


def misfits(saved: Mapping[str, Shape], model: ModelConfig, vocab_size: int) -> list[str]:
    """A sentence for each weight that the checkpoint and the model do not have alike: shape, or name.

    Args:
        saved: as `read` returns it.
    """
    wanted = {weight.name: tuple(weight.shape) for weight in weights(model, vocab_size)}
    found = {key.removeprefix("model."): shape for key, shape in saved.items() if key.startswith("model.")}
    return [*_missing(found, wanted), *_left_over(found, wanted)]


def _missing(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> Iterator[str]:
    for name, shape in wanted.items():
        if name not in found:
            yield f"{name} {list(shape)} is missing there"
        elif found[name] != shape:
            yield f"{name} has the shape {list(found[name])} there, and {list(shape)} in this model"


def _left_over(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> Iterator[str]:
    for name, shape in found.items():
        if name not in wanted and not GATE_BUFFER.search(name):
            yield f"{name} {list(shape)} is there, and not in this model"
