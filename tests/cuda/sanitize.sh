#!/bin/sh
# compute-sanitizer's four tools over the GPU tests, large sizes and compilation left out. All four
# run, whatever the ones before say. racecheck and initcheck also report kernels of cuBLAS: of theirs
# only reports that name ours count, of memcheck's and synccheck's all do.
set -eu
command -v compute-sanitizer >/dev/null || { echo "sanitize: compute-sanitizer is not on PATH" >&2; exit 2; }
cd "$(dirname "$0")/../.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=""
for tool in memcheck racecheck initcheck synccheck; do
    case $tool in
        memcheck | synccheck) strict="--error-exitcode 1" ;;
        *) strict="" ;;
    esac
    : >"$log"
    # shellcheck disable=SC2086  # two words or none
    compute-sanitizer --tool "$tool" $strict --target-processes all --log-file "$log" \
        "${PYTHON:-python}" -m pytest -q tests/cuda -k "not 2_31 and not compiled" || failed="$failed $tool"
    cat "$log"
    if grep -q 'pyrobust::' "$log"; then failed="$failed $tool(pyrobust)"; fi
done
if [ -n "$failed" ]; then
    echo "sanitize: FAILED:$failed" >&2
    exit 1
fi
echo "sanitize: clean"
