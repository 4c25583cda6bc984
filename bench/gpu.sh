#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and nvcc, with torch and the build and test tools installed; needs no network.
#
#   bench/gpu.sh test     builds the kernels for this card, runs the whole test suite on it, then a part under
#                         compute-sanitizer
#   bench/gpu.sh bench    builds the same way, prints what kernels take beside what their machine code predicts, then
#                         runs the benches and writes bench/results/<date>-cuda.md
#
# CUDA_ARCH (such as 90) names another architecture than the card's. Arguments after the command go to pytest or bench.
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
