"""Each stage alone, as a user runs it on a model and data of their own: what it writes, and that it does its work."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from r1fast import RolloutEngine, SamplingParams, load_model
from r1fast.models.weights import load_tokenizer
from r1fast.rewards.accuracy import accuracy
from tests.stages.conftest import QUESTIONS, REWARD_FILE, SFT_ROWS, SHORT, entries, metrics
from tests.tiny_checkpoint import DEEPSEEK_V3, PROMPTS, QWEN2, write_checkpoint, write_jsonl, write_recipe

pytestmark = pytest.mark.usefixtures("stage_files")

# The README's, with small numbers
RECIPE = """
model: {path: MODEL}            # Hub id or folder
stages:
  - {name: zero, kind: grpo, train_files: [train.jsonl], eval_files: [test.jsonl],      # columns: prompt, answer
     rewards: {accuracy: 1.0, format: 1.0, REWARD}, num_generations: 8, prompts_per_step: 8, max_completion_length: 8,
     beta: 0.001, epsilon: 0.2, loss_type: grpo, learning_rate: 5.0e-3, max_steps: 20, prompt_template: chat}
"""


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def check_language_model(folder: Path, start: Path) -> None:
    """transformers loads it, agrees with our decoder on it, and its weights are not those that training began with."""
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)("What is 1 + 2 ?").input_ids)
    ours, tokenizer = load_model(folder)
    assert tokenizer is not None
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        torch.testing.assert_close(
            ours(ids, torch.tensor([0, len(ids)], dtype=torch.int32)), expected, rtol=1e-4, atol=1e-4
        )
    before = load_model(start)[0].state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def answers_of(folder: Path, prompts: list[str], max_tokens: int = 16) -> list[str]:
    """Greedy answers in the chat template."""
    model, tokenizer = load_model(folder)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    found = RolloutEngine(model, tokenizer).generate(ids, SamplingParams(n=1, max_tokens=max_tokens, temperature=0.0))
    return [completions[0].text for completions in found]


# grpo


@pytest.mark.parametrize(
    "reward", ["red: {function: 'my_rewards.py:say_red'}", "my_rewards.say_red: 1.0"], ids=["file", "dotted"]
)
def test_grpo_with_a_reward_of_ones_own(
    command, base_model: Path, tmp_path: Path, reward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("MODEL", str(base_model)).replace("REWARD", reward))
    assert command("--config", "mine.yaml", "--output-dir", "run") == 0
    zero = tmp_path / "run" / "zero"
    name = "red" if reward.startswith("red") else "my_rewards.say_red"
    rewards = metrics(zero, f"rewards/{name}/mean")
    assert len(rewards) == 20
    assert mean(rewards[:4]) < 0.15 and mean(rewards[-4:]) > 0.4
    assert metrics(zero, "reward") == pytest.approx(rewards)  # accuracy and format stay 0
    check_language_model(zero / "model", base_model)
    assert all("red red" in text for text in answers_of(zero / "model", [row["prompt"] for row in PROMPTS[:4]]))
    entry = entries(tmp_path)["zero"]
    assert entry["eval_before"]["n"] == entry["eval_after"]["n"] == 4
    assert entry["eval_before"]["pass@1"] == 0.0 and "format" in entry["eval_after"]
    assert (zero / "checkpoints" / "step_20" / "manifest.json").is_file()


def asked(row: dict[str, Any]) -> str:
    """The question of a sample, whose prompt is as the model read it."""
    text = row["prompt"].partition("<｜User｜>")[2]
    assert text.endswith("<｜Assistant｜>")
    return str(text.removesuffix("<｜Assistant｜>"))


def test_grpo_samples_hold_what_the_update_saw(train, base_model: Path, tmp_path: Path) -> None:
    stage = {"name": "zero", "kind": "grpo", "train_files": ["train.jsonl"], **SHORT, "num_generations": 4}
    stage |= {"rewards": {"red": {"function": "my_rewards.py:say_red", "weight": 2.0}}, "prompts_per_step": 2}
    stage |= {"max_completion_length": 8, "max_steps": 3, "log_completions": 8, "log_completions_steps": 1}
    train(base_model, stage)
    files = sorted((tmp_path / "run" / "zero" / "samples").glob("*.parquet"))
    assert [file.stem for file in files] == ["step_00001", "step_00002", "step_00003"]
    for step, file in enumerate(files):
        rows = pq.read_table(file).to_pylist()
        assert len(rows) == 8 and {asked(row) for row in rows} <= {row["prompt"] for row in PROMPTS}
        golds = {row["prompt"]: row["answer"] for row in PROMPTS}
        assert all(row["gold"] == golds[asked(row)] and row["tokens"] <= 8 for row in rows)
        assert [row["reward"] for row in rows] == pytest.approx([2 * row["red"] for row in rows])
        for group in (rows[:4], rows[4:]):
            rewards = torch.tensor([row["reward"] for row in group])
            expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            assert torch.tensor([row["advantage"] for row in group]) == pytest.approx(expected, abs=1e-5)
        assert metrics(tmp_path / "run" / "zero", "reward")[step] == pytest.approx(
            mean([row["reward"] for row in rows])
        )


def test_grpo_in_epochs_sees_every_prompt_once(train, base_model: Path, tmp_path: Path) -> None:
    """20 prompts, 8 in a step: three steps, the last of which begins the next pass."""
    stage = {"name": "zero", "kind": "grpo", "train_files": "train.jsonl", **SHORT, "num_generations": 2}
    stage |= {"num_train_epochs": 1, "prompts_per_step": 8, "max_completion_length": 4, "log_completions": 16}
    train(base_model, {**stage, "rewards": {"red": {"function": "my_rewards.py:say_red"}}, "log_completions_steps": 1})
    files = sorted((tmp_path / "run" / "zero" / "samples").glob("*.parquet"))
    drawn = [row["prompt"] for file in files for row in pq.read_table(file).to_pylist()[::2]]
    assert len(files) == 3 and len(drawn) == 24
    assert len(set(drawn[:20])) == len(PROMPTS) == 20


def test_grpo_off_policy_on_a_mixture_of_experts(train, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "moe", **DEEPSEEK_V3)
    write_jsonl(tmp_path / "red.jsonl", [{**row, "domain": "red"} for row in PROMPTS])
    write_jsonl(tmp_path / "hinted.jsonl", [{**row, "domain": "hinted", "hint": "e"} for row in PROMPTS])
    stage = {
        "name": "zero", "kind": "grpo", "train_files": ["red.jsonl", "hinted.jsonl"], **SHORT,
        "max_completion_length": 8, "num_generations": 8, "prompts_per_step": 4,
        "domain_weights": {"red": 1, "hinted": 1}, "steps_per_generation": 4, "num_iterations": 2, "max_steps": 10,
        "beta": 0.0, "skip_zero_variance_groups": True,
        "loss_type": "dapo", "epsilon_high": 0.28, "learning_rate": 5e-3, "router_bias_update_rate": 0.01,
        "rewards": {
            "red": {"function": "my_rewards.py:say_red", "domains": ["red"]},
            "hinted": {"function": "my_rewards.py:hinted", "domains": ["hinted"]},
        },
    }  # fmt: skip
    train(model, stage)
    zero = tmp_path / "run" / "zero"
    assert metrics(zero, "rewards/failures") == [0.0] * 10
    assert mean(metrics(zero, "clip_ratio/region_mean")) > 0.01  # eight updates on one rollout leave the old policy
    rewards = metrics(zero, "reward")
    assert mean(rewards[-2:]) > mean(rewards[:2]) + 0.1
    check_language_model(zero / "model", model)
    bias = "layers.1.mlp.gate.e_score_correction_bias"
    moved = load_model(zero / "model")[0].state_dict()[bias] - load_model(model)[0].state_dict()[bias]
    assert moved.abs().max() > 0.0 and torch.allclose(moved * 100, (moved * 100).round(), atol=1e-3)


FAILS = "def fails(completions, **_):\n    raise OSError('no disk')\n"


def test_grpo_learns_from_the_rewards_that_work(train, base_model: Path, tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(REWARD_FILE + FAILS)
    stage = {"name": "zero", "kind": "grpo", "train_files": ["train.jsonl"], **SHORT, "beta": 0.0, "max_steps": 2}
    stage |= {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 4}
    rewards = {"fails": {"function": "my_rewards.py:fails"}, "red": {"function": "my_rewards.py:say_red"}}
    train(base_model, {**stage, "rewards": rewards})
    zero = tmp_path / "run" / "zero"
    assert metrics(zero, "rewards/failures") == [4.0, 4.0] and metrics(zero, "frac_unscorable") == [0.0, 0.0]
    assert metrics(zero, "reward") == metrics(zero, "rewards/red/mean")


@pytest.mark.parametrize("reward", ["fails", "silent"])
def test_grpo_stops_where_there_is_nothing_to_learn(
    command, base_model: Path, tmp_path: Path, reward: str, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = "def silent(completions, **_):\n    return [None] * len(completions)\n"
    (tmp_path / "my_rewards.py").write_text(FAILS + silent)
    stage = {"name": "zero", "kind": "grpo", "train_files": ["train.jsonl"], **SHORT, "beta": 0.0, "max_steps": 2}
    stage |= {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 4}
    stage |= {"rewards": {"mine": {"function": f"my_rewards.py:{reward}"}}}
    config = write_recipe(tmp_path / "mine.yaml", stage, model={"path": str(base_model)})
    assert command("--config", config, "--output-dir", "run") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    reason = {
        "fails": "reward 'my_rewards.py:fails', rows 0-3: OSError: no disk",
        "silent": "reward 'mine' gave None for every sample",
    }[reward]
    assert error.startswith(f"r1fast: stages.zero: none of 4 samples could be scored: {reason}; correct the reward")
    assert not (tmp_path / "run" / "zero" / "model").exists()


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_grpo_sampler_and_trainer_agree(train, base_model: Path, tmp_path: Path, temperature: float) -> None:
    stage = {"name": "zero", "kind": "grpo", "train_files": ["train.jsonl"], **SHORT, "temperature": temperature}
    stage |= {"prompts_per_step": 4, "num_generations": 4, "max_completion_length": 16, "max_steps": 3}
    stage |= {"rewards": {"red": {"function": "my_rewards.py:say_red"}}, "learning_rate": 1e-2, "beta": 0.01}
    train(base_model, stage)
    zero = tmp_path / "run" / "zero"
    assert max(metrics(zero, "sampling/sampling_logp_difference/max")) < 1e-4
    assert metrics(zero, "importance_ratio/mean") == [1.0] * 3
    kl = metrics(zero, "kl")
    assert abs(kl[0]) < 1e-6 < kl[-1]  # the reference is the start, and stays there until a sample earns something


def test_grpo_step_without_a_row_of_the_file_that_has_the_column(train, base_model: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "hinted.jsonl", [{**row, "hint": "e"} for row in PROMPTS[:1]])
    stage = {"name": "zero", "kind": "grpo", "train_files": ["train.jsonl", "hinted.jsonl"], **SHORT, "beta": 0.0}
    stage |= {"prompts_per_step": 1, "num_generations": 2, "max_steps": 3, "max_completion_length": 4}
    train(base_model, {**stage, "rewards": {"hinted": {"function": "my_rewards.py:hinted"}, "format": 1.0}})
    assert metrics(tmp_path / "run" / "zero", "rewards/failures") == [0.0] * 3


def test_grpo_as_dapo_has_it(train, base_model: Path, tmp_path: Path) -> None:
    """Rewards are shaped by length, and groups of equal reward make room: few prompts say "red" by chance."""
    stage = {"name": "zero", "kind": "grpo", "train_files": ["train.jsonl"], **SHORT, "beta": 0.0, "max_steps": 3}
    stage |= {"loss_type": "dapo", "epsilon_high": 0.28, "dynamic_sampling_refills": 2, "prompts_per_step": 3}
    stage |= {"num_generations": 2, "max_completion_length": 8, "overlong_buffer_length": 4, "overlong_penalty": 0.5}
    train(base_model, {**stage, "rewards": {"red": {"function": "my_rewards.py:say_red"}}})
    zero = tmp_path / "run" / "zero"
    overlong = metrics(zero, "rewards/overlong/mean")
    assert min(overlong) >= -1.0 and max(overlong) < 0.0
    expected = [red + 0.5 * length for red, length in zip(metrics(zero, "rewards/red/mean"), overlong)]
    assert metrics(zero, "reward") == pytest.approx(expected)
    refills, discarded = (metrics(zero, f"dynamic_sampling/{name}") for name in ("refills", "discarded_groups"))
    assert max(refills) == 2 and all(0 <= count <= 6 for count in discarded) and max(discarded) > 0
    rows = pq.read_table(zero / "samples" / "step_00001.parquet").to_pylist()
    assert len(rows) == 6 and {row["overlong"] for row in rows} <= {0.0, -0.25, -0.5, -0.75, -1.0}


# sft


def test_sft_learns_prompts_and_messages(train, base_model: Path, tmp_path: Path) -> None:
    stage = {"name": "tuned", "kind": "sft", "train_files": ["sft.jsonl"], "learning_rate": 1e-2, "batch_size": 2}
    entry = train(base_model, {**stage, "num_train_epochs": 25, "save_steps": 20})["tuned"]
    tuned = tmp_path / "run" / "tuned"
    losses = metrics(tuned, "loss")
    assert len(losses) == 50  # 3 rows in batches of 2: the last of an epoch is short
    assert mean(losses[:2]) > 4.0 and mean(losses[-2:]) < 0.3
    assert entry["numbers"] == {"rows": 3}
    check_language_model(tuned / "model", base_model)
    expected = ["<think> yes </think> the quick brown fox", "no no no green", "jumps over the lazy dog"]
    assert answers_of(tuned / "model", ["What is red ?", "blue ?", "green ?"], max_tokens=24) == expected
    assert sorted(path.name for path in (tuned / "checkpoints").iterdir()) == ["step_40", "step_50"]


def test_sft_stops_at_max_steps(train, base_model: Path, tmp_path: Path) -> None:
    stage = {"name": "tuned", "kind": "sft", "train_files": ["sft.jsonl"], "batch_size": 2, "max_steps": 3}
    train(base_model, stage)
    assert len(metrics(tmp_path / "run" / "tuned", "loss")) == 3


# collect, reject, distill


def check_rows(rows: list[dict], response_format: str) -> None:
    """Every row is right, and no two are the same."""
    texts, golds = [row["completion"] for row in rows], [row["answer"] for row in rows]
    assert set(accuracy(texts, texts, [[]] * len(rows), golds, response_format=response_format)) == {1.0}
    assert len({(row["prompt"], row["completion"]) for row in rows}) == len(rows)


def check_record(stage_dir: Path, numbers: dict) -> Counter:
    """data.jsonl and dropped.jsonl hold every sample once; returns how often each reason occurs."""
    dropped = rows_of(stage_dir / "dropped.jsonl")
    reasons = Counter(row["reason"] for row in dropped)
    assert numbers["dropped"] == dict(reasons)
    assert numbers["kept"] == len(rows_of(stage_dir / "data.jsonl")) == numbers["sampled"] - len(dropped)
    return reasons


def test_reject_keeps_only_what_is_right(train, taught_model: Path, tmp_path: Path) -> None:
    stage = {"name": "kept", "kind": "reject", "train_files": ["questions.jsonl"], **SHORT, "num_samples": 16}
    numbers = train(taught_model, {**stage, "response_format": "think_answer"})["kept"]["numbers"]
    kept = tmp_path / "run" / "kept"
    rows = rows_of(kept / "data.jsonl")
    check_rows(rows, "think_answer")
    assert {row["prompt"] for row in rows} == {row["prompt"] for row in QUESTIONS}
    reasons = check_record(kept, numbers)
    assert numbers["sampled"] == 16 * len(QUESTIONS)
    # Taught: a quarter wrong, a quarter malformed, half right, of which all but one per question are duplicates.
    assert min(reasons["incorrect"], reasons["not in format think_answer"], reasons["duplicate"]) > 12
    for row in rows_of(kept / "dropped.jsonl"):
        if row["reason"] == "not in format think_answer":
            assert not re.fullmatch(r"<think>[^<]+</think>\s*<answer>[^<]+</answer>", row["completion"])


def test_reject_takes_at_most_so_many_a_prompt(train, taught_model: Path, tmp_path: Path) -> None:
    """Of chats without a gold answer: then anything well formed is kept."""
    chats = [[{"role": "user", "content": row["prompt"]}] for row in QUESTIONS]
    write_jsonl(tmp_path / "chats.jsonl", [{"prompt": chat} for chat in chats])
    stage = {"name": "kept", "kind": "reject", "train_files": ["chats.jsonl"], **SHORT, "num_samples": 16}
    stage |= {"response_format": "think_answer", "max_per_prompt": 1, "num_prompts": 3}
    numbers = train(taught_model, stage)["kept"]["numbers"]
    rows = rows_of(tmp_path / "run" / "kept" / "data.jsonl")
    assert len({row["prompt"][0]["content"] for row in rows}) == len(rows) == 3
    assert check_record(tmp_path / "run" / "kept", numbers)["enough_for_prompt"] > 0


def test_reject_by_a_reward_of_ones_own(train, taught_model: Path, tmp_path: Path) -> None:
    """Weighted sums of at least min_reward; a sample to which no reward applies is kept."""
    (tmp_path / "my_judge.py").write_text(
        "def even(completions, judged, **_):\n"
        "    ends = [float(text[-10:-9] in set('02468')) for text in completions]\n"
        "    return [end if asked else None for end, asked in zip(ends, judged)]\n"
    )
    rows = [row | {"judged": i > 0} for i, row in enumerate(QUESTIONS)]
    write_jsonl(tmp_path / "judged.jsonl", [{k: v for k, v in row.items() if k != "answer"} for row in rows])
    stage = {"name": "kept", "kind": "reject", "train_files": ["judged.jsonl"], **SHORT, "num_samples": 16}
    stage |= {"response_format": "think_answer", "rewards": {"my_judge.py:even": 2.0}, "min_reward": 1.5}
    numbers = train(taught_model, stage)["kept"]["numbers"]
    kept = rows_of(tmp_path / "run" / "kept" / "data.jsonl")
    ends = {row["completion"][-10:-9] for row in kept if row["judged"]}
    assert ends and ends <= set("02468")
    assert any(not row["judged"] for row in kept)
    # Taught: half odd, and a quarter malformed, which is told first whatever the judge says.
    reasons = check_record(tmp_path / "run" / "kept", numbers)
    assert min(reasons["reward below min_reward"], reasons["not in format think_answer"]) > 0


def test_reject_of_everything_says_why(
    command, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {"name": "kept", "kind": "reject", "train_files": ["questions.jsonl"], **SHORT, "num_samples": 2}
    config = write_recipe(tmp_path / "mine.yaml", stage, model={"path": str(base_model)})
    assert command("--config", config, "--output-dir", "run") == 1
    assert "stages.kept: none of 16 samples passed: {" in capsys.readouterr().err
    reasons = Counter(row["reason"] for row in rows_of(tmp_path / "run" / "kept" / "dropped.jsonl"))
    assert set(reasons) == {"truncated", "not in format special_token"} and reasons.total() == 16


def test_collect_brings_both_sources_into_the_cold_start_form(train, taught_model: Path, tmp_path: Path) -> None:
    stage = {"name": "cold", "kind": "collect", "train_files": ["questions.jsonl"], **SHORT, "num_samples": 8}
    few_shot = {"examples_files": ["examples.jsonl"], "num_samples": 4, "num_prompts": 5}
    numbers = train(taught_model, {**stage, "few_shot": few_shot})["cold"]["numbers"]
    rows = rows_of(tmp_path / "run" / "cold" / "data.jsonl")
    check_rows(rows, "special_token")
    assert numbers["sampled"] == 8 * len(QUESTIONS) + 4 * 5
    own = [row for row in rows if " and " in row["completion"]]
    pages = [row for row in rows if " with " in row["completion"]]
    assert numbers["kept_from"] == {"zero": len(rows) - len(pages), "few_shot": len(pages)}
    assert len({row["prompt"] for row in own}) >= 7 and 3 <= len({row["prompt"] for row in pages}) <= 5
    assert own[0]["completion"].startswith("|special_token|") and "<think>" not in own[0]["completion"]
    for row in pages:  # cut before the next problem, and without the heading of the page
        assert row["completion"].endswith(f"|special_token|{row['answer']}")
    check_record(tmp_path / "run" / "cold", numbers)


def test_collect_alone_stops_at_its_limit(train, taught_model: Path, tmp_path: Path) -> None:
    stage = {
        "name": "cold",
        "kind": "collect",
        "train_files": ["questions.jsonl"],
        **SHORT,
        "num_samples": 8,
        "limit": 3,
    }
    numbers = train(taught_model, stage)["cold"]["numbers"]
    assert numbers["kept"] == 3 and check_record(tmp_path / "run" / "cold", numbers)["enough_in_all"] > 0


def test_samples_take_the_place_of_the_row_s_own_solution(train, taught_model: Path, tmp_path: Path) -> None:
    """Data with a column `messages` (as open-r1's) must not be learned from in place of the samples."""
    bad = {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "bad bad bad"}],
        "text": "bad",
    }
    write_jsonl(tmp_path / "questions.jsonl", [{**row, **bad} for row in QUESTIONS])
    sample = {"name": "kept", "kind": "reject", "train_files": ["questions.jsonl"], **SHORT, "num_samples": 8}
    tune = {"name": "tuned", "kind": "sft", "train_files": ["@kept"], "learning_rate": 1e-2, "num_train_epochs": 5}
    train(taught_model, {**sample, "response_format": "think_answer"}, tune)
    for text in answers_of(tmp_path / "run" / "tuned" / "model", [row["prompt"] for row in QUESTIONS]):
        assert "bad" not in text and "<answer>" in text


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "student", seed=1, **{**QWEN2, "max_position_embeddings": 256})


def test_distill_from_a_teacher(train, student: Path, taught_model: Path, tmp_path: Path) -> None:
    stage = {
        "name": "small",
        "kind": "distill",
        "teacher": str(taught_model),
        "train_files": ["questions.jsonl"],
        **SHORT,
    }
    stage |= {
        "response_format": "think_answer",
        "num_samples": 8,
        "learning_rate": 1e-2,
        "num_train_epochs": 50,
        "batch_size": 4,
    }
    stage |= {"eval_files": ["questions.jsonl"], "eval_num_samples": 4}
    entry = train(student, stage)["small"]
    small = tmp_path / "run" / "small"
    check_rows(rows_of(small / "data.jsonl"), "think_answer")
    assert entry["numbers"]["kept"] == entry["numbers"]["rows"] == len(rows_of(small / "data.jsonl"))
    assert (entry["eval_before"]["pass@1"], entry["eval_before"]["greedy"]) == (0.0, 0.0)
    assert entry["eval_after"]["pass@1"] > 0.5 and entry["eval_after"]["greedy"] == 1.0
    losses = metrics(small, "loss")
    assert losses[-1] < 0.1 * losses[0]
    check_language_model(small / "model", student)


def test_distill_without_a_teacher(train, student: Path, tmp_path: Path) -> None:
    stage = {
        "name": "small",
        "kind": "distill",
        "train_files": ["sft.jsonl"],
        "learning_rate": 1e-2,
        "num_train_epochs": 20,
    }
    assert train(student, stage)["small"]["numbers"] == {"rows": 3}
    losses = metrics(tmp_path / "run" / "small", "loss")
    assert losses[-1] < 0.5 * losses[0] and not (tmp_path / "run" / "small" / "data.jsonl").exists()


# reward_model


def pairs(count: int) -> list[dict]:
    words = ["red", "blue", "green", "fox", "dog"]
    texts = [(words[i % 5], words[(i // 5) % 5], words[(i // 25) % 5]) for i in range(count)]
    return [{"prompt": f"What is {a} ?", "chosen": f"{b} good {c}", "rejected": f"{b} bad {c}"} for a, b, c in texts]


REWARD_MODEL = {
    "kind": "reward_model",
    "learning_rate": 5e-3,
    "batch_size": 16,
    "eval_fraction": 0.25,
    "num_train_epochs": 2,
}


def score_of(folder: Path, prompt: str, response: str) -> float:
    """As transformers reads it: at the last token, which is the end-of-sequence token."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), load_tokenizer(folder)
    assert tokenizer is not None
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text + response + tokenizer.eos_token, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        return float(model(ids).logits)


@pytest.mark.parametrize("loss", ["pairwise", "pointwise"])
def test_reward_model_ranks_what_it_has_not_seen(train, base_model: Path, tmp_path: Path, loss: str) -> None:
    rows = pairs(96)
    if loss == "pointwise":
        rows = [
            {"prompt": row["prompt"], "response": row[key], "label": int(key == "chosen")}
            for row in rows
            for key in ("chosen", "rejected")
        ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    entry = train(base_model, {"name": "rm", "train_files": ["rows.jsonl"], "loss": loss, **REWARD_MODEL})["rm"]
    rm = tmp_path / "run" / "rm"
    # A quarter of the five prompts, rounded down, is held out with all its rows.
    assert {len(rows) - 20 * len(rows) // 96, len(rows) - 19 * len(rows) // 96} >= {entry["numbers"]["rows"]}
    numbers = entry["numbers"]
    assert numbers["held_out_accuracy"] >= 0.9
    assert numbers["held_out_accuracy"] < 1 or numbers["held_out_accuracy_ci"] == min(1.0, 3 / numbers["held_out_rows"])
    losses = metrics(rm, "loss")
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: the head starts at zero
    assert losses[-1] < 0.5 and mean(metrics(rm, "accuracy")[-2:]) > 0.9
    assert score_of(rm / "model", "What is fox ?", "dog good dog") > score_of(
        rm / "model", "What is fox ?", "dog bad dog"
    )

    # And as a reward, from outside of the run.
    (tmp_path / "run").rename(tmp_path / "first")
    model = tmp_path / "first" / "rm" / "model"
    stage = {"name": "zero", "kind": "grpo", "train_files": ["train.jsonl"], **SHORT, "rewards": {}, "max_steps": 1}
    stage |= {"max_completion_length": 6, "prompts_per_step": 4, "num_generations": 2, "log_completions": 8}
    train(base_model, {**stage, "reward_models": {"good": {"model": str(model), "weight": 2.0}}})
    rows = pq.read_table(tmp_path / "run" / "zero" / "samples" / "step_00001.parquet").to_pylist()
    assert len({row["good"] for row in rows}) > 4
    for row in rows:
        score = torch.tensor(score_of(model, asked(row), row["completion"]))
        assert row["good"] == pytest.approx(float(score.sigmoid()), abs=1e-4) and row["reward"] == 2 * row["good"]


# evaluate


def test_evaluate_measures_what_the_samples_say(train, taught_model: Path) -> None:
    stage = {"name": "test", "kind": "evaluate", "eval_files": ["questions.jsonl"], **SHORT, "eval_num_samples": 16}
    result = train(taught_model, stage)["test"]["eval_after"]
    assert (result["n"], result["k"], result["split"], result["temperature"]) == (8, 16, "questions.jsonl", 1.0)
    assert 0.5 < result["pass@1"] < 0.9 and 0.5 < result["format"] < 0.9  # taught: three quarters of each
    assert 0.0 < result["pass@1_ci"] < 0.2
    assert result["cons@k"] >= 0.9 and result["greedy"] >= 0.9 and 8 < result["length"] < 20


def test_evaluate_reports_the_limit_it_was_given(train, taught_model: Path) -> None:
    stage = {"name": "test", "kind": "evaluate", "eval_files": ["questions.jsonl"], **SHORT, "eval_limit": 3}
    result = train(taught_model, {**stage, "eval_greedy": False, "eval_rewards": {"accuracy": {}}})["test"][
        "eval_after"
    ]
    assert result["n"] == 3 and "greedy" not in result and "format" not in result


# pretrain


def test_pretrain_from_text_and_dialogues(command, base_model: Path, tmp_path: Path) -> None:
    texts = [f"the quick brown fox jumps over {color} dogs" for color in ("red", "blue", "green")]
    write_jsonl(tmp_path / "corpus.jsonl", [*({"text": text} for text in texts), *SFT_ROWS] * 10)
    stage = {
        "name": "base", "kind": "pretrain", "train_files": ["corpus.jsonl"], "vocab_size": 300, "batch_size": 12,
        "max_steps": 50, "max_length": 128, "learning_rate": 1e-2, "optimizer": "muon", "architecture": dict(QWEN2),
    }  # fmt: skip
    given = {name: value for name, value in stage.items() if name != "vocab_size"}
    second = {**given, "name": "second", "tokenizer": "@base", "architecture": dict(DEEPSEEK_V3), "max_steps": 2}
    third = {**given, "name": "third", "tokenizer": str(base_model), "max_steps": 1}
    config = write_recipe(tmp_path / "mine.yaml", stage, second, third)
    assert command("--config", config, "--output-dir", "run") == 0
    found = entries(tmp_path)
    base = tmp_path / "run" / "base"
    losses = metrics(base, "loss")
    assert losses[0] > 5.0 and losses[-1] < 1.0
    assert found["base"]["numbers"]["documents"] == 60
    assert answers_of(base / "model", ["green ?"]) == ["jumps over the lazy dog"]
    tokenizer = load_tokenizer(base / "model")
    assert len(tokenizer) <= 300 and len(tokenizer.tokenize("</answer>")) == 1
    sizes = {}
    for name in ("base", "second", "third"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name / "model")
        sizes[name] = (type(model).__name__, model.config.vocab_size)
    assert sizes["second"] == ("DeepseekV3ForCausalLM", sizes["base"][1])
    assert sizes["third"] == ("Qwen2ForCausalLM", 312)  # that of base_model
