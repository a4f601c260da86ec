"""Files to start from, written by `moesys init`: the shipped recipes, and one made for each model without a recipe.

What a starter includes comes with the package, so it works in any folder.
"""

from __future__ import annotations

from pathlib import Path

from moesys import shipped
from moesys.config import suggest
from moesys.errors import FileError
from moesys.files import write_new
from moesys.version import __version__

OF_A_MODEL = """\
# {about}
#
#     moesys launch {file} --dry-run    # ranks, memory and traffic; starts nothing
#     moesys launch {file}
#
# A start, not a tuned recipe: change what follows to your cluster and your data. `moesys config {file}` shows
# every key with its value, `moesys config --schema` what each may be.
include:
  - {model}           # the shape; comes with moesys
  - {cluster}         # comes with moesys; or your own file with a section cluster

# The degrees multiply to the ranks of the cluster: dp · cp · tp · pp. Experts are spread over ep of dp · cp · tp.
parallel: {{dp: auto, dp_shard: full, tp: 1, cp: 1, pp: 1, ep: 8, etp: 1}}

train:
  steps: 100000
  seq_len: 4096
  global_batch: 512      # sequences of one optimizer step, over all ranks
  micro_batch: 1         # sequences that a rank computes at once
  dtype: bfloat16
  recompute: selective   # none keeps everything for backward, full keeps the least
  optimizer: {{lr: 3.0e-4, betas: [0.9, 0.95], weight_decay: 0.1, clip: 1.0}}
  schedule: {{kind: cosine, warmup: 2000}}

data:
  kind: text
  path: data/corpus                  # a folder of text
  tokenizer: data/tokenizer.json     # of Hugging Face's tokenizers
  heldout: 0.001                     # the share that only evaluation sees

output: {{checkpoint_every: 1000, keep: 3, log_every: 10}}
"""


def starters() -> dict[str, str]:
    """The names that `moesys init` knows, each with a sentence about it: whole runs first, then models."""
    known = shipped.names()
    whole = {name: path for name, path in known.items() if path.parent == shipped.CONFIGS}
    models = {name: path for name, path in known.items() if path.parent.name == "models"}
    return {name: shipped.about(path) for name, path in {**whole, **models}.items()}


def starter(name: str, file: str) -> str:
    """The text of the starter `name`, to be written to a file called `file`.

    A model has that of the shipped recipe that trains it, if there is one.

    Raises:
        FileError: there is no such name; says which may have been meant.
    """
    known = starters()
    if name not in known:
        meant = suggest.nearest(name, known)
        remedy = f"did you mean {meant}?" if meant else "moesys init lists all names"
        raise FileError(f"no configuration {name} comes with moesys\n    remedy: {remedy}")
    recipe = name if shipped.names()[name].parent == shipped.CONFIGS else _recipe(name, known)
    return _of_a_model(name, file) if recipe is None else _copied(shipped.names()[recipe], file)


def write(name: str, to: Path) -> None:
    """Write the starter `name` to the file `to`, which must not exist.

    Raises:
        FileError: it does, or cannot be written; or there is no such name.
    """
    text = starter(name, to.name)
    write_new(to, text)


def _recipe(model: str, known: dict[str, str]) -> str | None:
    """The shipped run of a model: its name is the model's, a dash and the cluster's."""
    return next((name for name in known if name.startswith(f"{model}-") and shipped.find(f"{name}.yaml")), None)


def _copied(path: Path, file: str) -> str:
    """A shipped file as it stands, save that its comments call it `file`."""
    text = path.read_text(encoding="utf-8").replace(path.relative_to(shipped.FOLDER).as_posix(), file)
    return f"{text.rstrip()}\n\n# Written by `moesys init {path.stem}`, moesys {__version__}.\n"


def _of_a_model(name: str, file: str) -> str:
    path = shipped.names()[name]
    model = path.relative_to(shipped.CONFIGS).as_posix()
    text = OF_A_MODEL.format(about=shipped.about(path), file=file, model=model, cluster="clusters/16x8gpu.yaml")
    return f"{text}\n# Written by `moesys init {name}`, moesys {__version__}.\n"
