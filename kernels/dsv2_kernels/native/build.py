"""Compiles the kernels: by nvcc for GPUs, or by a host compiler, which runs them as fibers.

python -m dsv2_kernels.native.build cuda        # what `make kernels` does
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsv2_kernels.native.usage import Usage, parse_usage, table

SOURCES = Path(__file__).parents[2] / "csrc"
BUILT = Path(__file__).parent / "built"

# Of a stack: the arguments of REQUIRE_DEVICE's printf, and of more of them in a debug build. With
# more an array is in local memory.
_STACK_BYTES, _DEBUG_STACK_BYTES = 40, 160

ARCHITECTURES = ("80", "90a")
SANITIZERS = {
    "none": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-fsanitize=thread",),
}

# Of the parts of CUDA's toolkit that compile and link; releases of one number fit each other.
ON_PYPI = "nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-cccl nvidia-cuda-runtime"


class BuildError(RuntimeError):
    """A compiler that is missing, or what it said."""


def source_hash(sources: Path = SOURCES) -> str:
    """Of every file that is compiled."""
    digest = hashlib.sha256()
    for path in sorted(sources.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(sources)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def build_cuda(
    target: Path, *, architectures: Sequence[str] = ARCHITECTURES, debug: bool = False
) -> list[Usage]:
    """Compile for GPUs into a library, and write beside it (`.json`) what it was compiled from.

    Args:
        target: the library's path.
        architectures: compute capabilities without the point.
        debug: indices that kernels read are checked, at some cost.

    Returns:
        What each kernel uses.

    Raises:
        BuildError: nvcc is missing or fails, or a kernel keeps in memory what belongs in registers.
    """
    nvcc = find_nvcc()
    flags = ["-O3", "--std=c++17", "-Xcompiler=-fPIC", "-Xptxas=-v", "--expt-relaxed-constexpr"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    flags += ["-DDSV2_DEBUG"] if debug else []
    # Where the packages on PyPI have what is linked; nvcc looks beside it.
    flags += [f"-L{Path(nvcc).parents[1] / 'lib'}"]
    said = _compile([nvcc, *flags], [], target)
    try:
        usages = [usage for source, text in said.items() for usage in parse_usage(source, text)]
    except ValueError as error:
        raise BuildError(str(error)) from error
    most = _DEBUG_STACK_BYTES if debug else _STACK_BYTES
    spilling = [each for each in usages if each.spill_bytes or each.stack_bytes > most]
    if spilling:
        target.unlink()
        raise BuildError(
            f"kernels spill registers, or index arrays that then are in memory:\n{table(spilling)}"
        )
    facts = {
        "sources": source_hash(),
        "nvcc": nvcc_version(nvcc),
        "architectures": list(architectures),
        "debug": debug,
        "kernels": [vars(usage) for usage in usages],
    }
    target.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    return usages


def build_emulated(target: Path, *, sanitizer: str = "none", sources: Path = SOURCES) -> None:
    """Compile for this machine's own processor.

    Args:
        target: the library's path.
        sanitizer: a key of `SANITIZERS`; the process that loads the library must have the
            sanitizer's runtime loaded first (LD_PRELOAD).
        sources: another folder than csrc, for a copy with a mistake in it.

    Raises:
        BuildError: the compiler is missing or fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise BuildError("no g++ on PATH; install it, or set CXX to a C++ compiler")
    flags = ["-O1", "-g", "-std=c++17", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off"]
    flags += ["-Wall", "-Wno-unknown-pragmas", "-x", "c++"]
    instrumented = [compiler, *flags, *SANITIZERS[sanitizer]]
    fibers = [compiler, *flags, f"-DEMULATION_{sanitizer.upper()}"]
    _compile(instrumented, [(fibers, sources / "emulation" / "fibers.cpp")], target, sources)


def find_nvcc() -> str:
    """The path of nvcc: on PATH, or of the packages on PyPI where this Python has them.

    Raises:
        BuildError: none is there.
    """
    found = shutil.which("nvcc")
    if found:
        return found
    packages = importlib.util.find_spec("nvidia")
    for folder in (packages and packages.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True):
            return str(path)
    raise BuildError(
        "no nvcc on PATH and none of PyPI's; install the CUDA toolkit of torch's CUDA release, or "
        f"`pip install --constraint constraints.txt {ON_PYPI}`"
    )


def nvcc_version(nvcc: str) -> str:
    """For example "13.0"."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", said)
    if match is None:
        raise BuildError(f"{nvcc} --version names no release: {said!r}")
    return match[1]


def _compile(
    compiler: list[str],
    extra: list[tuple[list[str], Path]],
    target: Path,
    sources: Path = SOURCES,
) -> dict[str, str]:
    """Every .cu file, and others with their own compilers, into one library.

    Returns:
        What was said, by source file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    jobs = [(compiler, path) for path in sorted(sources.rglob("*.cu"))] + extra
    objects = [target.with_suffix(f".{path.stem}.o") for _, path in jobs]
    commands = [
        [*command, "-c", str(path), "-o", str(each)]
        for (command, path), each in zip(jobs, objects, strict=True)
    ]
    # `-x c++` would make the linker read objects as source.
    link = [flag for flag in compiler if flag not in ("-x", "c++")]
    partial = target.with_suffix(".partial")
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            said = list(pool.map(_run, commands))
        _run([*link, "-shared", *map(str, objects), "-o", str(partial)])
        partial.replace(target)
    finally:
        for each in [*objects, partial]:
            each.unlink(missing_ok=True)
    return {path.name: text for (_, path), text in zip(jobs, said, strict=True)}


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\nended with status {done.returncode}:\n{said}")
    return said


def main() -> int:
    """Build what the command line names, and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["cuda"])
    parser.add_argument("--debug", action="store_true", help="check the indices that kernels read")
    arguments = parser.parse_args()
    target = BUILT / "cuda.so"
    try:
        usages = build_cuda(target, debug=arguments.debug)
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{table(usages)}\n{target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
