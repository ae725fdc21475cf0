#!/usr/bin/env bash
# What a GPU can tell of this project, in one command for a machine that is there for minutes, without a network.
#
#   kernels/on_gpu.sh
#
# OUT      where results go: summary.json, log.txt, kernels.json, layers.json, train_*.jsonl   (build/on_gpu)
# PYTHON   one that has torch and what the trainer imports                        (.venv/bin/python, or python3)
# LIMIT_S  seconds that a part may take                                           (240)
# TOTAL_S  seconds that all parts may take; those that it leaves no time are told   (540)
# STEPS    of each short training                                                 (20)
# TOKENS   numbers of tokens at which kernels are timed                           (4096 16384)
# DEVICE   cpu tries this script where no GPU is                                  (cuda)
#
# A part that fails is noted, and the next goes on; the status is 1 then.
set -uo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit

PYTHON="${PYTHON:-$PWD/.venv/bin/python}"
command -v "$PYTHON" >/dev/null || PYTHON=python3
DEVICE="${DEVICE:-cuda}"
mkdir -p "${OUT:=$PWD/build/on_gpu}"
OUT="$(cd -- "$OUT" && pwd)"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHON DSV2_PYTHON="$PYTHON"

parts=()
failed=0
: > "$OUT/log.txt"

part() { # name, command and its arguments
  local name="$1" start_s="$SECONDS" status=0
  shift
  echo "== $name" | tee -a "$OUT/log.txt"
  local limit_s="${LIMIT_S:-240}" left_s="$((${TOTAL_S:-540} - SECONDS))"
  ((limit_s < left_s)) || limit_s="$left_s"
  if ((limit_s > 0)); then
    timeout --kill-after=10 "$limit_s" "$@" 2>&1 | tee -a "$OUT/log.txt" || status="${PIPESTATUS[0]}"
  else
    status=124
    echo "not run: no time is left" | tee -a "$OUT/log.txt"
  fi
  ((status == 0)) || failed=1
  parts+=("{\"part\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - start_s))}")
  local IFS=,
  echo "[${parts[*]}]" > "$OUT/summary.json"
}

train() { # name, overrides
  local run="on_gpu_$1_$$"
  part "train $1" launch/local.sh experiment=debug_1gpu "run.name=$run" "recipe.num_steps=${STEPS:-20}" \
    monitor.log_every_steps=1 "${@:2}"
  [[ ! -f "runs/$run/metrics.jsonl" ]] || cp "runs/$run/metrics.jsonl" "$OUT/train_$1.jsonl"
  rm -rf "runs/$run"
}

read -ra tokens <<< "${TOKENS:-4096 16384}"
bench=("$PYTHON" -m bench --device "$DEVICE" --tokens "${tokens[@]}" --out "$OUT/kernels.json")

nvidia-smi 2>&1 | tee -a "$OUT/log.txt"
! command -v nvcc >/dev/null || part build "$PYTHON" -m dsv2_kernels.native.build cuda
part "kernels are there" "$PYTHON" -m dsv2_kernels.native.library
part tests "$PYTHON" -m pytest -q -m gpu tests kernels/tests
part "bench kernels" "${bench[@]}"
part "bench layers" "$PYTHON" -m benchmarks layers
[[ ! -f benchmarks/results/layers.json ]] || cp benchmarks/results/layers.json "$OUT/layers.json"
[[ -f data/stdlib/manifest.json ]] || part corpus "$PYTHON" -m dsv2_train.cli.main prepare --source stdlib --out data/stdlib
train torch
mapfile -t with_kernels < <("$PYTHON" -c '
from dsv2_train.config.sections.parallel import KERNEL_SETTINGS
for name in KERNEL_SETTINGS:
    print(f"parallel.{name}=kernel")
')
train kernels "${with_kernels[@]}"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    part "$tool" kernels/sanitize.sh "$tool" -q
  done
fi
exit "$failed"
