"""The files that the house rules hold for, and their syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dsv2_train"
CUDA_SUFFIXES = {".cu", ".cuh", ".h", ".cpp"}
PYTHON_FOLDERS = ("dsv2_train", "tests", "benchmarks", "kernels")


def python_files(*folders: str) -> Iterator[Path]:
    """Python files below folders of the repository, all of them by default."""
    for folder in folders or PYTHON_FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def cuda_files() -> Iterator[Path]:
    """Sources of the kernels and of their emulation."""
    sources = sorted((ROOT / "kernels" / "csrc").rglob("*"))
    yield from (path for path in sources if path.suffix in CUDA_SUFFIXES)


def tree(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text(), filename=str(path))


def place(path: Path, node: ast.AST | None = None) -> str:
    """`file:line`, for people."""
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    return name if node is None else f"{name}:{getattr(node, 'lineno', '?')}"


def code_lines(path: Path) -> int:
    """How many lines of a file are code: no docstrings, comments and blank lines."""
    documented = {
        line
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    lines = enumerate(map(str.strip, path.read_text().splitlines()), 1)
    return sum(
        number not in documented and line != "" and not line.startswith("#")
        for number, line in lines
    )
