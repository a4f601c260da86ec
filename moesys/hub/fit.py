"""Whether a folder's tensors are those of a model: every weight is filled, every tensor is taken. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesys.config.schema import ModelConfig
from moesys.errors import FileError
from moesys.hub.family import Family, families
from moesys.hub.folder import Folder
from moesys.hub.mapping import Stored

SAME = "name the folder that the model section is of, or copy its files again"


@dataclass(frozen=True)
class Fit:
    """How a folder's tensors fill a model.

    Attributes:
        stored: by our weights' names, gates' buffers included, the tensors that hold them.
        left_out: tensors of the files that are not used, on purpose.
    """

    folder: Folder
    family: Family
    stored: dict[str, Sequence[Stored]]
    left_out: list[str]


def fit(folder: Folder, model: ModelConfig, vocab_size: int) -> Fit:
    """How `folder` fills `model`; reads headers alone.

    Raises:
        FileError: a tensor is missing, left over or of another shape, or a file is damaged; names it.
    """
    family = family_of(folder)
    each = stored(family, model, vocab_size)
    found, path = folder.decoded, folder.path
    for weight, tensors in each.items():
        for s in tensors:
            if s.name not in found:
                where = f"{path} lacks {s.name}, which {weight} is filled from"
                raise FileError(f"{where}\n    remedy: {SAME}")
            if found[s.name].shape != s.shape:
                file = found[s.name].entries[0].file
                rule = f"{s.name} has the shape {list(found[s.name].shape)}, and {weight} needs {list(s.shape)}"
                raise FileError(f"{file}: {rule}\n    remedy: {SAME}")
    taken = {s.name for tensors in each.values() for s in tensors}
    left_out = [name for name in found if name not in taken]
    for name in left_out:
        if not family.is_left_out(name, model):
            file = found[name].entries[0].file
            raise FileError(f"{file}: {name} belongs to no weight of this model\n    remedy: {SAME}")
    return Fit(folder, family, each, left_out)


def family_of(folder: Folder) -> Family:
    """The family of a folder.

    Raises:
        FileError: config.json names none that is known.
    """
    kind, every = folder.config.get("model_type"), families()
    if kind not in every:
        rule = f"{folder.path}/config.json: model_type is {kind!r}, and no family has this name"
        raise FileError(f"{rule}\n    remedy: one of {', '.join(every)}; docs/weights.md says how to add one")
    return every[kind]


def stored(family: Family, model: ModelConfig, vocab_size: int) -> dict[str, Sequence[Stored]]:
    """By our weights' names, the tensors that hold them.

    Raises:
        FileError: the family's files have no such weight.
    """
    found: dict[str, Sequence[Stored]] = {}
    name = ""
    try:
        for weight in family.weights(model, vocab_size):
            name = weight.name
            found[name] = family.stored(weight, model)
    except KeyError:
        rule = f"files of {family.kind} have no tensor for {name}, which this model has"
        raise FileError(f"{rule}\n    remedy: choose another family, or remove the part from the model") from None
    return found
