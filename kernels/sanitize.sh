#!/usr/bin/env bash
# The kernels' tests on a GPU under compute-sanitizer: kernels/sanitize.sh TOOL [arguments of pytest]
# TOOL is memcheck, racecheck or synccheck. PYTHON names the Python to use (.venv/bin/python, or python3).
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

tool="${1:?TOOL is missing: memcheck, racecheck or synccheck}"
PYTHON="${PYTHON:-$PWD/.venv/bin/python}"
command -v "$PYTHON" >/dev/null || PYTHON=python3
command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer on PATH; CUDA's toolkit has it" >&2; exit 1; }
# torch's allocator would hide what is read or written past a tensor's end.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
exec compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 66 \
  "$PYTHON" -m pytest -m gpu "${@:2}" kernels/tests
