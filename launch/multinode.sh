#!/usr/bin/env bash
# Train on several hosts without Slurm. On each of them, with another NODE_RANK from 0 on:
#   launch/multinode.sh NODES NODE_RANK HOST:PORT experiment=dsv2_lite_pretrain key=value ...
# HOST is what all of them know the host of NODE_RANK 0 by, PORT is free on it; the run folder and the data
# are on a file system that they share.
set -euo pipefail
if (($# < 3)); then
  sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
launch="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
exec "$launch/local.sh" --nodes "$1" --node-rank "$2" --endpoint "$3" "${@:4}"
