"""A checkpoint is complete or not there, and what is loaded continues with the same bits."""

import json
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r1fast.parallel import checkpoint
from r1fast.parallel.mesh import Dist
from r1fast.parallel.optim import build_optimizer
from r1fast.parallel.parallelize import generation_phase, parallelize
from r1fast.parallel.plain_state import read_plain, write_plain
from r1fast.run_folder import read_record, write_record
from tests.forks import Forks
from tests.parallel.tiny_model import TinyDecoder, full_state_dict, sharded, tokens_of_rank, train


def save(directory: Path, step: int, model: Any, optimizer: Any, dist: Dist, **options: Any) -> Path:
    options = {"extra": {"step": step}, **options}
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
    assert checkpoint.load(path, model=resumed, optimizer=its_optimizer, dist=dist) == {"step": 3}
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == draws
    assert_equal(state_of(resumed, its_optimizer, dist), saved)
    its_optimizer.set_lr(0.5)  # the schedule's and the recipe's, at every step
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


def folder_for_file(path: Path) -> None:
    (path / "shared.json").unlink()
    (path / "shared.json").mkdir()


def folder_for_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()


def flip_a_digit_of_the_manifest(path: Path) -> None:
    content = (path / "manifest.json").read_text()
    digit = re.search(r'"size": \d*(\d)', content)
    assert digit is not None
    at = digit.start(1)
    (path / "manifest.json").write_text(content[:at] + str(int(digit[1]) ^ 1) + content[at + 1 :])


SIZED = {"size": 0, "crc32": 0}


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        manifest = read_record(path / "manifest.json")
        change(manifest)
        write_record(path / "manifest.json", manifest)

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "bytes, expected"),
    "bit_flip": (flip_one_bit, "another crc32"),
    "no_contents": (lambda path: (path / "contents.json").unlink(), "contents.json is missing"),
    "no_rank_file": (lambda path: (path / "rank_00000.json").unlink(), "rank_00000.json is missing"),
    "empty_file": (lambda path: (path / "shared.json").write_text(""), "0 bytes, expected"),
    "one_file_more": (lambda path: (path / "shared.npz").write_text(""), "shared.npz is not in manifest.json"),
    "folder_for_file": (folder_for_file, "shared.json is no file"),
    "no_manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "folder_for_manifest": (folder_for_manifest, "manifest.json is no file"),
    "torn_manifest": (lambda path: (path / "manifest.json").write_text('{"files": {'), "unreadable"),
    "manifest_is_a_list": (lambda path: (path / "manifest.json").write_text("[1]"), "another crc32"),
    "manifest_is_deep": (lambda path: (path / "manifest.json").write_text("[" * 100_000), "unreadable"),
    "manifest_is_not_text": (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe{}"), "unreadable"),
    "manifest_bit_flip": (flip_a_digit_of_the_manifest, "another crc32"),
    # A manifest that somebody wrote anew, with its checksum.
    "other_step": (rewritten(lambda manifest: manifest.update(step=9)), "of step 9"),
    "step_is_text": (rewritten(lambda manifest: manifest.update(step="10")), "of step '10'"),
    "no_ranks": (rewritten(lambda manifest: manifest.update(world_size=0)), "0 ranks"),
    "more_ranks": (rewritten(lambda manifest: manifest.update(world_size=2)), "lacks rank_00001.json"),
    "ranks_are_text": (rewritten(lambda manifest: manifest.update(world_size="1")), "'1' ranks"),
    "files_are_a_list": (rewritten(lambda manifest: manifest.update(files=[])), "1 ranks"),
    "no_files": (rewritten(lambda manifest: manifest.pop("files")), "1 ranks"),
    "file_elsewhere": (rewritten(lambda m: m["files"].update({"../step_9/x": SIZED})), "no file of a checkpoint"),
    "absolute_file": (rewritten(lambda m: m["files"].update({"/etc/passwd": SIZED})), "no file of a checkpoint"),
    "size_is_text": (rewritten(lambda m: m["files"]["shared.json"].update(size="2")), "size and crc32 of shared"),
    "no_crc32": (rewritten(lambda m: m["files"]["shared.json"].pop("crc32")), "size and crc32 of shared"),
    "no_size_at_all": (rewritten(lambda m: m["files"].update({"shared.json": 3})), "size and crc32 of shared"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_torn_checkpoints_are_refused_and_passed_over(dist: Dist, tmp_path: Path, damage: str) -> None:
    model, optimizer = started(dist)
    first, second = (save(tmp_path, step, model, optimizer, dist) for step in (9, 10))  # 10 > 9, though "10" < "9"
    assert checkpoint.latest(tmp_path, dist) == second
    destroy, reason = DAMAGE[damage]
    destroy(second)
    assert checkpoint.latest(tmp_path, dist) == first
    before = state_of(model, optimizer, dist)
    with pytest.raises(ValueError, match=f"step_10 is not usable: .*{reason}"):
        checkpoint.load(second, model=model, optimizer=optimizer, dist=dist)
    assert_equal(state_of(model, optimizer, dist), before)
    save(tmp_path, 10, model, optimizer, dist)  # a run that resumed from 9 reaches 10 again
    assert checkpoint.latest(tmp_path, dist) == second


def test_retention_counts_usable_checkpoints_only(dist: Dist, tmp_path: Path) -> None:
    model, optimizer = started(dist)
    for step in (1, 2, 3):
        save(tmp_path, step, model, optimizer, dist)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_3"]
    truncate(tmp_path / "step_3")
    (tmp_path / "tmp_step_4").mkdir()
    save(tmp_path, 5, model, optimizer, dist)
    # 2 is the second newest that can be loaded; the leftover of an interrupted save is gone.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_3", "step_5"]


def test_what_a_kill_left_is_tidied_but_not_the_one_to_resume(dist: Dist, tmp_path: Path) -> None:
    """A kill may leave one checkpoint too many: while the newest are torn, it is the one that is needed."""
    model, optimizer = started(dist)
    first, second, third = (save(tmp_path, step, model, optimizer, dist, keep=3) for step in (1, 2, 3))
    (tmp_path / "tmp_step_4").write_text("no folder")
    (third / ".nfs0001").write_text("left by a file system")
    assert checkpoint.latest(tmp_path, dist) == third
    for path in (second, third):
        flip_one_bit(path)
    checkpoint.tidy(tmp_path, checkpoint.latest(tmp_path, dist))
    assert checkpoint.latest(tmp_path, dist) == first and not (tmp_path / "tmp_step_4").exists()
    flip_one_bit(third)  # back
    flip_one_bit(second)
    checkpoint.tidy(tmp_path, checkpoint.latest(tmp_path, dist))
    assert sorted(tmp_path.iterdir()) == [second, third]


def test_the_best_is_kept_beside_the_newest(dist: Dist, tmp_path: Path) -> None:
    model, optimizer = started(dist)
    for step in range(1, 6):
        save(tmp_path, step, model, optimizer, dist, keep=1, best=2)
    checkpoint.tidy(tmp_path, checkpoint.latest(tmp_path, dist), keep=1, best=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_5"]


def test_a_whole_file_with_other_contents_is_one_clear_error(dist: Dist, tmp_path: Path) -> None:
    model, optimizer = started(dist)
    for name, content, message in [
        ("__0_0.distcp", b"?" * 1000, "cannot be loaded: "),
        ("rank_00000.npz", b"no archive", "cannot be loaded: "),
        ("contents.json", b"{}", "does not fit this model and optimizer: it lacks model"),
    ]:
        path = save(tmp_path, 1, model, optimizer, dist)
        (path / name).write_bytes(content)
        entry = {name: checkpoint._entry(path / name)}
        rewritten(lambda manifest, entry=entry: manifest["files"].update(entry))(path)
        with pytest.raises(ValueError, match=f"step_1 {message}") as caught:
            checkpoint.load(path, model=model, optimizer=optimizer, dist=dist)
        assert "\n" not in str(caught.value)


def test_nothing_to_resume_from(dist: Dist, tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "absent", dist) is None
    model, optimizer = started(dist)
    with pytest.raises(ValueError, match="there is no such folder"):
        checkpoint.load(tmp_path / "step_1", model=model, optimizer=optimizer, dist=dist)


def test_another_optimizer_or_model_is_one_clear_error(dist: Dist, tmp_path: Path) -> None:
    path = save(tmp_path, 1, *started(dist, "adamw"), dist)
    model, optimizer = started(dist, "muon")
    with pytest.raises(ValueError, match=r"does not fit this model and optimizer: it lacks optimizer.*momentum"):
        checkpoint.load(path, model=model, optimizer=optimizer, dist=dist)
    model = parallelize(TinyDecoder(width=16), dist, param_dtype=torch.float32)
    optimizer = build_optimizer(model, learning_rate=1e-2)
    with pytest.raises(
        ValueError, match=r"does not fit this model .* torch.float32 \(17, 8\) in it, .* \(17, 16\) here"
    ):
        checkpoint.load(path, model=model, optimizer=optimizer, dist=dist)


def test_the_recipe_rules_over_the_saved_learning_rate(dist: Dist, tmp_path: Path) -> None:
    """What --resume changed must not be undone by the checkpoint."""
    path = save(tmp_path, 1, *started(dist), dist)
    model = sharded(dist)
    optimizer = build_optimizer(model, name="muon", learning_rate=1e-3, weight_decay=0.2, betas=(0.5, 0.6))
    checkpoint.load(path, model=model, optimizer=optimizer, dist=dist)
    groups = [{k: group[k] for k in ("initial_lr", "betas")} for group in optimizer.param_groups]
    assert groups == [{"initial_lr": 1e-3, "betas": (0.5, 0.6)}] * len(groups)


class Opens:
    """Unpickling this runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("where", ["payload", "contents.json", "shared.json", "shared.npz", "rank_00000.json"])
def test_no_file_of_a_checkpoint_runs_code(dist: Dist, tmp_path: Path, where: str) -> None:
    """Whoever wrote the folder can write its checksums, too."""
    model, optimizer = started(dist)
    path = save(tmp_path, 1, model, optimizer, dist, extra={"array": np.arange(3)})
    marker = tmp_path / "ran"
    name = next(path.glob("*.distcp")).name if where == "payload" else where
    evil = pickle.dumps(Opens(marker))
    if where == "payload":  # each tensor is a pickle in torch's own format
        torch.save(Opens(marker), path / name)
        evil = (path / name).read_bytes()
        contents = json.loads((path / "contents.json").read_text())
        for tensor in contents.values():
            tensor["chunks"][0] |= {"offset": 0, "length": len(evil)}
        (path / "contents.json").write_text(json.dumps(contents))
    (path / name).write_bytes(evil)
    files = {file.name: checkpoint._entry(file) for file in path.iterdir() if file.name != "manifest.json"}
    write_record(path / "manifest.json", read_record(path / "manifest.json") | {"files": files})
    assert checkpoint.verify(path, dist) is None
    with pytest.raises(ValueError):
        checkpoint.load(path, model=model, optimizer=optimizer, dist=dist)
    assert not marker.exists()


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    value = {"a": [1, None, {"b": "饭\ud800"}, 0.1, float("inf")], "c": np.array([[1, 2]], dtype=np.int16), "d": {}}
    assert write_plain(tmp_path / "x", value) == ["x.json", "x.npz"]
    back = read_plain(tmp_path / "x")
    array = back.pop("c")
    assert (array.dtype, array.tolist()) == (np.int16, [[1, 2]]) and back == {k: value[k] for k in ("a", "d")}
    with pytest.raises(TypeError, match="the key 1"):
        write_plain(tmp_path / "x", {1: 2})
    with pytest.raises(ValueError):
        write_plain(tmp_path / "x", np.array([object()]))


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
def test_kill_during_a_save_leaves_the_one_before(dist: Dist, forks: Forks, tmp_path: Path) -> None:
    forks.begin("tests.parallel.checkpoint_worker", "killed", tmp_path, log=tmp_path / "tmp_log")
    assert forks.end() == [-9], (tmp_path / "tmp_log").read_text()
    assert (tmp_path / "tmp_step_2" / "manifest.json").exists()
    path = checkpoint.latest(tmp_path, dist)
    assert path == tmp_path / "step_1"
    model, optimizer = started(dist)
    assert checkpoint.load(path, model=model, optimizer=optimizer, dist=dist) == {"step": 1}
    save(tmp_path, 2, model, optimizer, dist)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2"]


@pytest.mark.dist
def test_two_ranks_resume_exactly_and_one_rank_loads_theirs(dist: Dist, forks: Forks, tmp_path: Path) -> None:
    forks.run("tests.parallel.checkpoint_worker", "two_ranks", tmp_path, ranks=2)
    model = sharded(dist)
    optimizer = build_optimizer(model, name="muon", learning_rate=1e-2)
    assert checkpoint.load(tmp_path / "step_2", model=model, optimizer=optimizer, dist=dist) == {"tokens": 40}
    train(model, dist, 1, optimizer)
    after_3 = torch.load(tmp_path / "after_3.pt")
    for name, tensor in full_state_dict(model, dist).items():
        torch.testing.assert_close(tensor, after_3[name], rtol=1e-5, atol=1e-6, msg=name)
