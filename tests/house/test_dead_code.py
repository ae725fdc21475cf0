"""What serves tests alone is in tests/; a property that nothing reads is not kept."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.house.source import place, python_files, tree


def imports_for_tests(files: Iterable[Path]) -> list[str]:
    """Imports of what serves tests: pytest, hypothesis, tools of torch."""
    found = []
    for path in files:
        for node in ast.walk(tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if any(name.startswith(("torch.testing", "pytest", "hypothesis")) for name in names):
                found.append(place(path, node))
    return found


def properties(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef) and "property" in map(
            ast.unparse, node.decorator_list
        ):
            yield node


def unread_properties(files: list[Path]) -> list[str]:
    """Properties whose name no attribute access has."""
    nodes = (node for path in files for node in ast.walk(tree(path)))
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return [
        f"{place(path, node)}: {node.name}"
        for path in files
        for node in properties(path)
        if node.name not in read
    ]


def test_the_package_imports_nothing_for_tests() -> None:
    assert imports_for_tests(python_files("dsv2_train")) == []


def test_every_property_is_read() -> None:
    assert unread_properties(list(python_files("dsv2_train"))) == []


def test_what_is_dead_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "from torch.testing._internal.distributed.fake_pg import FakeStore\n"
        "class A:\n    @property\n    def unread(self) -> int:\n        return 1\n"
    )
    assert len(imports_for_tests([tmp_path / "a.py"])) == 1
    assert len(unread_properties([tmp_path / "a.py"])) == 1
