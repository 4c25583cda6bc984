#!/usr/bin/env bash
# Install nvcc and a host compiler in a manylinux_2_28 container, from NVIDIA's repository for RHEL 8 and AlmaLinux's.
# `NVCC_VERSION=13.0 tools/install_nvcc.sh` installs another version than releases use.
#
# nvcc 12.9 compiles for Blackwell, and its code runs with drivers from 525 on; nvcc 13 needs 580. It supports GCC up
# to 14, and the container's own is 15, so the whole wheel is compiled with GCC 14.
set -euo pipefail
version=${NVCC_VERSION:-12.9}
declare -A repository=([x86_64]=x86_64 [aarch64]=sbsa)
dnf -y config-manager --add-repo \
    "https://developer.download.nvidia.com/compute/cuda/repos/rhel8/${repository[$(uname -m)]}/cuda-rhel8.repo"
dnf -y install "cuda-nvcc-${version/./-}" "cuda-cudart-devel-${version/./-}" gcc-toolset-14-gcc-c++
ln -sfn "/usr/local/cuda-$version" /usr/local/cuda
/usr/local/cuda/bin/nvcc --version
