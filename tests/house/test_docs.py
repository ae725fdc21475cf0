"""Documents name files, tests and config fields: all of them exist; no file lacks in the tree."""

import ast
import re
from pathlib import Path
from types import UnionType
from typing import get_args

import pytest
from pydantic import BaseModel

from dsv2_train.config.run import RunConfig
from tests.house.source import PACKAGE, ROOT, tree

PAPER_MAP = ROOT / "docs" / "paper_map.md"
README = ROOT / "README.md"
JOURNEY = ROOT / "docs" / "journey.md"
FOLDERS = ("benchmarks", "docker", "docs", "kernels")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))])
MAX_WORDS = 8


def table_rows(path: Path) -> list[list[str]]:
    """Cells of every row of the four-column tables, headers left out."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if len(row) == 4 and row[0].strip("- ") not in ("", "Paper")]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def has_field(path: str) -> bool:
    model: object = RunConfig
    for name in path.split("."):
        options = get_args(model) if isinstance(model, UnionType) else (model,)
        models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not models or name not in models[0].model_fields:
            return False
        model = models[0].model_fields[name].annotation
    return True


def place(path: str, folder: Path) -> Path:
    """Paths are below a folder, those of the kernels below the root."""
    return (ROOT if path.startswith("kernels/") else folder) / path


def has_test(name: str) -> bool:
    file, _, function = name.partition("::")
    path = place(file, ROOT / "tests")
    return path.is_file() and function in {
        node.name for node in tree(path).body if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("row", table_rows(PAPER_MAP), ids=lambda row: row[0][:40])
def test_a_row_of_the_paper_map_names_what_exists(row: list[str]) -> None:
    _, fields, modules, tests = map(quoted, row)
    assert fields and modules and tests
    assert [field for field in fields if not has_field(field)] == []
    assert [module for module in modules if not place(module, PACKAGE).is_file()] == []
    assert [test for test in tests if not has_test(test)] == []


def test_the_paper_map_has_rows() -> None:
    assert len(table_rows(PAPER_MAP)) > 20
    assert not has_field("model.no_such_field")
    assert not has_test("unit/recipe/test_clock.py::test_nothing")


def tree_of_readme() -> dict[str, str]:
    """File -> its description, from the fenced tree; a line that ends in `/` opens a folder."""
    block = re.search(
        r"^## The tree$.*?^```\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE
    )
    assert block is not None, "README.md has no fenced tree under '## The tree'"
    folders: list[tuple[int, str]] = []
    files: dict[str, str] = {}
    for line in block[1].splitlines():
        name, _, description = line.strip().partition(" ")
        indent = len(line) - len(line.lstrip())
        folders = [folder for folder in folders if folder[0] < indent]
        if name.endswith("/"):
            folders.append((indent, name))
        else:
            files["".join(folder for _, folder in folders) + name] = description.strip()
    return files


def test_the_tree_of_the_readme_is_the_tree() -> None:
    there = {
        str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"
    }
    told = {file for file in tree_of_readme() if file.startswith("dsv2_train/")}
    assert sorted(told - there) == [], "in README.md only"
    assert sorted(there - told) == [], "missing in README.md"


def test_the_journey_lists_the_files_that_name_megatron_core() -> None:
    names = re.compile(r"^\s*(from|import) megatron\b|\"megatron\.", re.MULTILINE)
    there = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if names.search(path.read_text())
    }
    section = JOURNEY.read_text().split("## Where megatron-core is named")[1].split("\n## ")[0]
    assert set(re.findall(r"`([\w/]+\.py)`", section)) == there


def test_a_file_is_described_in_few_words() -> None:
    wordy = {f: words for f, words in tree_of_readme().items() if len(words.split()) > MAX_WORDS}
    assert wordy == {}
    assert [file for file, words in tree_of_readme().items() if not words] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []
