#!/usr/bin/env bash
# Tests the CPU's kernels as compiled for Arm of 64 bits, on a machine that is x86-64. The wheel is built by a compiler that
# runs here; torch and the tests run here, too, and the kernels in qemu, in a process of Python for Arm (tests/arm). So a
# run takes minutes, not hours. Two processors: one with the instructions for bfloat16, one without.
#
#     apt-get install g++-aarch64-linux-gnu mmdebstrap qemu-user  # of Debian 13, which has Python 3.13
#     python3.13 -m venv build/arm/venv && build/arm/venv/bin/pip install pip scikit-build-core pybind11 ninja cmake auditwheel
#     bash tools/test_arm.sh [options of pytest instead of the tests below]
set -euo pipefail
cd "$(dirname "$0")/.."
arm=$PWD/build/arm root=$PWD/build/arm/root
tests=(tests/test_{ops,cema,cema_coefficients,timestep_norm,chunked_attention,normalized_qk,normalized_attention,linear}.py
       tests/test_{layer_norm,gated_silu,loss,range,states,end_states,wrong_calls,nothing_to_do,threads,whole_sequences}.py)

# What Python for Arm needs is unpacked, not installed: that would run in qemu.
if [ ! -e "$root" ]; then
  mmdebstrap --arch=arm64 --variant=extract --include=python3,libpython3-dev,libgomp1,libstdc++6 trixie "$root"
  ln -s ../aarch64-linux-gnu "$root/usr/include/python3.13/"
fi

define=--config-settings=cmake.define.
_PYTHON_HOST_PLATFORM=linux-aarch64 SETUPTOOLS_EXT_SUFFIX=.cpython-313-aarch64-linux-gnu.so PATH="$arm/venv/bin:$PATH" \
  pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$arm" \
  ${define}CMAKE_SYSTEM_NAME=Linux ${define}CMAKE_SYSTEM_PROCESSOR=aarch64 ${define}MEGALODON_OPS_CUDA=OFF \
  ${define}CMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ ${define}Python_INCLUDE_DIR="$root/usr/include/python3.13" .
"$arm/venv/bin/auditwheel" show "$arm"/*.whl
unzip -qo "$arm"/*.whl 'megalodon_ops/_C*' -d "$arm"

for processor in max cortex-a72; do
  MEGALODON_OPS_ARM="qemu-aarch64 -cpu $processor -L $root $root/usr/bin/python3 -B tests/arm/serve.py $(echo "$arm"/megalodon_ops/_C*)" \
    PYTHONPATH=tests/arm python -m pytest -p kernels -n 0 -m "" -k "not emulated" "${@:-${tests[@]}}"
done
