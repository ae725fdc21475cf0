"""What an install brings: Python, and the library where there is an nvcc, which is a fake here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1]
NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "release 13.0, V13.0.88"; exit; fi
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then touch "$2"; fi; shift; done
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The package's source, with a library of other sources in it and in what was built before."""
    copy = tmp_path / "kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("build", "built", "*.egg-info"))
    for place in (copy, copy / "lib"):
        built = place / "dsv2_kernels" / "native" / "built"
        built.mkdir(parents=True)
        (built / "cuda.so").write_text("old")
    return copy


def built_by(folder: Path, path: str) -> dict[str, str]:
    """Files of the build's `built`, by name."""
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", "lib"]
    environment = {**os.environ, "PATH": path}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    package = folder / "lib" / "dsv2_kernels"
    assert (package / "swiglu_gate.py").exists() and (package / "py.typed").exists()
    return {each.name: each.read_text() for each in (package / "native" / "built").glob("*")}


def test_without_nvcc_it_is_python_alone(folder: Path) -> None:
    assert built_by(folder, "/nowhere") == {}


def test_with_nvcc_the_library_is_compiled(folder: Path) -> None:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    found = built_by(folder, f"{nvcc.parent}:/usr/bin:/bin")
    assert found.keys() == {"cuda.so", "cuda.json"}
    assert found["cuda.so"] == "" and '"nvcc": "13.0"' in found["cuda.json"]
