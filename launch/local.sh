#!/usr/bin/env bash
# Train on this node: launch/local.sh experiment=quickstart key=value ...  (--help tells more)
# DSV2_PYTHON names the Python to use; without it the repository's .venv, else python3.
set -euo pipefail
repository="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
python="${DSV2_PYTHON:-$repository/.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
found='import importlib.util as u; assert all(map(u.find_spec, ("dsv2_train", "hydra", "torch")))'
if ! "$python" -c "$found" 2>/dev/null; then
  echo "$python lacks dsv2_train or what it needs: run 'make install' in $repository" >&2
  exit 1
fi
exec "$python" -m dsv2_train.cli.launch "$@"
