#!/usr/bin/env bash
# Everything that a GPU must show, in one command: tests, sanitizers, benches, one report (gpu_stages.py, README.md).
#
#   bench/gpu.sh                          all stages, in an environment that it makes: about three hours
#   bench/gpu.sh --only environment smoke   the first verdict, in a quarter of an hour
#   bench/gpu.sh --here                   in this Python, whose packages must be there; without a network
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/gpu_stages.py "$@"
