#!/usr/bin/env bash
# Build the image: docker/build.sh [options of docker build]; every version is in docker/versions.env.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
versions=()
while IFS= read -r line; do
  versions+=(--build-arg "$line")
done < <(grep -E '^[A-Z_]+=' docker/versions.env)
exec docker build --file docker/Dockerfile "${versions[@]}" --tag dsv2_train "$@" .
