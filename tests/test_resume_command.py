"""--resume: who may work in a folder, what may be changed, what damage is mended, and what is refused in one line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r1fast.artifacts import Artifact, fingerprint, hub_commit
from r1fast.config import ConfigError, apply_overrides, validate
from r1fast.resume import Saved, changes, read_run
from r1fast.run_folder import (
    locked,
    read_record,
    remove,
    remove_leftovers,
    replace_file,
    replace_folder,
    write_record,
)
from r1fast.stages.training import Trainer
from r1fast.train import choose_threads
from tests.tiny_checkpoint import tree, write_jsonl, write_recipe

ROOT = Path(__file__).parents[1]
FIRST: dict[str, Any] = {"name": "first", "kind": "sft", "train_files": ["a.jsonl"], "max_steps": 2, "batch_size": 2}
SECOND: dict[str, Any] = {**FIRST, "name": "second", "model": "@first", "train_files": ["b.jsonl"], "max_steps": 4}
THIRD: dict[str, Any] = {**FIRST, "name": "third", "model": "@second"}


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `stopped` keeps what it made, for the other tests to copy."""
    return tmp_path_factory.mktemp("stopped")


@pytest.fixture
def stopped(
    command: Callable[..., int], once: Path, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """RUN, whose first stage is finished, and whose second was killed after its checkpoint of step 2."""
    if not (once / "run").exists():
        stop_a_run(command, base_model, tmp_path, monkeypatch)
        shutil.copytree(tmp_path, once, dirs_exist_ok=True)
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def stop_a_run(command: Callable[..., int], base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, [{"prompt": f"{name} {i} ?", "completion": "red " * i} for i in range(1, 7)])
    stages = [FIRST, {**SECOND, "save_steps": 2, "num_train_epochs": 9}, THIRD]
    write_recipe(tmp_path / "mine.yaml", *stages, model={"path": str(base_model)})
    calls, update = iter(range(1, 1000)), Trainer.update

    def killed_at_the_sixth(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 6:
            raise Killed
        return update(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", killed_at_the_sixth)
        with pytest.raises(Killed):
            command("--config", "mine.yaml", "--output-dir", "run")


@pytest.fixture
def resume(command, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """Resumes RUN; returns the exit status and what the program says of itself."""

    def run(*argv: object) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = command("--resume", "--output-dir", "run", *argv)
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return code, [line.removeprefix("r1fast: ") for line in err.splitlines() if line.startswith("r1fast: ")]

    return run


@pytest.fixture
def refuse(resume, stopped: Path) -> Callable[..., str]:
    """A resume that must be refused, and change nothing."""

    def run(*argv: object) -> str:
        before = tree(stopped)
        code, lines = resume(*argv)
        assert (code, len(lines)) == (2, 1) and tree(stopped) == before
        return lines[0]

    return run


def entry(run_dir: Path, name: str) -> dict[str, Any]:
    return next(e for e in read_record(run_dir / "summary.json")["stages"] if e["name"] == name)


# One process at a time


def holder_of(run_dir: Path) -> subprocess.Popen:
    """A process that holds the folder."""
    code = "import sys, r1fast.run_folder as f, pathlib, time\nwith f.locked(pathlib.Path(sys.argv[1])):\n"
    code += "    print('held', flush=True)\n    time.sleep(600)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run_dir)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def test_two_processes_in_one_folder(command, resume, stopped: Path, tmp_path: Path) -> None:
    import socket

    process = holder_of(stopped)
    before = tree(stopped)
    who = f"--output-dir {stopped}: process {process.pid} on {socket.gethostname()} is at work in it"
    code, (line,) = resume()
    assert code == 2 and line.startswith(who) and tree(stopped) == before
    assert command("--resume", "--output-dir", stopped, "--dry-run") == 0
    process.kill()  # the kernel frees the lock, the file stays
    process.wait()
    assert (stopped / "run.lock").exists()
    assert resume() == (0, [])
    assert not (stopped / "run.lock").exists()


def test_two_new_runs_in_one_folder(command, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new").mkdir()
    process = holder_of(tmp_path / "new")
    capsys.readouterr()
    assert command("--config", "mine.yaml", "--output-dir", "new") == 2
    assert f"process {process.pid} on" in capsys.readouterr().err
    process.kill()
    process.wait()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.lock"]
    assert command("--config", "mine.yaml", "--output-dir", "new") == 0  # what a kill before the first file leaves


def test_a_lock_that_was_deleted_meanwhile_holds_nothing(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / "run.lock").unlink()  # as its holder does at its end
        with locked(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} on"), locked(tmp_path):
            pytest.fail("held twice")
    assert list(tmp_path.iterdir()) == []


# Whole or not at all


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    replace_file(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")
    assert tree(tmp_path) == {"x": b"old"}


@pytest.mark.parametrize("number", range(1, 8))
def test_a_folder_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A kill before any call of the operating system that moves or syncs something."""
    target, calls = tmp_path / "stage" / "model", iter(range(1, 100))
    target.mkdir(parents=True)
    (target / "w").write_text("old")

    def killed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if next(calls) == number:
                monkeypatch.undo()
                os._killed = True  # type: ignore[attr-defined]
                raise Killed
            return original(*args)

        return call

    from r1fast import run_folder

    monkeypatch.setattr(run_folder.shutil, "rmtree", killed(run_folder.shutil.rmtree))
    monkeypatch.setattr(os, "rename", killed(os.rename))
    monkeypatch.setattr(os, "fsync", killed(os.fsync))
    try:
        manager = replace_folder(target)
        (manager.__enter__() / "w").write_text("new")
        # Without the clean-up that a killed process does not do.
        monkeypatch.setattr(run_folder, "suppress", None)
        manager.__exit__(None, None, None)
    except (Killed, TypeError):
        pass
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    found = tree(tmp_path)
    assert found in ({"stage": None, "stage/model": None, "stage/model/w": text} for text in (b"old", b"new"))


def test_leftovers_of_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    for name in ("model.replaced.partial", "model.partial"):
        (tmp_path / "stage" / name).mkdir(parents=True)
    (tmp_path / "stage" / "model.replaced.partial" / "w").write_text("old")
    (tmp_path / "summary.json.partial").write_text("{")
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"stage": None, "stage/model": None, "stage/model/w": b"old"}


def test_any_flipped_bit_of_a_record_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    content = {"a": [1, 2.5, None, "饭"], "b": {"1": float("nan")}, "c": True}
    write_record(path, content)
    assert str(read_record(path)) == str(content)
    whole = path.read_bytes()
    found = 0
    for at in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
            try:
                assert str(read_record(path)) == str(content)  # white space
            except ValueError:
                found += 1
    assert found > 0.9 * 8 * len(whole)


# What may be changed


def test_settings_of_what_is_not_finished_are_changed(resume, stopped: Path) -> None:
    code, lines = resume("stages.second.max_steps=6", "stages.second.learning_rate=1e-4", "stages.third.batch_size=3")
    expected = {
        "stages.second.max_steps": [4, 6],
        "stages.second.learning_rate": [5e-5, 1e-4],
        "stages.third.batch_size": [2, 3],
    }
    assert (code, sorted(lines)) == (0, sorted(f"{key}: {old} -> {new}" for key, (old, new) in expected.items()))
    summary = read_record(stopped / "summary.json")
    assert {c["key"]: [c["from"], c["to"]] for c in summary["changes"]} == expected
    rows = [json.loads(line) for line in (stopped / "second" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[1]["learning_rate"] < 5e-5 < rows[2]["learning_rate"]  # the recipe's, not the checkpoint's
    assert "max_steps: 6" in (stopped / "config.yaml").read_text()
    assert resume() == (0, [])  # nothing is changed any more


def test_another_recipe_is_held_to_the_same(resume, refuse, stopped: Path, tmp_path: Path, base_model: Path) -> None:
    stages = [
        FIRST,
        {**SECOND, "save_steps": 2, "num_train_epochs": 9, "max_steps": 5},
        THIRD,
        {**THIRD, "name": "more"},
    ]
    write_recipe(tmp_path / "other.yaml", *stages, model={"path": str(base_model)})
    write_recipe(tmp_path / "wrong.yaml", {**FIRST, "batch_size": 3}, *stages[2:], model={"path": str(base_model)})
    line = refuse("--config", "wrong.yaml", "stages.third.model=@first")
    assert "stages.first.batch_size: 2 -> 3 (stage first is finished)" in line
    assert "(stage second has begun)" in line
    code, lines = resume("--config", "other.yaml")
    assert code == 0 and lines[0] == "stages.second.max_steps: 4 -> 5" and lines[1].startswith("stages.more: null -> {")
    assert entry(stopped, "more")["status"] == "done"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("stages.first.learning_rate=1", "stages.first.learning_rate: 5e-05 -> 1 (stage first is finished)"),
        ("stages.first.max_steps=1", "(stage first is finished, and can only take more steps)"),
        ("stages.first.max_steps=9", "(stage first is finished, and second has begun with what it made)"),
        ("stages.second.optimizer=muon", "(the checkpoint of stage second holds it)"),
        ("stages.second.model=x", "stages.second.model: "),
    ],
)
def test_changes_that_come_too_late_are_refused_by_key(refuse, override: str, part: str) -> None:
    assert part.replace("-> 1 ", "-> 1.0 ") in refuse(override)


def test_nothing_is_made_from_a_stage_that_is_still_to_become_longer(
    command, resume, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"a {i} ?", "completion": "red"} for i in range(6)])
    second = {**SECOND, "train_files": ["a.jsonl"], "max_steps": 1}
    write_recipe(tmp_path / "mine.yaml", FIRST, second, model={"path": str(base_model)})
    assert command("mine.yaml", "--output-dir", "run", "--stages", "first") == 0
    run, stale = tmp_path / "run", "stages.second.model: @first: first is still to go on, and will make "
    before = tree(run)
    code, (line,) = resume("--stages", "second", "first.max_steps=4")
    assert code == 2 and line.startswith(stale) and tree(run) == before
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no more")))
        assert resume("first.max_steps=4")[0] == 1
    assert "eval_after" not in entry(run, "first") and (run / "first" / "model").exists()
    code, (line,) = resume("--stages", "second")
    assert code == 2 and line.startswith(stale)
    assert resume()[0] == 0 and (run / "first" / "checkpoints" / "step_4").exists()
    assert [entry(run, name)["status"] for name in ("first", "second")] == ["done", "done"]


def test_a_stage_that_lost_patience_becomes_no_longer(tmp_path: Path) -> None:
    stage = {**FIRST, "eval_files": ["a.jsonl"], "eval_steps": 1, "early_stopping_patience": 1}
    recipe = validate({"stages": [stage], "model": {"path": "m"}}, "mine.yaml")
    longer = apply_overrides(recipe.model_dump(mode="json"), ["first.max_steps=9"], "mine.yaml")
    (tmp_path / "first" / "checkpoints" / "step_2").mkdir(parents=True)

    def changed(*scores: float) -> list[str]:
        found = [{"step": step, "pass@1": score} for step, score in enumerate(scores, 1)]
        done = {"name": "first", "status": "done", "settings": recipe.stages[0].model_dump(mode="json")}
        saved = Saved(tmp_path, recipe, {"stages": [{**done, "validations": found}]}, [])
        return [change.key for change in changes(saved, longer)]

    assert changed(0.1, 0.2) == ["stages.first.max_steps"]
    with pytest.raises(ConfigError, match="stage first is finished, and early_stopping_patience = 1 ended it"):
        changed(0.2, 0.2)


def test_the_model_of_the_recipe_is_what_stages_began_with(refuse) -> None:
    assert "model.path: " in (line := refuse("model.path=x")) and "(stage first began with it)" in line


def test_nor_its_revision(refuse) -> None:
    assert "model.revision: " in (line := refuse("model.revision=x")) and "(stage first began with it)" in line


def test_an_option_that_is_newer_than_the_run_is_no_change(resume, stopped: Path) -> None:
    path = stopped / "summary.json"
    summary = read_record(path)
    for settings in (*(e["settings"] for e in summary["stages"][:2]), *summary["settings"]["stages"]):
        del settings["weight_decay"]
    del summary["settings"]["reward_workers"]
    write_record(path, summary)
    assert resume() == (0, [])


def test_fewer_steps_than_were_taken(resume, stopped: Path) -> None:
    code, lines = resume("stages.second.max_steps=1")
    assert code == 1 and "step_2 has taken 2 optimizer steps, and the recipe has 1" in lines[-1]
    assert resume("stages.second.max_steps=4") == (0, ["stages.second.max_steps: 1 -> 4"])


def test_an_edited_config_is_refused_and_a_missing_one_made_again(resume, refuse, stopped: Path) -> None:
    path = stopped / "config.yaml"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"max_steps: 4", b"max_steps: 5"))
    assert "config.yaml was edited or damaged since the run wrote it" in refuse()
    path.unlink()
    code, lines = resume()
    assert code == 0 and lines == [f"{Path('run') / 'config.yaml'} is missing; it is written anew"]
    assert path.read_bytes() == content


# Records


def test_a_damaged_summary_is_made_again(resume, stopped: Path) -> None:
    before = read_record(stopped / "summary.json")
    (stopped / "summary.json").write_text((stopped / "summary.json").read_text().replace('"done"', '"dome"'))
    code, (line,) = resume()
    assert code == 0 and "another crc32 than when it was written; it is made again" in line
    assert line.endswith("first done, second failed")
    assert entry(stopped, "first") == next(e for e in before["stages"] if e["name"] == "first")


@pytest.mark.parametrize(
    "place", ["summary.json", "report.html", "second/metrics.jsonl", "second/checkpoints", "third"]
)
@pytest.mark.parametrize(
    "make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")], ids=["folder", "pipe", "link"]
)
def test_something_else_in_place_of_what_is_written(refuse, stopped: Path, place: str, make: Callable) -> None:
    kind = "folder" if place in ("second/checkpoints", "third") else "file"
    if (stopped / place).exists():
        remove(stopped / place)
    make(stopped / place)
    if kind == "folder" and (stopped / place).is_dir():
        return
    assert f"{place} is no {kind}; move it away" in refuse()


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda summary: summary.pop("stages"), "stages: field required"),
        (lambda summary: summary.update(stages=[1]), "stages.0"),
        (lambda summary: summary["stages"][0].pop("status"), "stages.0.status: field required"),
        (lambda summary: summary["stages"][0].update(seconds="1"), "stages.0.seconds"),
        (lambda summary: summary["settings"].update(stages=3), "settings.stages"),
        (lambda summary: summary.update(evaluations=[]), "evaluations"),
    ],
)
def test_a_whole_record_of_another_shape_is_made_again(resume, stopped: Path, change: Callable, where: str) -> None:
    write_record(stopped / "summary.json", rewritten(read_record(stopped / "summary.json"), change))
    code, (line,) = resume("--stages", "first")
    assert code == 0 and f"summary.json is of another version ({where}" in line and "first done" in line
    write_record(stopped / "first" / "stage.json", rewritten(read_record(stopped / "first" / "stage.json"), dict.clear))
    (stopped / "summary.json").unlink()
    code, (line,) = resume()
    assert code == 2 and "first/stage.json is of another version (entry: field required)" in line


def test_threads_are_taken_from_a_record_that_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS")
    (tmp_path / "first").mkdir()
    write_record(tmp_path / "summary.json", {"machine": "of another version"})
    write_record(tmp_path / "first" / "stage.json", {"machine": {"threads": 3}})
    choose_threads(tmp_path)
    assert os.environ["OMP_NUM_THREADS"] == "3"


def rewritten(record: dict[str, Any], change: Callable) -> dict[str, Any]:
    change(record)
    return record


def test_what_has_not_begun_is_changed_without_a_summary(resume, stopped: Path) -> None:
    """The records of the stages know nothing of the third."""
    (stopped / "summary.json").unlink()
    code, lines = resume("--stages", "first", "stages.third.model=@first")
    assert code == 0 and lines[1:] == ['stages.third.model: "@second" -> "@first"']


def test_without_recipe_and_summary_another_recipe_is_taken(resume, stopped: Path) -> None:
    for name in ("summary.json", "config.yaml"):
        (stopped / name).unlink()
    assert resume()[0] == 2
    code, lines = resume("--stages", "first", "--config", "mine.yaml")
    assert code == 0 and "it is made again" in lines[0] and "config.yaml is missing; it is written anew" in lines[1]


def test_a_model_that_was_damaged_is_one_line(resume, stopped: Path) -> None:
    remove(stopped / "second" / "checkpoints")
    (stopped / "first" / "model" / "model.safetensors").write_bytes(b"not a model")
    code, lines = resume("--accept-changes")
    assert code == 1 and "stages.second: " in lines[-1] and "not a readable safetensors file" in lines[-1]


def test_without_any_record_nobody_knows_what_is_finished(refuse, stopped: Path) -> None:
    (stopped / "summary.json").unlink()
    (stopped / "first" / "stage.json").write_text("{}")
    assert "first/stage.json has another crc32" in (line := refuse()) and "which stages are finished" in line


def test_resume_rewrites_nothing_that_is_finished(resume, stopped: Path) -> None:
    assert resume() == (0, [])
    before = {path: path.stat().st_ino for path in stopped.rglob("*") if "report" not in path.name}
    del before[stopped / "summary.json"]
    assert resume() == (0, [])
    assert {path: path.stat().st_ino for path in before} == before


# Inputs


def test_a_changed_input_of_a_finished_stage_is_reported(resume, stopped: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("red", "rad"))
    code, lines = resume()
    assert code == 0
    assert lines == ["stages.first.train_files: a.jsonl has changed since the finished stage read it"]


def test_a_changed_input_of_a_stage_that_has_begun_must_be_asked_for(resume, refuse, stopped, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text((tmp_path / "b.jsonl").read_text().replace("red", "rad"))
    line = refuse()
    assert "stages.second.train_files: b.jsonl" in line and "--accept-changes" in line
    code, (said,) = resume("--accept-changes")
    assert code == 0 and said.startswith("stages.second.train_files: b.jsonl: ")
    (change,) = read_record(stopped / "summary.json")["changes"]
    assert change["key"] == "stages.second.train_files: b.jsonl" and change["from"] != change["to"]
    assert resume() == (0, [])


def test_a_changed_model_of_a_stage_that_is_to_come(refuse, stopped: Path) -> None:
    path = stopped / "first" / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "stages.second.model: @first" in refuse()


def test_a_finished_stage_needs_its_files_no_more(resume, stopped: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").rename(tmp_path / "elsewhere.jsonl")
    third_needs_it = "stages.third.train_files=[b.jsonl]"
    code, lines = resume(third_needs_it)
    assert code == 0 and "stages.first.train_files: a.jsonl has changed" in "\n".join(lines)


def test_accept_changes_is_of_a_resume(command, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--config", "mine.yaml", "--output-dir", "new", "--accept-changes") == 2
    assert "--accept-changes goes with --resume" in capsys.readouterr().err


def test_fingerprints_see_contents_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "x"
    path.parent.mkdir()
    path.write_bytes(b"1" * 100)
    whole, folder = fingerprint(path), fingerprint(path.parent)
    os.utime(path, (1, 1))
    assert (fingerprint(path), fingerprint(path.parent)) == (whole, folder)
    path.rename(path.with_name("y"))
    assert fingerprint(path.parent) != folder and fingerprint(path.with_name("y")) == whole
    assert fingerprint(path) == "missing"
    of_package = Artifact("model", "package:r1fast/recipes/tiny.yaml", "model").fingerprint(tmp_path)
    assert of_package == fingerprint(ROOT / "r1fast/recipes/tiny.yaml")
    assert Artifact("model", "package:no_such/x.gguf", "model").fingerprint(tmp_path) == "missing"
    # A large file: its ends, its size, and a block in the middle.
    monkeypatch.setattr("r1fast.artifacts.WHOLE_BYTES", 1000)
    monkeypatch.setattr("r1fast.artifacts.BLOCK_BYTES", 1000)
    large = tmp_path / "large"
    content = bytearray(100_000)
    large.write_bytes(content)
    first = fingerprint(large)
    for at in (0, len(content) - 1, 99_000 * 31 // 63 + 5):
        with large.open("r+b") as file:
            file.seek(at)
            file.write(b"1")
        assert fingerprint(large) != first
        first = fingerprint(large)
    large.write_bytes(bytes(len(content) - 1))
    assert fingerprint(large) != first


def test_the_commit_of_a_hub_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert hub_commit("org/name", "model") == "unknown"
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc123\n")
    assert hub_commit("org/name", "model") == "abc123"
    (refs / "v1").write_text("def456\n")
    assert hub_commit("org/name@v1", "model") == "def456"
    assert hub_commit("org/name@v2", "model") == "unknown"
    assert hub_commit(f"org/name@{'a1' * 20}", "model") == "a1" * 20


def test_read_run_of_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        read_run(tmp_path)
