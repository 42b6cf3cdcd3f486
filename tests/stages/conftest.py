"""A model taught to answer in several ways, some of them wrong: what sampling stages need to be tested on."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.forks import Forks
from tests.tiny_checkpoint import DEEPSEEK_V3, PROMPTS, QWEN2, write_checkpoint, write_jsonl, write_recipe

NAMES = {1: "one", 2: "two", 3: "three", 4: "four"}
PAIRS = [(a, b) for a in (1, 2) for b in (1, 2, 3, 4)]
QUESTIONS = [{"prompt": f"What is {a} + {b} ?", "answer": str(a + b)} for a, b in PAIRS]
EXAMPLES = [
    {"prompt": "What is 3 + 3 ?", "reasoning": "three and three", "answer": "6"},
    {"prompt": "What is 4 + 4 ?", "reasoning": "four and four", "answer": "8"},
]


def solution(a: int, b: int, result: int) -> str:
    return f"<think>{NAMES[a]} and {NAMES[b]}</think><answer>{result}</answer>"


def lessons() -> list[dict]:
    """Of four answers to a question: two right, one wrong, one right but malformed. And few-shot pages, all right."""
    from r1fast.data.templates import FEW_SHOT_STOP, render_prompt

    rows = []
    for (a, b), row in zip(PAIRS, QUESTIONS, strict=True):
        right = solution(a, b, a + b)
        texts = [right, right, solution(a, b, a + b + 1), right.replace("</think>", "")]
        rows += [{**row, "messages": [{"role": "user", "content": row["prompt"]}, said(text)]} for text in texts]
        for examples in itertools.permutations(EXAMPLES):
            page = render_prompt(row["prompt"], "few_shot", examples=examples, prefill_think=True)
            text = f"{NAMES[a]} with {NAMES[b]}|special_token|Summary: {a + b}{FEW_SHOT_STOP} What"
            # A plain page: the chat template would wrap it.
            rows.append({"text": page + text})
    return rows


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def dist() -> Iterator[Any]:
    """World size 1, in this process, on one thread."""
    import torch

    from r1fast.parallel.mesh import init_distributed

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist = init_distributed("cpu")
    yield dist
    dist.close()
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def taught_model(made_once: Callable[..., Path]) -> Path:
    """Made by an sft stage on messages and plain text."""
    return made_once("taught", teach) / "run" / "taught" / "model"


def teach(folder: Path) -> None:
    import torch

    from r1fast.train import main

    start = write_checkpoint(folder / "start", **{**QWEN2, "max_position_embeddings": 256})
    write_jsonl(folder / "lessons.jsonl", lessons())
    stage = {
        "name": "taught",
        "kind": "sft",
        "train_files": [str(folder / "lessons.jsonl")],
        "learning_rate": 1e-2,
        "batch_size": 24,
        "num_train_epochs": 60,
        "warmup_steps": 5,
    }
    recipe = write_recipe(folder / "recipe.yaml", stage, model={"path": str(start)})
    torch.set_num_threads(1)
    assert main(["--config", str(recipe), "--output-dir", str(folder / "run")]) == 0


@pytest.fixture(scope="session")
def cut_models(made_once: Callable[..., Path]) -> dict[str, str]:
    """The models of gradient_cases.py and metric_cases.py."""
    fields = {"moe": DEEPSEEK_V3, "dense": QWEN2}
    folder = made_once("cut_models", partial(write_checkpoints, fields))
    return {name: str(folder / name) for name in fields}


def write_checkpoints(models: dict[str, dict[str, Any]], folder: Path) -> None:
    for name, fields in models.items():
        write_checkpoint(folder / name, **fields)


@pytest.fixture(scope="session")
def lora_models(made_once: Callable[..., Path]) -> Path:
    """The folder of those of lora_cases.py."""
    from tests.stages.lora_cases import MODELS

    return made_once("lora_models", partial(write_checkpoints, MODELS))


@pytest.fixture(scope="session")
def two_ranks(
    cut_models: dict[str, str], lora_models: Path, made_once: Callable[..., Path], forks: Forks
) -> dict[str, Any]:
    """What rank_cases.py finds on two of them."""
    import torch

    module, models = "tests.stages.rank_cases", [*cut_models.values(), lora_models]
    folder = made_once("rank_cases", lambda folder: forks.run(module, folder / "out.pt", *models, ranks=2))
    return torch.load(folder / "out.pt", weights_only=False)


REWARD_FILE = """
def say_red(completions, **_):
    return [text.count("red") / max(1, len(text.split())) for text in completions]

def hinted(completions, hint, **_):
    return [None if word is None else float(word in text) for word, text in zip(hint, completions)]
"""
SHORT = {"prompt_template": "chat", "max_prompt_length": 100, "max_completion_length": 32}
SFT_ROWS = [
    {"prompt": "What is red ?", "completion": "<think> yes </think> the quick brown fox"},
    {"messages": [{"role": "user", "content": "blue ?"}, {"role": "assistant", "content": "no no no green"}]},
    {"prompt": [{"role": "user", "content": "green ?"}], "completion": "jumps over the lazy dog"},
]


@pytest.fixture
def stage_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", PROMPTS)
    write_jsonl(tmp_path / "test.jsonl", PROMPTS[:4])
    write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)
    write_jsonl(tmp_path / "examples.jsonl", EXAMPLES)
    write_jsonl(tmp_path / "sft.jsonl", SFT_ROWS)
    (tmp_path / "my_rewards.py").write_text(REWARD_FILE)


@pytest.fixture
def train(command: Callable[..., int], tmp_path: Path) -> Callable[..., dict[str, dict]]:
    """Runs stages on a model; returns the entries of summary.json by stage."""

    def run(model: Path, *stages: dict[str, Any], dtype: str = "auto") -> dict[str, dict]:
        config = write_recipe(tmp_path / "mine.yaml", *stages, model={"path": str(model), "dtype": dtype})
        assert command("--config", config, "--output-dir", "run") == 0
        return entries(tmp_path)

    return run


@pytest.fixture
def whole(
    request: pytest.FixtureRequest, start: Callable[..., int], made_once: Callable[..., Path], tmp_path: Path
) -> Callable[..., None]:
    """RUN/whole: of stages that the module's `start` took and nobody stopped. All tests that ask for the same have one
    run, and only read it."""

    def run(*stages: dict[str, Any], **sections: Any) -> None:
        def fill(folder: Path) -> None:
            assert start("whole", *stages, **sections) == 0
            (tmp_path / "whole").rename(folder / "whole")

        settings = json.dumps([request.module.__name__, stages, sections], sort_keys=True)
        made = made_once(f"whole-{hashlib.sha256(settings.encode()).hexdigest()[:16]}", fill)
        (tmp_path / "whole").symlink_to(made / "whole")

    return run


def entries(tmp_path: Path) -> dict[str, dict]:
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {entry["status"] for entry in summary["stages"]} == {"done"}
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "config.yaml").is_file()
    return {entry["name"]: entry for entry in summary["stages"]}


def metrics(stage_dir: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row[name] for row in rows]
