#!/usr/bin/env bash
# Preflight of this node, then what was asked for: docker run IMAGE local.sh experiment=... key=value
# The preflight takes the overrides of that line. DSV2_PREFLIGHT=off leaves it out, for what starts no run.
set -euo pipefail
if [[ $# -eq 0 ]]; then
  echo "say what to run, for instance: local.sh experiment=debug_1gpu" >&2
  exit 2
fi
if [[ "${DSV2_PREFLIGHT:-on}" != off ]]; then
  overrides=()
  for word in "$@"; do
    if [[ "$word" == [!-]*=* ]]; then overrides+=("$word"); fi
  done
  dsv2 preflight "${overrides[@]}"
fi
exec "$@"
