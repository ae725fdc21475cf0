"""What is written: ASCII, no promises instead of code, no module state, the glossary's words."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.house.source import CUDA_SUFFIXES, ROOT, place, python_files, tree

TEXT_SUFFIXES = {".py", ".sh", ".yaml", ".toml", ".md", ".txt", ".env", ""} | CUDA_SUFFIXES
TEXT_FOLDERS = (
    *("dsv2_train", "tests", "benchmarks", "configs", "docs"),
    "docker",
    "kernels",
    "launch",
)
PROMISES = re.compile(r"\b(TODO|FIXME|XXX|HACK|WIP)\b")
MACHINE_PATHS = re.compile(r"(?<![\w.])/(work|root|tmp/v)/")

# docs/glossary.md says what to use instead.
FORBIDDEN_NAMES = re.compile(
    r"^(iteration|iterations|iter_num|global_step|num_iters|train_iters|d_model|n_layers?|n_heads?"
    r"|n_experts?|head_dim_qk|aux_loss|lb_loss|micro_batch|microbatch_size|mp_size|xp_size"
    r"|expert_weight|overflow|snapshot|dump|engine|utilization|mem|bs)$"
)


def text_files() -> Iterator[Path]:
    folders = [ROOT / folder for folder in TEXT_FOLDERS]
    files = [path for folder in folders for path in sorted(folder.rglob("*"))]
    for path in [*files, *sorted(ROOT.glob("*"))]:
        ours = not {"__pycache__", "results"} & set(path.parts)
        if path.is_file() and path.suffix in TEXT_SUFFIXES and ours:
            yield path


def lines_with(pattern: re.Pattern[str], files: Iterator[Path]) -> list[str]:
    return [
        f"{place(path)}:{number}: {line.strip()}"
        for path in files
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if pattern.search(line)
    ]


def defined_names(module: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Names a file chooses: functions, classes, arguments and what it assigns to."""
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node, node.name
        elif isinstance(node, ast.arg):
            yield node, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node, node.id


def forbidden_names(path: Path) -> list[str]:
    module = tree(path)
    return [
        f"{place(path, node)}: {name}"
        for node, name in [(module, path.stem), *defined_names(module)]
        if FORBIDDEN_NAMES.match(name.strip("_").lower())
    ]


def module_state(path: Path) -> list[str]:
    """`global` statements, and module-level names that are neither constants nor types."""
    module = tree(path)
    found = [place(path, node) for node in ast.walk(module) if isinstance(node, ast.Global)]
    for node in module.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        variables = [n for n in names if n.strip("_")[:1].islower() and not n.startswith("__")]
        found += [f"{place(path, node)}: {name}" for name in variables]
    return found


def test_everything_is_ascii() -> None:
    assert lines_with(re.compile(r"[^\x00-\x7f]"), text_files()) == []


def test_nothing_is_promised() -> None:
    assert lines_with(PROMISES, text_files()) == []


def test_no_file_names_the_machine_it_was_written_on() -> None:
    assert lines_with(MACHINE_PATHS, text_files()) == []


def test_no_module_has_state() -> None:
    assert [line for path in python_files("dsv2_train") for line in module_state(path)] == []


def test_names_are_those_of_the_glossary() -> None:
    files = python_files("dsv2_train", "benchmarks", "kernels")
    assert [line for path in files for line in forbidden_names(path)] == []


def test_a_file_is_named_by_the_glossary_too(tmp_path: Path) -> None:
    (tmp_path / "utilization.py").write_text("")
    assert len(forbidden_names(tmp_path / "utilization.py")) == 1


def test_imports_are_absolute() -> None:
    relative = [
        place(path, node)
        for path in python_files()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


@pytest.mark.parametrize(
    ("source", "finder"),
    [
        ("def f(global_step: int) -> None: ...\n", forbidden_names),
        ("iteration = 3\n", forbidden_names),
        ("class Engine: ...\n", forbidden_names),
        ("cache = {}\n", module_state),
        ("def f() -> None:\n    global X\n    X = 1\n", module_state),
    ],
)
def test_what_is_forbidden_is_found(
    tmp_path: Path, source: str, finder: Callable[[Path], list[str]]
) -> None:
    (tmp_path / "bad.py").write_text(source)
    assert len(finder(tmp_path / "bad.py")) == 1
