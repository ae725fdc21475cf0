"""Runs the exercises of test modules on emulated libraries; a process that a sanitizer watches.

    LD_PRELOAD=libasan.so python exercise.py '[["test_swiglu_gate", "library.so"], ...]'

Prints a list of [exit status, what the exercise said], one for each. Each runs in a process forked
from this one: torch is imported once, and a sanitizer may end it.
"""

import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path


def run(module: str, path: str) -> None:
    """Exercise one module; ends the process."""
    from dsv2_kernels.native import library  # noqa: PLC0415  imported before the first fork

    try:
        with library.emulated(Path(path)):
            importlib.import_module(module).exercise()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Unlike os._exit this lets a sanitizer say at the end what it found.
    sys.exit(0)


def main() -> None:
    """Fork for each pair of the command line."""
    pairs = json.loads(sys.argv[1])
    for module, _ in pairs:
        importlib.import_module(module)
    results = []
    for module, path in pairs:
        with tempfile.TemporaryFile("w+") as said:
            child = os.fork()
            if child == 0:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                run(module, path)
            _, status = os.waitpid(child, 0)
            said.seek(0)
            results.append([os.waitstatus_to_exitcode(status), said.read()])
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
