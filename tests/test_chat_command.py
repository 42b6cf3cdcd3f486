"""python -m r1fast.chat: which model it finds, turns, the reasoning, what ends an answer, and input from a pipe."""

import argparse
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from r1fast import RolloutEngine, SamplingParams, asking, chat, load_model, train
from r1fast.chat import Conversation, Reasoning, talk
from r1fast.data.templates import RESPONSE_FORMATS
from tests.tiny_checkpoint import GRPO, PROMPTS, SFT, write_checkpoint, write_jsonl, write_recipe
from tests.zoo import fields

ROOT = Path(__file__).parents[1]
QUESTION = "What is 1 + 2 ?"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages that save every step, and a reward model after them."""
    folder = tmp_path_factory.mktemp("chat")
    model = write_checkpoint(folder / "start", **fields("llama", initializer_range=0.02, max_position_embeddings=384))
    write_jsonl(folder / "train.jsonl", PROMPTS)
    write_jsonl(folder / "sft.jsonl", [{"prompt": "red ?", "completion": "blue"}] * 8)
    write_jsonl(folder / "pairs.jsonl", [{"prompt": "red ?", "chosen": "blue", "rejected": "no"}] * 8)
    stages: list[dict[str, Any]] = [
        {**GRPO, "save_steps": 1, "max_steps": 2, "learning_rate": 1e-2, "prompt_template": "r1_zero",
         "max_prompt_length": 340},
        {**SFT, "batch_size": 8, "num_train_epochs": 1, "max_length": 300, "prompt_template": "chat"},
        {"name": "judge", "kind": "reward_model", "loss": "pairwise", "train_files": ["pairs.jsonl"], "batch_size": 8,
         "num_train_epochs": 1, "max_length": 300},
    ]  # fmt: skip
    recipe = write_recipe(folder / "recipe.yaml", *stages, model={"path": str(model)})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main(["--config", str(recipe), "--output-dir", str(folder / "run")]) == 0
    return folder / "run"


def given(**options: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    asking.add_options(parser)
    return argparse.Namespace(**{**vars(parser.parse_args([])), **options})


def conversation(folder: Path, **options: Any) -> Conversation:
    return Conversation(RolloutEngine(*load_model(folder)), given(**{"max_tokens": 8, **options}))


# ---- which model ----


def test_a_run_is_its_last_model_that_answers(run: Path, tmp_path: Path) -> None:
    assert asking.find_model(str(run)).path == str(run / "tuned" / "model")  # not the reward model
    assert asking.find_model(str(run / "zero")).path == str(run / "zero" / "model")
    assert asking.find_model(str(run / "zero" / "model")).path == str(run / "zero" / "model")
    assert asking.find_model("owner/name").path == "owner/name"
    shutil.copytree(run, tmp_path / "run")
    for stage in ("zero", "tuned"):
        shutil.rmtree(tmp_path / "run" / stage / "model")
    with pytest.raises(
        ValueError, match=r"no stage of this run has made a model that answers; .*checkpoints of .*/zero"
    ):
        asking.find_model(str(tmp_path / "run"))
    assert asking.find_model(str(tmp_path / "run" / "zero")).description.endswith("zero, its newest checkpoint")


def test_a_step_is_read_from_its_checkpoint(run: Path) -> None:
    source = asking.find_model(str(run / "zero" / "2"))
    assert source.description.endswith("zero, step 2")
    step = asking.load(source, "auto", torch.device("cpu")).model.state_dict()
    last = load_model(run / "zero" / "model")[0].state_dict()
    assert step.keys() == last.keys() and all(torch.equal(step[name], last[name]) for name in last)


# ---- a conversation ----


def test_turns_follow_each_other_as_the_template_has_them(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talked = (
        conversation(run / "tuned", system="be brief")
        if False
        else conversation(run / "tuned" / "model", system="be brief")
    )
    asked: list[str] = []
    generate = talked.engine.generate

    def keep(prompts: Any, *args: Any, **options: Any) -> Any:
        asked.append(talked.tokenizer.decode(prompts[0]))
        return generate(prompts, *args, **options)

    monkeypatch.setattr(talked.engine, "generate", keep)
    first = talked.ask(QUESTION)
    talked.ask("and red ?")
    assert [turn["role"] for turn in talked.messages] == ["user", "assistant", "user", "assistant"]
    again = [{"role": "system", "content": "be brief"}, *talked.messages[:3]]
    assert asked[1] == talked.tokenizer.apply_chat_template(again, tokenize=False, add_generation_prompt=True)
    assert talked.messages[1]["content"].endswith(first.text) and first.note in ("", "cut after 8 tokens: --max-tokens")
    talked.messages = []
    assert talked.ask(QUESTION).text != first.text  # another answer to the same question


def test_single_questions_are_asked_alone(run: Path) -> None:
    talked = conversation(run / "zero" / "model")
    assert "trained on single questions" in talked.single
    for _ in range(3):
        talked.ask(QUESTION)
        assert [turn["role"] for turn in talked.messages] == ["user", "assistant"]
    with pytest.raises(ValueError, match="trained on single questions"):
        talked.set_system("be brief")
    talked.ask(QUESTION)  # and goes on without


def test_no_room_is_a_clear_error(run: Path) -> None:
    talked = conversation(run / "tuned" / "model", max_tokens=None, temperature=1.0)
    answer = talked.ask("red " * 370)
    assert answer.note in ("", "cut after 9 tokens: the model has room for no more") or "has room" in answer.note
    before = list(talked.messages)
    with pytest.raises(ValueError, match=r"the conversation has [34]\d\d tokens, and the model takes 384; /reset"):
        talked.ask("red " * 20)
    assert talked.messages == before
    talked.messages = []
    with pytest.raises(ValueError, match=r"the question has 4\d\d tokens, .*shorten it"):
        talked.ask("red " * 400)


def test_an_interrupt_keeps_what_was_said(run: Path) -> None:
    talked = conversation(run / "tuned" / "model", max_tokens=100)
    pieces: list[str] = []

    def stop(*parts: str) -> None:
        pieces.append("".join(parts))
        if len(pieces) == 3:
            raise KeyboardInterrupt

    answer = talked.ask(QUESTION, stop)
    assert answer.note == "stopped" and answer.text == "".join(pieces)
    assert talked.messages[-1] == {"role": "assistant", "content": answer.text}
    assert talked.ask("red ?").note != "stopped"


# ---- reasoning ----


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning"),
    [
        ("Assistant:", " <think> 3 and 2 </think> <answer> 5 </answer>", " <think> 3 and 2 </think>"),
        ("Assistant: <think>", " 3 </think> <answer> 5", " 3 </think>"),
        ("A<think>\n", "3 < 4 </thin", "3 < 4 </thin"),
        ("Solution:", "|special_token| 3 |special_token| Summary: 5", "|special_token| 3 |special_token|"),
        ("Solution: |special_token|", "3|special_token|5", "3|special_token|"),
        ("Assistant:", "5, as <think> is a tag </think>", ""),
        ("Assistant:", "", ""),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_reasoning_is_told_from_the_answer(prompt: str, text: str, reasoning: str, size: int) -> None:
    """Wherever pieces meet; but for pieces within a tag that then is none, or closes."""
    found = Reasoning.after(prompt)
    parts = [found.add(text[i : i + size]) for i in range(0, len(text), size)]
    assert "".join(map("".join, parts)) == text
    assert text[: found.end] == reasoning
    if reasoning:
        assert "".join(first for first, _ in parts) == reasoning


def test_every_format_is_known() -> None:
    for layout in RESPONSE_FORMATS.values():
        text = layout.render("why so", "5")
        found = Reasoning.after("Assistant:")
        found.add(text)
        assert text[: found.end].endswith(layout.think_close) and "5" in text[found.end :]


# ---- the terminal ----


@pytest.fixture
def terminal(run: Path) -> Callable[..., str]:
    """What is shown for these lines; an exception among them is raised by the line's input."""

    def show(*lines: str | type[BaseException], talked: Conversation | None = None) -> str:
        talked = talked or conversation(run / "tuned" / "model")
        shown = io.StringIO()
        left: Iterator[Any] = iter([*lines, EOFError])

        def read(prompt: str) -> str:
            line = next(left)
            if not isinstance(line, str):
                raise line
            shown.write(f"{prompt}{line}\n")
            return line

        console = Console(
            file=shown, force_terminal=True, width=80, highlight=False, markup=False, legacy_windows=False
        )
        talk(talked, console, "runs/mine", read)
        return shown.getvalue()

    return show


def test_commands(terminal: Callable[..., str], run: Path, tmp_path: Path) -> None:
    talked, file = conversation(run / "tuned" / "model"), tmp_path / "said.jsonl"
    said = terminal(
        KeyboardInterrupt, "", QUESTION, "/system be brief", f"/save {file}", f"/save {file}", "/reset", "/nothing",
        "/help", "/save", talked=talked,
    )  # fmt: skip
    for text in ("Ctrl-D or /exit leaves", "system turn is changed", "written to", "said.jsonl is there already",
                 "begins anew", "/nothing is no command", "forget the conversation", "/save FILE"):  # fmt: skip
        assert text in said, text
    turns = json.loads(file.read_text())["messages"]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant"] and turns[1]["content"] == QUESTION
    assert talked.messages == []
    assert "never asked" not in terminal("/exit", "never asked")


def test_reasoning_is_dim_and_nothing_moves_the_cursor(
    terminal: Callable[..., str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talked = conversation(run / "tuned" / "model")

    def answer(prompts: Any, params: Any, *, on_text: Any) -> Any:
        for piece in ("<think>", " one\x1b[2J", "</th", "ink>", " two [b]"):
            on_text(0, 0, piece)
        return [[argparse.Namespace(finish_reason="length")]]

    monkeypatch.setattr(talked.engine, "generate", answer)
    said = terminal(QUESTION, talked=talked)
    assert "\x1b[2m one\\x1b[2J\x1b[0m" in said and "\x1b[2mink>\x1b[0m" in said and " two [b]\n" in said
    assert "[cut after 8 tokens: --max-tokens]" in said


# ---- a pipe ----


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(text: str, *argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        capsys.readouterr()
        status = chat.main([str(argument) for argument in argv])
        return status, *capsys.readouterr()

    return run


def test_each_line_of_a_pipe_is_a_question(pipe: Callable[..., tuple[int, str, str]], run: Path) -> None:
    status, out, err = pipe(f"{QUESTION}\n\nred ?\n", run, "--max-tokens", 3, "--temperature", 0)
    engine = RolloutEngine(*load_model(run / "tuned" / "model"))
    questions = [[{"role": "user", "content": text}] for text in (QUESTION, "red ?")]
    both = engine.chat(questions, SamplingParams(max_tokens=3, temperature=0.0))
    assert (status, out) == (0, "".join(f"{group[0].text.strip()}\n" for group in both))
    assert [line.partition(":")[0] for line in err.splitlines()] in ([], ["line 1"], ["line 3"], ["line 1", "line 3"])


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("", ["nowhere/at/all"], "nowhere/at/all: no such folder"),
        ("", ["{run}/judge"], "reward model"),
        ("", ["{run}/zero/7"], "no checkpoint of step 7; kept are those of steps 1, 2"),
        ("", ["{run}/zero", "--system", "a"], "trained on single questions"),
        ("", ["{run}", "--device", "cuda:77"], "--device cuda:77: torch sees"),
        ("a\n" + "red " * 400, ["{run}", "--max-tokens", "2"], "line 2: the question has"),
    ],
    ids=["no-model", "reward-model", "no-step", "system", "device", "long"],
)
def test_what_is_wrong_is_one_line(
    pipe: Callable[..., tuple[int, str, str]], run: Path, text: str, argv: list[str], message: str
) -> None:
    status, _, err = pipe(text, *(argument.format(run=run) for argument in argv))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and message in errors[0] and "Traceback" not in err


# ---- a real terminal ----


@pytest.mark.slow
def test_ctrl_c_ends_the_answer_in_a_terminal(run: Path, tmp_path: Path) -> None:
    """A process at a pseudo-terminal: an endless answer is interrupted from the keyboard, and the next is asked."""
    command = [sys.executable, "-m", "r1fast.chat", str(run / "tuned"), "--max-tokens", "300"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    said = ""

    def until(pattern: str, begin: int) -> None:
        nonlocal said
        while not re.search(pattern, said[begin:], re.DOTALL):
            assert select.select([ours], [], [], 60)[0], said
            said += os.read(ours, 4096).decode(errors="replace")

    until("> ", 0)
    for _ in range(9):  # an answer may end by itself before
        begin = len(said)
        os.write(ours, b"red ?\n")
        until(r"red \?\r\n.", begin)
        os.write(ours, b"\x03")
        until(r"red \?\r\n.*> ", begin)
        if "[stopped]" in said:
            break
    os.write(ours, b"\x04")
    assert process.wait(timeout=60) == 0
    assert "model: " in said and "[stopped]" in said
    os.close(ours)
    os.close(theirs)
