"""Every pin of the image that is on PyPI is there, and fits what the others require of it.

    python docker/check_pins.py

Asks the package index for metadata, downloads no package. Exit status: 0, or 1 with a line for each
pin that does not fit.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

HERE = Path(__file__).parent
# Where a wheel serves the image.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
ON_PYPI = {
    "PIP_VERSION": "pip",
    "SETUPTOOLS_VERSION": "setuptools",
    "WHEEL_VERSION": "wheel",
    "TORCH_VERSION": "torch",
    "MEGATRON_CORE_VERSION": "megatron-core",
    "TRANSFORMER_ENGINE_VERSION": "transformer-engine",
    "DEEPSPEED_VERSION": "deepspeed",
    "NVSHMEM_VERSION": "nvidia-nvshmem-cu13",
}
# Parts of transformer-engine that its extras name: a wheel, and a source distribution.
ENGINE_PARTS = ("transformer-engine-cu13", "transformer-engine-torch")


def read_versions(path: Path = HERE / "versions.env") -> dict[str, str]:
    """Name -> value of the lines that are not comments."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def main() -> int:
    """Print what does not fit; returns the exit status."""
    problems = [*_missing(read_versions()), *_requirements(read_versions())]
    print("\n".join(problems) or "every pin resolves")
    return 1 if problems else 0


def _missing(versions: dict[str, str]) -> Iterator[str]:
    pins = {package: versions[name] for name, package in ON_PYPI.items()}
    pins |= dict.fromkeys(ENGINE_PARTS, versions["TRANSFORMER_ENGINE_VERSION"])
    for package, version in pins.items():
        if version not in _released(package):
            yield f"{package}=={version} is not on the package index"


def _requirements(versions: dict[str, str]) -> Iterator[str]:
    python = versions["PYTHON_VERSION"]
    megatron = _metadata(f"megatron-core=={versions['MEGATRON_CORE_VERSION']}", python)
    yield from _against(megatron, "torch", versions["TORCH_VERSION"])
    yield from _against(megatron, "transformer-engine", versions["TRANSFORMER_ENGINE_VERSION"])
    torch = _metadata(f"torch=={versions['TORCH_VERSION']}", python)
    yield from _against(torch, "setuptools", versions["SETUPTOOLS_VERSION"])
    yield from _against(torch, "nvidia-nvshmem-cu13", versions["NVSHMEM_VERSION"])
    [toolkit] = [one for one in _requires(torch) if one.name == "cuda-toolkit"]
    [exact] = toolkit.specifier
    cuda = versions["CUDA_VERSION"]
    if Version(exact.version).release[:2] != Version(cuda).release[:2]:
        yield f"torch was built with CUDA {exact.version}, CUDA_VERSION is {cuda}"


def _against(metadata: dict[str, Any], package: str, version: str) -> Iterator[str]:
    found = [one for one in _requires(metadata) if one.name.replace("_", "-") == package]
    if not found:
        yield f"{metadata['name']} requires no {package}: look why it is pinned"
    for one in found:
        if not one.specifier.contains(version):
            who = f"{metadata['name']} {metadata['version']}"
            yield f"{who} requires {package}{one.specifier}, the pin is {version}"


def _requires(metadata: dict[str, Any]) -> list[Requirement]:
    return [Requirement(line) for line in metadata.get("requires_dist", [])]


def _released(package: str) -> set[str]:
    prefix = "Available versions: "
    lines = _pip("index", "versions", package).splitlines()
    [versions] = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
    return set(versions.split(", "))


def _metadata(requirement: str, python: str) -> dict[str, Any]:
    """What a package's wheel for the image says of itself."""
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    with tempfile.TemporaryDirectory() as nowhere:
        report = _pip(
            *("install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed"),
            *("--report", "-", "--target", nowhere, "--only-binary=:all:"),
            *(f"--python-version={python}", *platforms, requirement),
        )
    metadata: dict[str, Any] = json.loads(report)["install"][0]["metadata"]
    return metadata


def _pip(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words], capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise SystemExit(f"pip {' '.join(words)}:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
