"""An option that nothing reads is a lie: every config field is read outside config/."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import NamedTuple, get_args

from pydantic import BaseModel

from dsv2_train.config.run import RunConfig
from tests.house.source import PACKAGE, python_files, tree


class Leaf(NamedTuple):
    """A config field that holds a value: its place, and the class that declares it."""

    section: str
    class_name: str
    name: str


def leaves(model: type[BaseModel], section: str = "config") -> Iterator[Leaf]:
    for name, field in model.model_fields.items():
        annotation = field.annotation
        options = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if inner:
            yield from leaves(inner[0], name)
        else:
            yield Leaf(section, model.__name__, name)


def reads(files: Iterable[Path]) -> set[tuple[str, str]]:
    """Every attribute that is read, as (what it is read from, its name).

    `self._recipe.num_steps`, `config.recipe.num_steps` and `recipe.num_steps` are all
    ("recipe", "num_steps"); where an argument is annotated, its class is an owner as well.
    """
    found: set[tuple[str, str]] = set()
    for path in files:
        module = tree(path)
        for node in ast.walk(module):
            if isinstance(node, ast.Attribute):
                owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
                found.add((last_word(owner), node.attr))
            elif isinstance(node, ast.FunctionDef):
                found |= reads_of_arguments(node, module)
    return found


def reads_of_arguments(function: ast.FunctionDef, module: ast.Module) -> set[tuple[str, str]]:
    """Reads from annotated arguments, by class; `getattr` reads whatever the file has words for."""
    classes = {
        argument.arg: ast.unparse(argument.annotation)
        for argument in [*function.args.args, *function.args.kwonlyargs]
        if argument.annotation is not None
    }
    found: set[tuple[str, str]] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add((classes.get(node.value.id, ""), node.attr))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            owner = classes.get(getattr(node.args[0], "id", ""), "")
            words = (n.value for n in ast.walk(module) if isinstance(n, ast.Constant))
            found |= {(owner, word) for word in words if isinstance(word, str)}
    return found


def last_word(name: str) -> str:
    return name.strip("_").rpartition("_")[2]


def fields_behind_properties() -> dict[str, set[str]]:
    """Properties and methods of the sections: which fields of `self` each one reads."""
    behind: dict[str, set[str]] = {}
    for path in (PACKAGE / "config").rglob("*.py"):
        for function in ast.walk(tree(path)):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self":
                        behind.setdefault(function.name, set()).add(node.attr)
    return behind


def unused(config: type[BaseModel], read: set[tuple[str, str]]) -> list[str]:
    behind = fields_behind_properties()
    while more := {(who, f) for who, name in read for f in behind.get(name, ())} - read:
        read = read | more
    return [
        f"{leaf.section}.{leaf.name}"
        for leaf in leaves(config)
        if not {(last_word(leaf.section), leaf.name), (leaf.class_name, leaf.name)} & read
    ]


def outside_config() -> Iterator[Path]:
    return (p for p in python_files("dsv2_train") if "config" not in p.relative_to(PACKAGE).parts)


def test_every_field_is_read() -> None:
    assert unused(RunConfig, reads(outside_config())) == []


def test_a_field_that_nothing_reads_is_found() -> None:
    class Idle(BaseModel):
        run: RunConfig
        never_read: int

    assert unused(Idle, reads(outside_config())) == ["config.never_read"]
    assert "recipe.num_steps" in unused(RunConfig, set())
