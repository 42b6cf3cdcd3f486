"""Every fenced block of README and docs/, and every command in their text, does what the page says.

In the fast lane commands are parsed by their own programs, and runs are checked as --dry-run does, in this process; in
the slow one they are typed, with tiny models and data. What needs several machines is parsed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from runpy import run_module
from typing import Any

import pytest

from r1fast.command_line import parse
from r1fast.config import RECIPES, load_recipe
from r1fast.data.rows import ALIASES, canonical
from tests.docs.pages import ALL_BLOCKS, PAGES, ROOT, Block, blocks, prose
from tests.docs.test_facts import defaults_of_trl
from tests.docs.workspace import ROW, commands, fill, inline_commands, made_small, recipe_text, substituted

LANGUAGES = {"sh", "yaml", "python", "jsonl", ""}
PROGRAMS = ("make", "torchrun", "python", "pip", "vllm", "srun")
WITH = {language: [block for block in ALL_BLOCKS if block.language == language] for language in LANGUAGES}


@pytest.fixture(scope="session")
def model(made_once: Callable[..., Path]) -> Path:
    """A tiny one, with room for the lengths that pages name, and a chat template."""

    def make(folder: Path) -> None:
        from tests import zoo

        fields = zoo.fields("qwen2", initializer_range=0.1, max_position_embeddings=65536)
        zoo.write_checkpoint(folder, **fields)
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")

    return made_once("documented", make)


class Parsed(Exception):
    """The arguments were taken."""


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Whether `python -m MODULE` takes arguments, by the module's own parser; nothing is run."""
    inner = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        inner(self, *args, **kwargs)
        raise Parsed

    def check(module: str, words: list[str]) -> None:
        assert find_spec(module) is not None, module
        if not words or not module.startswith("r1fast."):  # what tests and benches take is for who writes them
            return
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            patch.setattr(sys, "argv", [module, *words])
            try:
                run_module(module, run_name="__main__")
            except Parsed:
                return
            except SystemExit as left:
                pytest.fail(f"{module} {words}: {left.code} {capsys.readouterr().err}")
            pytest.fail(f"{module} has read no arguments")

    return check


def test_every_block_has_a_known_language() -> None:
    assert len(ALL_BLOCKS) > 60
    for block in ALL_BLOCKS:
        assert block.language in LANGUAGES, f"{block}: {block.language!r}"
        if block.language == "":  # a drawing, or what is printed
            lines = block.text.splitlines()
            assert not all(line.startswith(PROGRAMS) for line in lines), f"{block}: commands are ```sh"


# Recipes


@pytest.mark.parametrize("block", WITH["yaml"], ids=str)
def test_yaml_is_a_recipe_or_a_part_of_one(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "block.yaml"
    path.write_text(recipe_text(block), encoding="utf-8")
    assert load_recipe(str(path), []).stages


@pytest.mark.parametrize("block", WITH["jsonl"], ids=str)
def test_rows_are_read_by_some_stage(block: Block) -> None:
    for line in block.text.splitlines():
        refusals = []
        for kind in ALIASES:
            try:
                canonical(json.loads(line), kind, str(block))  # type: ignore[arg-type]
            except ValueError as error:
                refusals.append(str(error))
        assert len(refusals) < len(ALIASES), refusals


# Python


def surroundings(page: Path) -> dict[str, Any]:
    """What README's example of the kernels has from a trainer."""
    import torch

    cu_seqlens = torch.tensor([0, 2, 4], dtype=torch.int32)
    given = {"hidden_TD": torch.randn(4, 8), "lm_head": torch.nn.Linear(8, 16, bias=False), "cu_seqlens": cu_seqlens}
    given |= {"target_ids_T": torch.zeros(4, dtype=torch.int64), "old_logprobs_T": torch.full((4,), -2.8)}
    given |= {"rewards_N": torch.tensor([0.0, 1.0]), "group_ids_N": torch.tensor([0, 0])}
    return given if page.name == "README.md" else {}


@pytest.mark.parametrize("block", [b for b in WITH["python"] if b.limit != "not run"], ids=str)
def test_python_runs(block: Block, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, block.page, model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    text = substituted(block.text, model).replace("runs/mine/zero/model", str(model))
    try:
        exec(compile(text, str(block), "exec"), surroundings(block.page))
    finally:
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", "") == str(tmp_path / f"{name}.py"):
                del sys.modules[name]


def test_a_script_of_trl_has_options_of_trl() -> None:
    (block,) = [block for block in WITH["python"] if block.limit == "not run"]
    compile(block.text, str(block), "exec")
    names = re.findall(r"^    (\w+)=", block.text.partition("GRPOConfig(\n")[2].partition("\n)")[0], re.M)
    assert len(names) > 8 and set(names) <= defaults_of_trl().keys() | {"output_dir", "beta"}


# Commands


def check_command(words: list[str], command: Callable[..., int], takes: Callable[..., None]) -> None:
    program, *rest = words
    if program == "make":
        check_make(rest)
    elif program == "pip":
        assert rest[0] == "install"
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args(rest)
        assert launched.module
        if launched.training_script == "r1fast.train":
            check_run(launched.training_script_args, command)
        else:
            takes(launched.training_script, launched.training_script_args)
    elif program == "python" and rest[:2] == ["-m", "r1fast.train"]:
        check_run(rest[2:], command)
    elif program == "python" and rest[0] == "-m":
        takes(rest[1], rest[2:])
    else:
        assert program == "python" and (ROOT / rest[0]).is_file(), words  # a script of the repository


def check_make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_set, value = word.partition("=")
        assert re.search(rf"^{name} \?=" if is_set else rf"^{name}:", text, re.M), word
        if name == "ARGS" and "--config" in value:
            check_run(value.split(), lambda *argv: 0)


def check_run(words: list[str], command: Callable[..., int]) -> None:
    if {"--help", "-h", "--version"} & set(words):
        with pytest.raises(SystemExit) as left:
            parse(words)
        assert left.value.code == 0, words
        return
    words = [word.removeprefix("/shared/") for word in words]
    args, overrides = parse(words)
    config = args.config or "tiny"
    if args.resume:  # of the run that the page has begun before
        config = "mine.yaml"
    if args.resume or (RECIPES / f"{config}.yaml").is_file():
        load_recipe(config, overrides)
    else:
        assert command(*words, *[] if args.dry_run else ["--dry-run"]) == 0, words


def commands_of(page: Path) -> list[list[str]]:
    shell = [block for block in blocks(page) if block.language == "sh" and block.limit != "not run"]
    return [words for block in shell for words in commands(block.text)] + list(inline_commands(prose(page)))


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=lambda page: page.name)
def test_commands_are_taken(
    page: Path, model: Path, command: Callable[..., int], takes: Callable[..., None], tmp_path: Path
) -> None:
    fill(tmp_path, page, model)
    for words in commands_of(page):
        if words[0] != "vllm":  # not installed here; docs/rollout.md is tested by `make test-vllm`
            check_command(words, command, takes)


def test_what_is_only_parsed_says_why() -> None:
    limits = [block for block in ALL_BLOCKS if block.limit == "parsed only"]
    assert {block.page.name for block in limits} <= {"multi-node.md"}
    for block in ALL_BLOCKS:  # and nothing else needs more than one machine
        assert ("--nnodes" in block.text) == (block in limits), block


# Typed


@pytest.fixture(scope="session")
def taught(model: Path, made_once: Callable[..., Path]) -> Path:
    """The model, after it has learned the one answer of the data: samples of it pass filters."""

    def teach(folder: Path) -> None:
        options = ["batch_size=8", "learning_rate=1e-2", "num_train_epochs=8", "prompt_template=r1_zero"]
        (folder / "rows.jsonl").write_text("\n".join([json.dumps(ROW)] * 64), encoding="utf-8")
        recipe = "stages: [{name: taught, kind: sft, train_files: [rows.jsonl]}]"
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        overrides = [f"model.path={model}", *(f"taught.{option}" for option in options)]
        run_typed([sys.executable, "-m", "r1fast.train", "recipe.yaml", "--output-dir", "run", *overrides], folder)

    return made_once("taught", teach) / "run" / "taught" / "model"


@pytest.fixture(scope="session")
def ran(taught: Path, made_once: Callable[..., Path]) -> Path:
    """A finished run of what the first page begins with, for pages that take it as there."""

    def run(folder: Path) -> None:
        fill(folder, ROOT / "docs" / "index.md", taught)
        options = made_small(str(folder / "mine.yaml"))
        run_typed([sys.executable, "-m", "r1fast.train", "mine.yaml", "--output-dir", "runs/mine", *options], folder)

    return made_once("ran", run) / "runs" / "mine"


def newest_step(stage: Path) -> int:
    return max((int(path.name.removeprefix("step_")) for path in stage.glob("checkpoints/step_*")), default=0)


def run_typed(line: list[str], folder: Path, *, stopped: Path | None = None) -> None:
    """A process that must end well; stopped: the folder of a stage after whose next checkpoint it is told to stop."""
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(line, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        before = newest_step(stopped) if stopped else 0
        while stopped is not None and process.poll() is None:
            if newest_step(stopped) > before:
                process.terminate()
                break
            time.sleep(0.05)
        status = process.wait(200)
    said = (folder / "log").read_text(encoding="utf-8", errors="replace")
    if stopped is None:
        assert status == 0, f"{' '.join(line)}\n{said[-3000:]}"
    else:
        assert "go on with:" in said, said


def typed(words: list[str]) -> list[str] | None:
    """As a process here: two ranks at most; None for what sets a machine up."""
    if words[0] in ("make", "pip", "vllm") or (words[0] == "python" and words[1] != "-m"):
        return None
    words = [re.sub(r"^8$", "2", word) for word in words]
    launcher = ["-m", "torch.distributed.run"] if words[0] == "torchrun" else []
    return [sys.executable, *launcher, *words[1:]]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "multi-node.md"], ids=lambda page: page.name)
def test_commands_run_as_they_are_typed(page: Path, taught: Path, ran: Path, tmp_path: Path) -> None:
    """The page's commands in its order, each a process: later ones resume, export and ask what earlier ones made.

    A run that the page resumes later is stopped on its way, and again before each resume but the last.
    """
    fill(tmp_path, page, taught)
    shell = [block for block in blocks(page) if block.language == "sh" and not block.limit]
    lines = [line for block in shell for words in commands(block.text) if (line := typed(words))]
    resumed = [i for i, line in enumerate(lines) if "--resume" in line]
    for name in ("mine", "seed0", "seed1") if not resumed else ():
        shutil.copytree(ran, tmp_path / "runs" / name)
    for i, line in enumerate(lines):
        stopped = None
        line = [substituted(word, taught) for word in line]
        if "r1fast.train" in line and "--help" not in line:
            args, _ = parse(line[line.index("r1fast.train") + 1 :])
            if resumed and i < resumed[-1] and args.output_dir == Path("runs/mine") and not args.dry_run:
                stopped = tmp_path / "runs/mine/zero"
            if args.config is not None and not (RECIPES / f"{args.config}.yaml").is_file():
                line = [*line, *made_small(str(tmp_path / args.config), **({"max_steps": 20} if stopped else {}))]
        line = [word.replace("max_steps=400", "max_steps=24").replace("zero/300", "zero/23") for word in line]
        run_typed(line, tmp_path, stopped=stopped)
