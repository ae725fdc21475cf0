#!/usr/bin/env python3
"""Submit a run to Slurm: launch/submit.py experiment=... key=value ... (--help tells more).

DSV2_PYTHON names the Python to use; without it the repository's .venv, else this one.
"""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FOUND = (
    "import importlib.util as u; assert all(map(u.find_spec, ('dsv2_train', 'hydra', 'jinja2')))"
)

ours = REPOSITORY / ".venv" / "bin" / "python"
python = os.environ.get("DSV2_PYTHON") or str(ours if ours.exists() else sys.executable)
if subprocess.run([python, "-c", FOUND], stderr=subprocess.DEVNULL).returncode:
    sys.exit(f"{python} lacks dsv2_train or what it needs: run 'make install' in {REPOSITORY}")
os.execv(python, [python, "-m", "dsv2_train.cli.cluster.submit", *sys.argv[1:]])
