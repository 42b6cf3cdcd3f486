"""Twenty steps against the numbers of tests/golden/curves.json, on any CPU; and that a fault would be seen there."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r1fast.parallel.mesh import Dist
from r1fast.stages import grpo, training
from r1fast_kernels import dispatch
from tests.golden.runs import CURVES, RUNS, STEPS, curve, distance
from tests.kernels.backends import needs_cpp

TOLERANCE = 1e-5
GOLDEN = json.loads(CURVES.read_text(encoding="utf-8"))
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("impl", ["reference", pytest.param(None, id="default", marks=needs_cpp)])
@pytest.mark.parametrize("run", RUNS)
def test_same_curves(run: str, impl: str | None, dist: Dist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: dict[tuple[str, str], str] = {}
    monkeypatch.setattr(dispatch, "choices", ran)
    got = curve(run, impl, dist, tmp_path)
    assert all(len(numbers) == STEPS and len(set(numbers)) > STEPS / 2 for numbers in got.values())
    assert distance(got, GOLDEN[run]) < TOLERANCE
    assert {chosen for _, chosen in ran} == {impl or "cpp"}


def a_place_too_early(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The last example learns from one position too early."""

    def faulty(*args: Any) -> Any:
        batch = fn(*args)
        if batch.loss_index_M.numel() > 1:
            batch.loss_index_M[-1] -= 1
        return batch

    return faulty


def a_step_behind(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda step, **options: fn(max(step - 1, 0), **options)


def a_lost_sequence(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda lengths, num_parts: [part[:-1] for part in fn(lengths, num_parts)]


def biased_std(fn: Callable[..., Any]) -> Callable[..., Any]:
    """n in place of n - 1, of groups of 4."""
    return lambda rewards_N, *args, **options: fn(rewards_N, *args, **options) * (4 / 3) ** 0.5


def neighbours_group(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda rewards_N, groups_N, **options: fn(rewards_N, groups_N.roll(1), **options)


def exchanged_logprobs(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Two examples of one length get each other's."""

    def faulty(*args: Any, **options: Any) -> Any:
        found = fn(*args, **options)
        same = [i for i in range(1, len(found)) if len(found[i]) == len(found[i - 1])]
        for i in same[:1]:
            found[i], found[i - 1] = found[i - 1], found[i]
        return found

    return faulty


FAULTS = {
    "collate": (training, "collate", a_place_too_early, "sft-dense"),
    "schedule": (training, "lr_at", a_step_behind, "sft-dense"),
    "a lost sequence": (training, "balance", a_lost_sequence, "sft-dense"),
    "std": (grpo, "group_advantages", biased_std, "grpo-dense"),
    "groups": (grpo, "group_advantages", neighbours_group, "grpo-dense"),
    "log-probs": (grpo, "map_packed", exchanged_logprobs, "grpo-dense"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_moves_the_curve(fault: str, dist: Dist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, make, run = FAULTS[fault]
    monkeypatch.setattr(module, name, make(getattr(module, name)))
    assert distance(curve(run, None, dist, tmp_path, steps=5), GOLDEN[run]) > 10 * TOLERANCE


def test_a_reference_that_moves_moves_the_curve(dist: Dist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = grpo.Learner._fill

    def from_policy(self: grpo.Learner, examples: Any, name: str, model: Any, **options: Any) -> None:
        fill(self, examples, name, self.policy, **options)

    monkeypatch.setattr(grpo.Learner, "_fill", from_policy)
    assert distance(curve("grpo-dense", None, dist, tmp_path, steps=5), GOLDEN["grpo-dense"]) > 10 * TOLERANCE


PROCESSORS = {
    "two-threads": {"OMP_NUM_THREADS": "2"},
    "plain": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"},
}


@pytest.mark.slow
@needs_cpp
@pytest.mark.parametrize("processor", PROCESSORS)
def test_same_curves_on_other_processors(processor: str, tmp_path: Path) -> None:
    """In a process of its own: libraries read these settings once."""
    script = (
        "import json, sys; from pathlib import Path; from r1fast.parallel.mesh import init_distributed\n"
        "from tests.golden.runs import RUNS, curve\n"
        "dist, folder = init_distributed('cpu'), Path(sys.argv[1])\n"
        "found = {run: [curve(run, i, dist, folder / f'{run}-{i}') for i in ('reference', None)] for run in RUNS}\n"
        "(folder / 'found.json').write_text(json.dumps(found))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    subprocess.run([sys.executable, "-c", script, tmp_path], env={**environment, **PROCESSORS[processor]}, check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    for run, curves in found.items():
        assert max(distance(got, GOLDEN[run]) for got in curves) < TOLERANCE, run
