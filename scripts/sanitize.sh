#!/usr/bin/env bash
# The kernel tests on a library built with AddressSanitizer and UBSan: scripts/sanitize.sh [pytest arguments]
# Needs GCC. PYTHON names the interpreter of an environment with unweave's extra `dev`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export CXX=${CXX:-g++}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

CXXFLAGS="-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
  SKBUILD_CMAKE_BUILD_TYPE=Debug UNWEAVE_REQUIRE_KERNELS=1 \
  "$python" -m pip wheel --quiet --no-deps --wheel-dir "$build" .
"$python" -m zipfile -e "$build"/*.whl "$build"
export UNWEAVE_KERNELS_LIBRARY=$build/unweave/kernels/libunweave_kernels.so PYTHONPATH=$PWD/src

# Python itself is not sanitized, so the runtime has to be there first, and libstdc++, whose exceptions it wraps.
export LD_PRELOAD="$("$CXX" -print-file-name=libasan.so) $("$CXX" -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

"$python" -c "
from unweave.kernels.library import load, targets
library = load()
library.__asan_init  # an error unless the library is sanitized
print('sanitized:', *targets(library))"
"$python" -m pytest --capture=sys --override-ini timeout=600 tests/kernels "$@"  # sys: reports of a crash stay visible
