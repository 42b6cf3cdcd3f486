#!/usr/bin/env bash
# Tests and measures r1fast on an NVIDIA GPU in stages (bench/stages.py), without installing it.
#   bench/gpu.sh                          all stages, fourteen minutes; what they find goes to $OUT, or build/gpu
#   bench/gpu.sh machine smoke ops        six and a half minutes; then: bench/gpu.sh models rest
#   bench/gpu.sh --fake                   without a GPU: small cases, to see that all stages run
#   R1FAST_COMMIT=abc1234 bench/gpu.sh    names the commit where the tree is a copy without .git
# Then copy ops.json, models.json and rest.json to bench/results as GPU-STAGE.json, and run python bench/report.py.
#
# Needs torch, triton, transformers, pytest, pytest-benchmark, pytest-timeout. Peers that are importable get rows, and
# with pytest-xdist the tests compile side by side. For a machine without a network, for Python 3.12, 6 MB:
#   pip download -d wheelhouse --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -r bench/wheels.txt
# A folder wheelhouse/ beside this repository's files is installed below, into a folder of its own.
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
if [ -d wheelhouse ]; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --find-links wheelhouse --target "$site" \
    -r bench/wheels.txt || exit 1
fi
export PYTHONPATH="${site:+$site:}$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$PYTHON" bench/stages.py ${OUT:+--out "$OUT"} "$@"
