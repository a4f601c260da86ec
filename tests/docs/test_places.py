"""The paths, names and links of the pages exist, and the tree in the README is the repository's."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import PAGES, ROOT, prose

from moesys.config import registry

ARCHITECTURE = ROOT / "docs" / "architecture.md"
FOLDERS = ("moesys", "parallel", "kernels", "launchers", "tests", "docs", "configs", "examples", "benchmarks")


def tracked() -> set[str]:
    """Every file of the repository and every folder on the way to one."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {str(part) for file in files for part in (Path(file), *Path(file).parents) if str(part) != "."}


def tree() -> list[str]:
    """The paths in the README's tree: a line names one or more, under the folder that its indentation says."""
    text = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1]
    found, above = [], dict[int, str]()
    for line in text.strip().splitlines():
        names = re.match(r" *((?:[\w.*-]+/?(?: |$))+)", line.split("  →")[0])
        if names is None:
            continue
        indent = len(line) - len(line.lstrip())
        here = "".join(above[i] for i in sorted(above) if i < indent)
        for name in names[1].split():
            found.append(here + name)
        above = {i: folder for i, folder in above.items() if i < indent}
        if name.endswith("/"):
            above[indent] = name
    return found


def exists(path: str) -> bool:
    """Whether something is there; a pattern needs one match."""
    return any(ROOT.glob(path.rstrip("/"))) if path else False


def test_every_path_of_the_tree_exists():
    paths = tree()
    assert len(paths) > 40 and [path for path in paths if not exists(path)] == []


def test_the_tree_names_every_folder_and_every_module_of_the_package():
    named = {path.rstrip("/") for path in tree()}
    of_package = [path for path in tracked() if re.fullmatch(r"moesys/\w+(\.py)?", path) and "__init__" not in path]
    tops = [path for path in tracked() if (ROOT / path).is_dir() and "/" not in path and not path.startswith(".")]
    assert sorted(path for path in (*of_package, *tops) if path not in named) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_modules_in_sentences_exist(page):
    wrong = [code for code in re.findall(r"`([^`\n]+)`", prose(page)) if is_place(code) and not there(code)]
    assert wrong == []


SLOTS = {slot.group for slot in vars(registry).values() if isinstance(slot, registry.Slot)}
"""Groups of entry points: they look like modules."""


def is_place(code: str) -> bool:
    """Whether it is written as a path of the repository or a name in the package, and stands for nothing else."""
    path = re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./*-]*", code)
    module = re.fullmatch(r"moesys(\.(?!json$)\w+)+", code)
    return bool(path or module) and code not in SLOTS


def there(code: str) -> bool:
    """Whether a path exists, or a module defines what is named."""
    if "/" in code:
        return exists(code.split(":")[0])
    parts = code.split(".")
    for cut in range(len(parts), 0, -1):
        for path in (ROOT.joinpath(*parts[:cut]).with_suffix(".py"), ROOT.joinpath(*parts[:cut], "__init__.py")):
            if path.is_file():
                rest = parts[cut : cut + 1]
                return not rest or re.search(rf"\b{rest[0]}\b", path.read_text()) is not None
    return False


QUESTIONS = {
    "Where is a gate defined?": ("moesys/models/parts/gates/", r'kind = "top_k"'),
    "Where are tokens dispatched?": ("parallel/dispatchers/", r"class AllToAllDispatcher"),
    "What decides whether a YAML is legal?": ("moesys/config/schema.py", r"class Config\("),
    "Where is a step's time explained?": ("moesys/measure/explain/", r"def explain\("),
    "Where is Ray started?": ("launchers/ray_cluster.py", r"ray\.init\("),
}
"""The first place that a page names for a question, and what must be found there."""


@pytest.mark.parametrize("page", [ROOT / "README.md", ARCHITECTURE], ids=lambda page: page.name)
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_newcomer_finds_it_in_one_guess(page, question):
    (row,) = re.findall(rf"^\| {re.escape(question)} \|(.*)\|$", page.read_text(), re.MULTILINE)
    path, found = QUESTIONS[question]
    assert row.split("`")[1] == path
    files = [ROOT / path] if path.endswith(".py") else list((ROOT / path).glob("*.py"))
    assert any(re.search(found, file.read_text()) for file in files)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[str, str]]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"https?:", target):
            yield target.partition("#")[0], target.partition("#")[2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    from yaml_reference import pages as made

    made_pages = {*made(), "reference/commands.md", "reference/api.md", "reference/configurations.md"}
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        if page.parent.name == "docs" and path in made_pages:
            continue
        assert target.exists(), f"{page.name}: {path}"
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), f"{page.name}: {path}#{anchor}"
