"""A checkpoint is complete or not there, and what is loaded continues with the same bits."""

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r1fast.dist import checkpoint
from r1fast.dist.mesh import Dist
from r1fast.dist.optim import build_optimizer
from r1fast.dist.parallelize import full_state_dict, generation_phase
from tests.dist.tiny_model import ROOT, TinyDecoder, sharded, tokens_of_rank, torchrun, train


def save(directory: Path, step: int, model: Any, optimizer: Any, dist: Dist, **options: Any) -> Path:
    options = {"extra": {"step": step}, "rank_state": {"cursor": [step]}, **options}
    return checkpoint.save(directory, step, model=model, optimizer=optimizer, dist=dist, **options)


def started(dist: Dist, name: str = "muon", **options: Any) -> tuple[Any, Any]:
    model = sharded(dist, **options)
    return model, build_optimizer(model, name=name, learning_rate=1e-2, weight_decay=0.1)


def state_of(model: Any, optimizer: Any, dist: Dist) -> dict[str, torch.Tensor]:
    """Every number: weights, buffers, optimizer state."""
    state = {name: tensor.clone() for name, tensor in full_state_dict(model, dist).items()}
    for name, param in model.named_parameters():
        for key, value in optimizer.state[param].items():
            state[f"{name}/{key}"] = value.full_tensor().clone() if hasattr(value, "full_tensor") else value.clone()
    return state


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(got[name], expected[name])]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resume_continues_with_the_same_bits(dist: Dist, tmp_path: Path, name: str, tied: bool) -> None:
    model, optimizer = started(dist, name, tied=tied)
    train(model, dist, 3, optimizer)
    model.layers[0].e_score_correction_bias.add_(0.25)
    optimizer.set_lr(0.5)
    with torch.no_grad():
        model(tokens_of_rank(0))  # leaves gathered weights behind, which must not be what is saved
    path = save(tmp_path, 3, model, optimizer, dist)
    saved = state_of(model, optimizer, dist)
    draws = (random.random(), np.random.rand(), torch.rand(1).item())
    train(model, dist, 2, optimizer)

    resumed, its_optimizer = started(dist, name, tied=tied)
    extra, rank_state = checkpoint.load(path, model=resumed, optimizer=its_optimizer, dist=dist)
    assert (extra, rank_state) == ({"step": 3}, {"cursor": [3]})
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == draws
    assert_equal(state_of(resumed, its_optimizer, dist), saved)
    assert its_optimizer.param_groups[0]["lr"] == 0.005
    train(resumed, dist, 2, its_optimizer)
    assert_equal(state_of(resumed, its_optimizer, dist), state_of(model, optimizer, dist))


def test_a_checkpoint_before_the_first_step_loads(dist: Dist, tmp_path: Path) -> None:
    model, optimizer = started(dist)
    path = save(tmp_path, 0, model, optimizer, dist)
    train(model, dist, 2, optimizer)
    resumed, its_optimizer = started(dist)
    checkpoint.load(path, model=resumed, optimizer=its_optimizer, dist=dist)
    train(resumed, dist, 2, its_optimizer)
    assert_equal(state_of(resumed, its_optimizer, dist), state_of(model, optimizer, dist))


def test_a_reference_model_is_saved_beside_the_policy(dist: Dist, tmp_path: Path) -> None:
    def both() -> tuple[torch.nn.ModuleDict, Any]:
        policy, optimizer = started(dist)
        reference = sharded(dist).requires_grad_(False)
        return torch.nn.ModuleDict({"policy": policy, "reference": reference}), optimizer

    models, optimizer = both()
    train(models["policy"], dist, 1, optimizer)
    path = save(tmp_path, 1, models, optimizer, dist)
    loaded, its_optimizer = both()
    torch.nn.init.zeros_(loaded["reference"].norm.weight)
    checkpoint.load(path, model=loaded, optimizer=its_optimizer, dist=dist)
    for name in ("policy", "reference"):
        assert_equal(full_state_dict(loaded[name], dist), full_state_dict(models[name], dist))


def truncate(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])


def flip_one_bit(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "bytes, expected"),
    "bit_flip": (flip_one_bit, "another crc32"),
    "no_metadata": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "no_rank_file": (lambda path: (path / "rank_00000.pt").unlink(), "rank_00000.pt is missing"),
    "no_manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "torn_manifest": (lambda path: (path / "manifest.json").write_text('{"files": {'), "unreadable"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_torn_checkpoints_are_refused_and_passed_over(dist: Dist, tmp_path: Path, damage: str) -> None:
    model, optimizer = started(dist)
    first, second = (save(tmp_path, step, model, optimizer, dist) for step in (9, 10))  # 10 > 9, though "10" < "9"
    assert checkpoint.latest(tmp_path) == second
    destroy, reason = DAMAGE[damage]
    destroy(second)
    assert checkpoint.latest(tmp_path) == checkpoint.latest(tmp_path, dist) == first
    before = state_of(model, optimizer, dist)
    with pytest.raises(ValueError, match=f"step_10 is not usable: .*{reason}"):
        checkpoint.load(second, model=model, optimizer=optimizer, dist=dist)
    assert_equal(state_of(model, optimizer, dist), before)
    save(tmp_path, 10, model, optimizer, dist)  # a run that resumed from 9 reaches 10 again
    assert checkpoint.latest(tmp_path) == second


def test_retention_counts_usable_checkpoints_only(dist: Dist, tmp_path: Path) -> None:
    model, optimizer = started(dist)
    for step in (1, 2, 3):
        save(tmp_path, step, model, optimizer, dist, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_3"]
    truncate(tmp_path / "step_3")
    (tmp_path / "tmp_step_4").mkdir()
    save(tmp_path, 5, model, optimizer, dist, keep=2)
    # 2 is the second newest that can be loaded; the leftover of an interrupted save is gone.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_3", "step_5"]
    with pytest.raises(ValueError, match="keep=0"):
        save(tmp_path, 6, model, optimizer, dist, keep=0)


def test_nothing_to_resume_from(dist: Dist, tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "absent") is None
    model, optimizer = started(dist)
    with pytest.raises(ValueError, match="there is no such folder"):
        checkpoint.load(tmp_path / "step_1", model=model, optimizer=optimizer, dist=dist)


def test_another_optimizer_or_model_is_one_clear_error(dist: Dist, tmp_path: Path) -> None:
    path = save(tmp_path, 1, *started(dist, "adamw"), dist)
    model, optimizer = started(dist, "muon")
    with pytest.raises(ValueError, match=r"does not fit this model and optimizer: .*Missing key"):
        checkpoint.load(path, model=model, optimizer=optimizer, dist=dist)


def test_a_directory_that_cannot_be_written_is_one_clear_error(dist: Dist, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, optimizer = started(dist)
    with pytest.raises(OSError, match="was not written"):
        save(tmp_path / "file", 1, model, optimizer, dist)


def test_generation_after_load_uses_the_loaded_weights(dist: Dist, tmp_path: Path) -> None:
    model, optimizer = started(dist)
    path = save(tmp_path, 0, model, optimizer, dist)
    train(model, dist, 3, optimizer)
    with torch.no_grad():
        model(tokens_of_rank(0))
    checkpoint.load(path, model=model, optimizer=optimizer, dist=dist)
    with generation_phase(model):
        torch.testing.assert_close(model.decode(tokens_of_rank(0)), TinyDecoder()(tokens_of_rank(0)).detach())


@pytest.mark.dist
def test_kill_during_a_save_leaves_the_one_before(dist: Dist, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/dist/checkpoint_worker.py"), "killed", str(tmp_path)]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == -9
    assert (tmp_path / "tmp_step_2" / "manifest.json").exists()
    path = checkpoint.latest(tmp_path)
    assert path == tmp_path / "step_1"
    model, optimizer = started(dist)
    extra, _ = checkpoint.load(path, model=model, optimizer=optimizer, dist=dist)
    assert extra == {"step": 1}
    save(tmp_path, 2, model, optimizer, dist)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2"]


@pytest.mark.dist
def test_two_ranks_resume_exactly_and_one_rank_loads_theirs(dist: Dist, tmp_path: Path) -> None:
    torchrun("checkpoint_worker.py", "two_ranks", str(tmp_path))
    model = sharded(dist)
    optimizer = build_optimizer(model, name="muon", learning_rate=1e-2)
    extra, rank_state = checkpoint.load(tmp_path / "step_2", model=model, optimizer=optimizer, dist=dist)
    assert (extra, rank_state) == ({"tokens": 40}, {})
    train(model, dist, 1, optimizer)
    after_3 = torch.load(tmp_path / "after_3.pt")
    for name, tensor in full_state_dict(model, dist).items():
        torch.testing.assert_close(tensor, after_3[name], rtol=1e-5, atol=1e-6, msg=name)
