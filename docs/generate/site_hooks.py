"""Additions of the site to the pages of docs/: references, shipped configurations, and files outside of docs/.

mkdocs calls the functions by their names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import api_reference
import command_reference
import yaml_reference
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from moesys import shipped

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATIONS = "reference/configurations.md"
OUTSIDE = re.compile(r"\]\(\.\./([\w./-]+)")
"""A link from a page of docs/ to a file beside docs/."""


def on_config(config: Any) -> None:
    """Give each page of YAML keys its place in the navigation."""
    lacking = [*yaml_reference.unexplained(), *api_reference.undocumented()]
    if lacking:
        raise PluginError(f"without a meaning or a docstring: {', '.join(lacking)}")
    pages = [{title(path): path} for path in yaml_reference.pages() if path != yaml_reference.INDEX]
    for section in config.nav:
        for item in next(iter(section.values())):
            if isinstance(item, dict) and yaml_reference.INDEX in item.values():
                item[next(iter(item))] = [{"All keys": yaml_reference.INDEX}, *pages]


def title(path: str) -> str:
    """The name of a page of YAML keys in the navigation."""
    return path.removeprefix("reference/yaml-").removesuffix(".md")


def on_files(files: Files, config: Any) -> Files:
    """Add the made pages, and the files outside of docs/ that pages link to."""
    written = files.documentation_pages()
    made = {
        **yaml_reference.pages(),
        command_reference.PAGE: command_reference.page(),
        api_reference.PAGE: api_reference.page(),
        CONFIGURATIONS: configurations(),
    }
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    for name in sorted({name for file in written for name in OUTSIDE.findall(file.content_string)}):
        files.append(File.generated(config, f"files/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to files outside of docs/ lead to their copies in the site."""
    return OUTSIDE.sub(r"](files/\1", markdown) if "/" not in page.file.src_uri else markdown


def configurations() -> str:
    """Every configuration that comes with the package, whole."""
    lines = ["# Shipped configurations", "", "`moesys config --list` lists them; every command finds them by name.", ""]
    for name, about in shipped.configs():
        text = (shipped.FOLDER / name).read_text(encoding="utf-8").rstrip()
        lines += [f"## `{name}`", "", about, "", "```yaml", text, "```", ""]
    return "\n".join(lines)
