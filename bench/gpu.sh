#!/usr/bin/env bash
# Test or bench on an NVIDIA GPU. Needs nvcc, torch and the build and test tools, and no network.
#
#   bench/gpu.sh test     build the kernels for this card, run the whole test suite, then a part of it under
#                         compute-sanitizer
#   bench/gpu.sh bench    build the same way, print measured times of kernels beside those predicted from machine code,
#                         then run the benches and write bench/results/<date>-cuda.md
#
# CUDA_ARCH (such as 90) chooses another architecture than the card's. Further arguments go to pytest or bench.
set -euo pipefail
cd "$(dirname "$0")/.."
command=${1:?test or bench}
shift
python=${PYTHON:-python3}

"$python" -m pip install --quiet --no-build-isolation --no-deps --force-reinstall \
  -C cmake.define.MEGALODON_OPS_CUDA=ON -C cmake.define.MEGALODON_OPS_ARCHITECTURES="${CUDA_ARCH:-AUTO}" .
"$python" -m megalodon_ops info

case $command in
  test)
    "$python" -m pytest "$@"
    # Out-of-bounds accesses, races in shared memory and reads of unwritten memory, in every kernel of every type.
    if [ -x "$(command -v compute-sanitizer)" ]; then
      for tool in memcheck racecheck initcheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -p no:cacheprovider -q \
          tests/cuda/test_cuda.py -k "results_are_on_the_device or every_kernel_of_a_narrow_type"
      done
    else
      echo "compute-sanitizer was not found: not run" >&2
      exit 1
    fi
    ;;
  bench)
    "$python" -m bench.predict --measure || echo "no prediction" >&2
    "$python" -m bench --device cuda "$@"
    ;;
  *) echo "usage: bench/gpu.sh {test|bench} [arguments]" >&2; exit 2 ;;
esac
