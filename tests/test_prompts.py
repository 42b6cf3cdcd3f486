"""Prompts of training outside of it: render_prompt, engine.chat on what was trained, the example of the README."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from r1fast import RolloutEngine, load_model, render_prompt
from tests.tiny_checkpoint import GRPO, write_checkpoint, write_jsonl, write_recipe
from tests.zoo import fields

README = Path(__file__).parents[1] / "README.md"
ROWS: list[dict[str, Any]] = [
    {"prompt": "What is 1 + 2 ?", "answer": "3"},
    {"messages": [{"role": "user", "content": "one and two"}], "answer": "3"},
    {"problem": "the dog ?", "solution": "lazy"},
]


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_template": "r1_zero", "response_format": "think_answer"},
        {"prompt_template": "chat", "response_format": "think_summary", "prefill_think": True},
    ],
    ids=["r1_zero", "chat-prefilled"],
)
def test_a_stage_samples_from_these_tokens(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """render_prompt with the stage's options and the start's tokenizer; engine.chat, and render_prompt without options,
    with what was saved."""
    start = write_checkpoint(tmp_path / "start", **fields("llama", max_position_embeddings=512))
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    stage = {**GRPO, **options, "prompts_per_step": 3, "max_prompt_length": 400, "rewards": {"accuracy": 1.0}}
    recipe = write_recipe(tmp_path / "recipe.yaml", stage, model={"path": str(start)})
    sampled: list[list[int]] = []
    sample = RolloutEngine._sample
    monkeypatch.setattr(
        RolloutEngine, "_sample", lambda engine, ids, *rest: sampled.extend(ids) or sample(engine, ids, *rest)
    )
    assert command("--config", recipe, "--output-dir", "runs/mine") == 0
    of_stage, sampled[:] = sorted(sampled), []
    before = AutoTokenizer.from_pretrained(start)
    assert sorted(render_prompt(row, before, tokenize=True, **options) for row in ROWS) == of_stage

    engine = RolloutEngine(*load_model("runs/mine/zero/model"))
    questions = [row.get("prompt") or row.get("problem") or row["messages"][0]["content"] for row in ROWS]
    engine.chat([[{"role": "user", "content": question}] for question in questions])
    assert sorted(sampled) == of_stage
    assert sorted(render_prompt(row, engine.tokenizer, tokenize=True) for row in ROWS) == of_stage
    engine.generate([render_prompt(row, before, **options) for row in ROWS])
    assert sorted(sampled[-3:]) == of_stage

    (example,) = re.findall(r"```python\n(from r1fast import RolloutEngine.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    assert [len(group) for group in names["outputs"]] == [4]
    assert sampled[-1] == render_prompt("What is 2 + 3 * 4?", before, tokenize=True, **options)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown prompt template 'r1zero'.*did you mean 'r1_zero'"):
        render_prompt("a", None, prompt_template="r1zero")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="unknown response format 'think'"):
        render_prompt("a", None, prompt_template="plain", response_format="think")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"chat_template_kwargs are of the tokenizer's template; 'plain' reads none"):
        render_prompt("a", None, prompt_template="plain", chat_template_kwargs={"x": 1})  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="the prompt: no column 'prompt'"):
        render_prompt({"question_text": "a"}, None, prompt_template="plain")  # type: ignore[call-overload]
