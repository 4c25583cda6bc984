#!/usr/bin/env bash
# Tests the CPU's kernels as compiled for Arm of 64 bits, on an x86-64 machine with Debian 13 (tests/arm/README.md): cross-builds
# the wheel for Python 3.13 and runs the ops' tests on its kernels in qemu, as a processor with the extension BF16 and as one
# without. `python` needs torch and the extra `test`; options go to pytest instead of the tests below.
#
#     apt-get install g++-aarch64-linux-gnu mmdebstrap qemu-user python3-venv
#     bash tools/test_arm.sh
set -euo pipefail
cd "$(dirname "$0")/.."
arm=$PWD/build/arm
tests=(tests/test_{ops,cema,cema_coefficients,timestep_norm,chunked_attention,normalized_qk,normalized_attention,linear}.py
       tests/test_{layer_norm,gated_silu,loss,range,states,end_states,nothing_to_do,threads,whole_sequences}.py)

if [ ! -e "$arm/venv" ]; then
  python3.13 -m venv "$arm/venv"
  "$arm/venv/bin/pip" install --quiet scikit-build-core pybind11 cmake ninja auditwheel
fi
# What Python for Arm needs is unpacked without being set up, which would take qemu long.
if [ ! -e "$arm/root" ]; then
  mmdebstrap --arch=arm64 --variant=extract --include=python3,libpython3-dev,libgomp1,libstdc++6 trixie "$arm/root"
  ln -s usr/lib "$arm/root/lib"
  ln -s ../aarch64-linux-gnu "$arm/root/usr/include/python3.13/"
fi

define=--config-settings=cmake.define.
(
  export _PYTHON_HOST_PLATFORM=linux-aarch64
  PATH=$arm/venv/bin:$PATH pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$arm/wheel" \
    ${define}CMAKE_SYSTEM_NAME=Linux ${define}CMAKE_SYSTEM_PROCESSOR=aarch64 ${define}MEGALODON_OPS_CUDA=OFF \
    ${define}CMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ ${define}Python_INCLUDE_DIR="$arm/root/usr/include/python3.13" \
    ${define}PYTHON_MODULE_EXTENSION=.cpython-313-aarch64-linux-gnu.so ${define}PYTHON_MODULE_DEBUG_POSTFIX= .
)
"$arm/venv/bin/auditwheel" show "$arm"/wheel/*.whl
"$arm/venv/bin/python" -m zipfile -e "$arm"/wheel/*.whl "$arm"

export PYTHONPATH=python:tests/arm OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
for processor in max cortex-a72; do
  export MEGALODON_OPS_ARM="qemu-aarch64 -cpu $processor -L $arm/root $arm/root/usr/bin/python3 -B tests/arm/serve.py \
    $(echo "$arm"/megalodon_ops/_C*.so)"
  python -m pytest -p kernels -n 0 -m "" -k "not emulated" "${@:-${tests[@]}}"
done
