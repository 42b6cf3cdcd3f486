"""A short chain to kill and to damage: what it is made of, how it is run, and what must be the same at its end."""

import json
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.forks import Forks
from tests.stages.conftest import QUESTIONS
from tests.tiny_checkpoint import QWEN2, write_checkpoint, write_jsonl, write_recipe

CLOCK = ("time", "step_time", "tokens_per_second")  # the metrics that need not be the same
LENGTHS = {"response_format": "think_answer", "max_prompt_length": 100, "max_completion_length": 32}
TUNED = {
    "name": "tuned", "kind": "sft", "train_files": ["lessons.jsonl"], "batch_size": 8, "num_train_epochs": 24,
    "save_steps": 6, "learning_rate": 1e-2, "warmup_steps": 3,
}  # fmt: skip
ZERO = {
    "name": "zero", "kind": "grpo", "model": "@tuned", "train_files": ["questions.jsonl"], "prompt_template": "chat",
    "num_generations": 4, "prompts_per_step": 3, "steps_per_generation": 2, "max_steps": 4, "save_steps": 1,
    "beta": 0.05, "ref_model_sync_steps": 3, "learning_rate": 1e-4, "log_completions_steps": 1,
    "rewards": {"mine": {"function": "rewards.py:count"}}, **LENGTHS,
}  # fmt: skip
DATA = {
    "name": "data", "kind": "reject", "model": "@zero", "train_files": ["open.jsonl"], "num_samples": 4, **LENGTHS,
}  # fmt: skip
REWARDS = "def count(completion_ids, **_):\n    return [len(set(ids)) / len(ids) for ids in completion_ids]\n"


def write_workspace(folder: Path, *, tuned: dict[str, Any] | None = None) -> Path:
    """Model, data, reward and recipe. tuned: other settings of the first stage."""
    write_checkpoint(folder / "start", **{**QWEN2, "max_position_embeddings": 256})
    # One answer for all: learned in a few steps, so that `data` keeps something.
    answer = "<think>one and two</think><answer>3</answer>"
    write_jsonl(folder / "lessons.jsonl", [{"prompt": row["prompt"], "completion": answer} for row in QUESTIONS])
    write_jsonl(folder / "questions.jsonl", QUESTIONS)
    write_jsonl(folder / "open.jsonl", [{"prompt": row["prompt"]} for row in QUESTIONS])  # no gold: nothing to verify
    (folder / "rewards.py").write_text(REWARDS)
    stages = [{**TUNED, **(tuned or {})}, ZERO, DATA]
    write_recipe(folder / "chain.yaml", *stages, name="chain", model={"path": "start"})
    return folder


class Trainers:
    """Runs command lines in a workspace."""

    def __init__(self, cwd: Path, forks: Forks, ranks: int = 1) -> None:
        self.cwd, self.forks, self.ranks, self.log = cwd, forks, ranks, cwd / "stderr.log"

    def begin(self, *argv: object) -> list[int]:
        """Start a run; returns its processes."""
        self.log.unlink(missing_ok=True)
        return self.forks.begin("r1fast.train", *argv, log=self.log, cwd=self.cwd, ranks=self.ranks)

    def end(self) -> list[int]:
        """Wait for the run that was begun; returns the exit codes."""
        return self.forks.end()

    def run(self, *argv: object) -> int:
        """Exit status of a run, the worst of its ranks."""
        self.begin(*argv)
        return max(self.end(), key=abs)

    def start(self, run_dir: str) -> int:
        return self.run("--config", "chain.yaml", "--output-dir", run_dir)

    def resume(self, run_dir: str, *argv: object) -> int:
        return self.run("--resume", "--output-dir", run_dir, *argv)

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def complaints(self) -> list[str]:
        """The lines by which the program speaks of what went wrong."""
        return [line for line in self.said().splitlines() if line.startswith("r1fast: ")]


def outcome(run_dir: Path, without: Collection[str] = ()) -> dict[str, Any]:
    """What must not depend on what happened on the way: weights, optimizer, metrics, samples, rows."""
    found: dict[str, Any] = {}
    for stage in ("tuned", "zero", "data"):
        folder = run_dir / stage
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(run_dir))
            if name in without:
                continue
            if path.name == "metrics.jsonl":
                found[name] = [without_clock(json.loads(line)) for line in path.read_text().splitlines()]
            elif path.is_file() and path.name not in NOT_COMPARED and path.suffix != ".npz":
                found[name] = path.read_bytes()
    return found


# Times, the checksums of files that hold them, and random-number states that nothing draws from.
NOT_COMPARED = ("stage.json", "shared.json", "manifest.json", "rank_00000.json", "rank_00001.json")


def without_clock(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in CLOCK and not name.startswith("seconds/")}


def differences(got: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))


def leftovers(run_dir: Path) -> list[str]:
    """Files that only a run at work has."""
    found = [*run_dir.rglob("*.partial"), *run_dir.rglob("tmp_*"), *run_dir.rglob("run.lock")]
    return sorted(str(path.relative_to(run_dir)) for path in found)


def processes_in(folder: Path) -> list[str]:
    """Command lines of the processes that work in a folder: trainers and the workers of their rewards."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cwd").resolve() == folder.resolve():
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except (OSError, ProcessLookupError):  # it ended meanwhile
                continue
    return found


def wait_until(is_so: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A tmpfs of that size."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Covers a folder by itself, read-only: what is open stays open, and nothing else can be written."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        remount(folder, "bind,ro")
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def why_no_mount(tmp_path: Path) -> str:
    """Why this process cannot mount a tmpfs, or ""."""
    (tmp_path / "probe").mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "probe")]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "there is no mount"
    if found.returncode:
        return " ".join(found.stderr.split()) or "mount fails"
    subprocess.run(["umount", str(tmp_path / "probe")], check=True)
    return ""
