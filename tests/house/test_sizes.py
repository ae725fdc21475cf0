"""Small files, small functions, small packages: what one reader holds in mind."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.house.source import PACKAGE, ROOT, code_lines, cuda_files, place, python_files, tree

MAX_FILE_LINES = 400
MAX_CUDA_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
MAX_FILES_A_PACKAGE = 9
MAX_LINES_OF_CODE = 15_000


def long_files(files: Iterator[Path], most: int = MAX_FILE_LINES) -> list[str]:
    return [
        f"{place(path)}: {count} lines"
        for path in files
        if (count := len(path.read_text().splitlines())) > most
    ]


def long_functions(files: Iterator[Path]) -> list[str]:
    return [
        f"{place(path, node)}: {node.name} has {count} lines"
        for path in files
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (count := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


def crowded_packages(root: Path) -> list[str]:
    packages = sorted({path.parent for path in root.rglob("*.py")})
    counts = {package: len(list(package.glob("[!_]*.py"))) for package in packages}
    return [f"{place(p)}: {n} files" for p, n in counts.items() if n > MAX_FILES_A_PACKAGE]


def too_much_code(files: Iterator[Path]) -> list[str]:
    count = sum(map(code_lines, files))
    return [f"{count} lines of code"] if count > MAX_LINES_OF_CODE else []


def test_files_are_short() -> None:
    assert long_files(python_files()) == []
    assert long_files(cuda_files(), MAX_CUDA_FILE_LINES) == []


def test_functions_are_short() -> None:
    assert long_functions(python_files("dsv2_train", "benchmarks", "kernels")) == []


def test_packages_are_not_crowded() -> None:
    assert crowded_packages(PACKAGE) == []
    assert crowded_packages(ROOT / "kernels" / "dsv2_kernels") == []
    assert crowded_packages(ROOT / "kernels" / "bench") == []


def test_the_whole_is_readable() -> None:
    assert too_much_code(python_files("dsv2_train")) == []


def test_what_is_too_large_is_found(tmp_path: Path) -> None:
    for number in range(MAX_FILES_A_PACKAGE + 1):
        (tmp_path / f"f{number}.py").write_text("x = 1\n")
    long_function = "def f() -> None:\n" + "    pass\n" * MAX_FUNCTION_LINES
    (tmp_path / "f0.py").write_text("x = 1\n" * (MAX_FILE_LINES + 1))
    (tmp_path / "f1.py").write_text(long_function)
    assert len(crowded_packages(tmp_path)) == 1
    assert long_files(iter(tmp_path.glob("*.py"))) == [f"{tmp_path / 'f0.py'}: 401 lines"]
    assert long_functions(iter([tmp_path / "f1.py"])) == [f"{tmp_path / 'f1.py'}:1: f has 81 lines"]


DOCUMENTED = '''"""What a file is for."""

# Why.
X = """
# no docstring
"""


class C:
    """What a class is for.

    Attributes:
        x: and what it holds.
    """

    x = 1  # a comment behind code

    async def f(self) -> None:
        """One line."""
'''


def test_only_code_counts(tmp_path: Path) -> None:
    path = tmp_path / "f.py"
    path.write_text(DOCUMENTED)
    assert code_lines(path) == 5
    path.write_text(DOCUMENTED + "        return None\n" * 7)
    assert code_lines(path) == 12
    path.write_text("def f() -> None:\n    pass\n    'no docstring'\n")
    assert code_lines(path) == 3
    path.write_text(DOCUMENTED + "x = 1  # one of many\n# why\n" * (MAX_LINES_OF_CODE - 5))
    assert too_much_code(iter([path])) == []
    assert too_much_code(iter([path, path])) == ["30000 lines of code"]
