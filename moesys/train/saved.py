"""What a command's RUN, CHECKPOINT or FOLDER is, and the configuration it was trained with. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from moesys.config.differences import known
from moesys.config.schema import Config
from moesys.data.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer
from moesys.errors import CheckpointError, FileError
from moesys.hub.folder import CONFIG, is_folder
from moesys.train.manifest import META, Meta, damaged, newest_good

AGAIN = "let its run go on for a step (train.steps), which saves a new one"


def find(path: Path) -> Path:
    """The checkpoint or released model that `path` names: itself, or the newest good checkpoint of a run.

    Raises:
        FileError: it is none of these.
    """
    if is_folder(path) or (path / META).is_file():
        return path
    for folder in (path / "checkpoints", path):
        if (found := newest_good(folder)) is not None:
            return found
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
    elif (path / "config.yaml").is_file():
        what = "is a run without a checkpoint"
    else:
        what = f"has neither {CONFIG} nor a checkpoint"
    remedy = "name a run's folder, such as runs/quickstart, one of its checkpoints, or a released model's folder"
    raise FileError(f"{path} {what}\n    remedy: {remedy}")


def configuration(meta: Meta) -> Config:
    """The configuration that a checkpoint of any version was written with, with the resolved size of its vocabulary.

    Keys of training that this version does not know are left out.

    Raises:
        CheckpointError: the checkpoint has a part of it alone, or this version does not know one of the model's keys
            or any value, which may change numbers.
    """
    if not meta.whole:
        raise CheckpointError(
            f"{meta.path} was written before checkpoints kept their configuration\n    remedy: {AGAIN}"
        )
    tree, others = known(meta.config)
    unknown = [key for key in others if key.startswith("model.")]
    remedy = f"use the version that wrote it, which {META} names"
    if unknown:
        raise CheckpointError(f"{meta.path} has keys of another version: {', '.join(unknown)}\n    remedy: {remedy}")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        rule = f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
        text = f"{meta.path}: its configuration is of another version: {rule}"
        raise CheckpointError(f"{text}\n    remedy: {remedy}") from None


def tokenizer(meta: Meta, config: Config) -> Tokenizer:
    """The tokenizer of a checkpoint, which lies in it.

    Raises:
        CheckpointError: its data were tokens already, of a tokenizer that nobody named; or it is damaged.
    """
    if config.data.kind == "megatron" and config.data.tokenizer == "bytes":
        rule = "was trained on tokens of another tool, whose tokenizer the run did not name"
        remedy = f"set data.tokenizer to their tokenizer.json, and {AGAIN}"
        raise CheckpointError(f"{meta.path} {rule}\n    remedy: {remedy}")
    if config.data.tokenizer == "bytes":
        return ByteTokenizer()
    name = meta.tokenizer.get("kind")
    if not isinstance(name, str) or not (meta.path / name).is_file():
        raise damaged(meta.path, "the tokenizer is missing")
    return HFTokenizer(meta.path / name)
