#!/bin/sh
# Compiles every CUDA source (core_headers.cu: all of csrc/core as device code; primitives.cu: csrc/cuda), where nvcc exists.
set -eu
cd "$(dirname "$0")/../.."
if ! command -v nvcc >/dev/null 2>&1; then
    echo "compile_cuda: nvcc not found, CUDA sources not compiled"
    exit 0
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for source in csrc/cuda/*.cu csrc/*/cuda*.cu tests/native/*.cu; do
    [ -e "$source" ] || continue
    nvcc -std=c++17 -fmad=false -I csrc -I tests/native -gencode arch=compute_80,code=sm_80 -c "$source" -o "$out/unit.o"
    echo "compile_cuda: $source"
done
