"""Compiles the kernels into the package where nvcc is at hand; the rest is in pyproject.toml."""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from dsv2_kernels.native.build import build_cuda  # noqa: E402  found by the line above


class BuildKernels(build_py):
    """Adds the library to what is installed; an editable install is left to `make kernels`."""

    def run(self) -> None:
        """Copy the Python files, then compile."""
        super().run()
        if self.editable_mode:
            return
        built = Path(self.build_lib) / "dsv2_kernels" / "native" / "built"
        # Of an earlier build, perhaps of other sources, which nobody could tell once installed.
        shutil.rmtree(built, ignore_errors=True)
        if shutil.which("nvcc"):
            build_cuda(built / "cuda.so")


setup(cmdclass={"build_py": BuildKernels})
