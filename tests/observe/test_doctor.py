"""The doctor's page, in its own process: an op logs its choice once per process."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("r1fast_kernels")


def test_doctor_names_an_implementation_and_a_reason_for_every_op() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "r1fast.doctor"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    import r1fast_kernels

    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for op in r1fast_kernels.__all__:
        assert op in rows and "unknown" not in rows[op] and "fails" not in rows[op]
    assert "torch" in rows and "cpu" in rows
