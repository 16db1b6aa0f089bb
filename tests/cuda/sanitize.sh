#!/bin/sh
# compute-sanitizer's four tools over the GPU tests, large sizes and compilation left out.
set -eu
command -v compute-sanitizer >/dev/null || { echo "sanitize: compute-sanitizer is not on PATH" >&2; exit 2; }
cd "$(dirname "$0")/../.."
for tool in memcheck racecheck initcheck synccheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
        "${PYTHON:-python}" -m pytest -q tests/cuda -k "not 2_31 and not compiled"
done
