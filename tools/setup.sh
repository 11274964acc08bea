#!/usr/bin/env bash
# Installs what ditmoe is built with, on Debian or Ubuntu; does nothing where all is there.
#   tools/setup.sh          to build and run      tools/setup.sh --tests    and to test
set -euo pipefail
packages=(gcc g++ make cmake ninja-build pkg-config ocl-icd-opencl-dev opencl-headers libclblast-dev
    libhwloc-dev libpng-dev libjpeg-dev zlib1g-dev libjansson-dev libcairo2-dev fonts-dejavu-core
    pocl-opencl-icd libopenmpi-dev openmpi-bin dataset-fashion-mnist libopenblas0-pthread)
if [ "${1:-}" = --tests ]; then
    packages+=(clang-14 libclang-rt-14-dev oclgrind git)
fi
missing=()
for p in "${packages[@]}"; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q '^install ok installed$' || missing+=("$p")
done
[ ${#missing[@]} -eq 0 ] && exit 0
sudo=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "setup: not root and no sudo; install: ${missing[*]}" >&2; exit 1; }
    sudo=(sudo)
fi
command -v apt-get >/dev/null || { echo "setup: no apt-get here; install the like of: ${missing[*]}" >&2; exit 1; }
echo "setup: installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
"${sudo[@]}" apt-get update -qq >&2
"${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
