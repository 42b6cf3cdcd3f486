#!/usr/bin/env bash
# Tests and measures the Triton kernels on an NVIDIA GPU, in under ten minutes, without installing r1fast.
#   bench/gpu.sh                      rows go to $OUT, or bench/results; then: python bench/report.py
#   TESTS=0 BENCH=bench/bench_generate.py SELECT= bench/gpu.sh    generation, at full size too: 80 GB
#   TESTS=0 PYTHON=python3.12 bench/gpu.sh    measures only
#   TRAIN="stages.base.max_steps=120" bench/gpu.sh    then trains, by the recipe tiny with these overrides
#   R1FAST_COMMIT=abc1234 bench/gpu.sh        names the commit where the tree is a copy without .git
# Needs torch, triton, transformers, pytest, pytest-benchmark, pytest-timeout. Peers that are importable get rows;
# with pytest-xdist the tests compile side by side.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
results=${OUT:-bench/results}
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "gpu.sh: no CUDA device"; exit 1; }
"$PYTHON" -c 'import pytest, pytest_benchmark' || { echo "gpu.sh: pytest and pytest-benchmark are needed"; exit 1; }
mkdir -p "$results"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv

status=0
if [ "${TESTS:-tests/kernels}" != 0 ]; then
  # A wrong kernel does not stop the rest: a bench refuses its own op, and says by how much it is off.
  workers=$("$PYTHON" -c 'import xdist' 2> /dev/null && echo "-n 8")
  # shellcheck disable=SC2086  # both are lists of words
  timeout -s INT -k 20 "${TEST_SECONDS:-230}" "$PYTHON" -m pytest -m gpu ${TESTS:-tests/kernels tests/rollout} $workers \
    -p no:cacheprovider --durations=10 || status=$?
fi
if [ -n "${TRAIN:-}" ]; then
  run=$(mktemp -d)/run
  # shellcheck disable=SC2086
  timeout "${TRAIN_SECONDS:-200}" "$PYTHON" -m torch.distributed.run --nproc-per-node 1 -m r1fast.train \
    --output-dir "$run" $TRAIN || status=$?
  cp "$run/summary.json" "$results/train-summary.json"
fi
timeout "${BENCH_SECONDS:-350}" "$PYTHON" -m pytest "${BENCH:-bench}" -k "${SELECT-not P1024}" --benchmark-only \
  --benchmark-columns=median,rounds -p no:cacheprovider \
  --seconds "${SECONDS_A_CASE:-3}" --results "$results" || status=$?
echo "gpu.sh: rows in $results; exit status $status"
exit $status
