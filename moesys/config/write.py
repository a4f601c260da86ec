"""A configuration written out: as YAML, and its schema for editors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from moesys.config.read import CORE_SCHEMA
from moesys.config.registry import GATES, MIXERS, Slot, used
from moesys.config.schema import Config, Section
from moesys.config.secret import hidden
from moesys.config.sweep import SweepFile


class _Dumper(yaml.SafeDumper):
    """Short lists in one line; text quoted that YAML 1.1 or 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, (_pattern, _first) in CORE_SCHEMA.items():
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)


def _list(dumper: yaml.SafeDumper, items: Sequence[object]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML folds line breaks other than \n away unless they are escaped.
    style = '"' if set(text) & set("\n\r\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(list, _list)
_Dumper.add_representer(tuple, _list)
_Dumper.add_representer(str, _text)


def dump(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads: every key with its value, without secrets (secret.py) and
    without keys that belong to other kinds."""
    return text(_of_its_kinds(hidden(config).model_dump()))


def text(tree: dict[str, Any]) -> str:
    """A part of a configuration as YAML that `load` reads."""
    written: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return written


def _of_its_kinds(tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` with the keys that the kinds of its mixers and gate use."""
    model = tree["model"]
    model["attention"] = _used(MIXERS, model["attention"])
    model["mixers"] = {name: _used(MIXERS, mixer) for name, mixer in model["mixers"].items()}
    if model["moe"] is not None:
        model["moe"]["gate"] = _used(GATES, model["moe"]["gate"])
    return tree


def _used(slot: Slot, section: dict[str, Any]) -> dict[str, Any]:
    mine = used(slot, section["kind"])
    return {key: value for key, value in section.items() if key == "kind" or key in mine}


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a configuration's file, for editors' YAML language servers.

    No key is required: a file may leave to an included one what it does not say itself.
    """
    include = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "Files to merge under this one, relative to it; later ones win over earlier ones.",
    }
    schema = _schema(Config, required=False)
    released = {
        "description": "Folder of a released model: its config.json gives the model's keys that are not given here, "
        "and training starts from its weights (train.init).",
        "type": "string",
    }
    model = schema["$defs"]["ModelConfig"]
    model["properties"] = {"from": released, **model["properties"]}
    return {**schema, "properties": {"include": include, **schema["properties"]}}


def json_schema_of_sweeps() -> dict[str, Any]:
    """The JSON schema of a sweep's file."""
    return _schema(SweepFile, required=True)


def _schema(root: type[Section], required: bool) -> dict[str, Any]:
    from pydantic.json_schema import GenerateJsonSchema

    from moesys.config.meanings import for_editors

    class Generate(GenerateJsonSchema):
        def field_is_required(self, field: Any, total: bool) -> bool:
            return required and super().field_is_required(field, total)

        def field_title_should_be_set(self, schema: Any) -> bool:
            return False

        def model_schema(self, schema: Any) -> Any:
            """A section, each of its keys with its meaning."""
            made = super().model_schema(schema)
            for key, text in for_editors(schema["cls"]).items():
                made["properties"][key]["description"] = text
            return made

        def nullable_schema(self, schema: Any) -> Any:
            """Null last: editors show the message of the first alternative that fails."""
            return {"anyOf": [self.generate_inner(schema["schema"]), {"type": "null"}]}

    schema = root.model_json_schema(schema_generator=Generate)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}
