#!/usr/bin/env bash
# Train on this node: launch/local.sh experiment=quickstart key=value ...  (--help tells more)
# DSV2_PYTHON names the Python to use; without it the repository's .venv, else python3.
set -euo pipefail
repository="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
python="${DSV2_PYTHON:-$repository/.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
exec "$python" -m dsv2_train.cli.launch "$@"
