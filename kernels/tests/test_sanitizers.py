"""The kernels' own source under the address and the race checker; and with mistakes in it."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsv2_kernels.native.build import SOURCES, build_emulated
from kernels.tests.mistakes import MISTAKES, Mistake

HERE = Path(__file__).parent
MODULES = sorted(
    path.stem for path in HERE.glob("test_*.py") if "\ndef exercise()" in path.read_text()
)
RUNTIMES = {"address": ("libasan.so", "libstdc++.so.6"), "thread": ("libtsan.so",)}
# A report ends the process with this status; the interpreter never frees what it holds for good.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0,exitcode=66",
    "TSAN_OPTIONS": "exitcode=66,report_signal_unsafe=0",
}


def runtime(name: str) -> str:
    asked = [shutil.which("g++") or "g++", f"-print-file-name={name}"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def at_usual_addresses() -> list[str]:
    """What starts a program at addresses that leave the race checker its own, where allowed."""
    starter = ["setarch", "--addr-no-randomize"]
    if shutil.which(starter[0]) is None:
        return []
    return starter if subprocess.run([*starter, "true"]).returncode == 0 else []


def exercised(sanitizer: str, pairs: list[tuple[str, Path]]) -> list[tuple[int, str]]:
    """Exit status and words of each (module, library)."""
    preload = " ".join(runtime(name) for name in RUNTIMES.get(sanitizer, ()))
    command = [sys.executable, str(HERE / "exercise.py"), json.dumps(pairs, default=str)]
    done = subprocess.run(
        [*at_usual_addresses(), *command],
        env={**os.environ, **OPTIONS, "LD_PRELOAD": preload, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [(status, said) for status, said in json.loads(done.stdout)]


def with_mistake(mistake: Mistake, folder: Path) -> Path:
    """A library of a copy of the sources with the mistake in it."""
    sources = folder / "csrc"
    shutil.copytree(SOURCES, sources)
    file = sources / mistake.file
    text = file.read_text()
    assert mistake.before in text, f"{mistake.file} has no {mistake.before!r}"
    file.write_text(text.replace(mistake.before, mistake.after))
    for path in sources.glob("*.cu"):
        if path.stem != mistake.op:
            path.unlink()
    build_emulated(folder / "kernels.so", sanitizer=mistake.sanitizer, sources=sources)
    return folder / "kernels.so"


@pytest.mark.parametrize("sanitizer", sorted(RUNTIMES))
def test_nothing_is_found(sanitizer: str, tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    build_emulated(library, sanitizer=sanitizer)
    results = exercised(sanitizer, [(module, library) for module in MODULES])
    for module, (status, said) in zip(MODULES, results, strict=True):
        assert status == 0, f"{module}: status {status}\n{said[:3000]}"


@pytest.mark.parametrize("sanitizer", ["none", *sorted(RUNTIMES)])
def test_every_mistake_is_caught(sanitizer: str, tmp_path: Path) -> None:
    mistakes = {name: each for name, each in MISTAKES.items() if each.sanitizer == sanitizer}
    folders = [tmp_path / str(index) for index in range(len(mistakes))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        libraries = list(pool.map(with_mistake, mistakes.values(), folders))
    pairs = [
        (f"test_{each.op}", path) for each, path in zip(mistakes.values(), libraries, strict=True)
    ]
    results = dict(zip(mistakes, exercised(sanitizer, pairs), strict=True))
    for name, (status, said) in results.items():
        assert status and mistakes[name].said in said, f"{name}: status {status}\n{said[-3000:]}"
