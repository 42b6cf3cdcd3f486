"""What a reward is given: TRL's arguments for functions named by path, text for registered ones and verl's.

TRL 1.16, GRPOTrainer._calculate_rewards: prompts, completions, completion_ids, and every other column of the data;
where prompts are conversational, a completion is [{"role": "assistant", "content": text}].
"""

import json
import os
from importlib import import_module

import pytest

from r1fast.rewards.pool import RewardPool
from r1fast.rewards.registry import REWARDS

REWARDS_PY = """
import json

def seen(prompts, completions, completion_ids, **kwargs):
    with open(kwargs["record"][0], "a") as file:
        file.write(json.dumps([prompts, completions, completion_ids, sorted(kwargs)]) + "\\n")
    return [1.0] * len(completions)

def by_solution(completions, solution, **kwargs):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(text == gold) for text, gold in zip(texts, solution)]

class Judge:
    def __call__(self, prompts, completions, **kwargs):
        return [float(len(completion[0]["content"])) for completion in completions]

judge = Judge()

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str == ground_truth)

async def compute_later(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "acc": 0.5}

def no_score(data_source, solution_str, ground_truth):
    return {"acc": 1.0}

def with_state(completions, trainer_state, log_metric, **kwargs):
    return [trainer_state.global_step] * len(completions)

def with_default_state(completions, trainer_state=None, log_extra=None, **kwargs):
    return [float(trainer_state is None and log_extra is None)] * len(completions)
"""
REGISTERED_PY = """
from r1fast.rewards.registry import reward

@reward("registered")
def registered(completions, **_):
    return [float(isinstance(completion, str)) for completion in completions]
"""
CHAT = [{"role": "user", "content": "q"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("trl") / "trl_rewards.py"
    file.write_text(REWARDS_PY)
    return str(file)


def score(rewards, prompts, completions, **columns):
    with RewardPool(rewards) as pool:
        result = pool.score(prompts, completions, [[1], [2]], columns)
    assert result.failures == []
    return [values.tolist() for values in result.values.values()]


@pytest.mark.parametrize("spelling", ["file", "dotted"])
def test_prompts_columns_and_messages_arrive_as_in_trl(path, spelling, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(os.path.dirname(path))
    module = path + ":" if spelling == "file" else "trl_rewards."
    record = str(tmp_path / "record")
    columns = {"record": [record] * 2, "answer": ["a", "b"], "solution": ["a", "b"]}
    score({f"{module}seen": {}}, [CHAT, "plain"], ["x", "y"], **columns)
    prompts, completions, completion_ids, names = json.loads((tmp_path / "record").read_text())
    assert prompts == [CHAT, "plain"] and completion_ids == [[1], [2]]
    assert completions == [[{"role": "assistant", "content": "x"}], "y"]
    assert names == ["answer", "record", "solution"]


def test_a_reward_of_trl_reads_its_own_column(path) -> None:
    columns = {"answer": ["a", "a"], "solution": ["a", "a"]}
    rewards = {f"{path}:by_solution": {}, f"{path}:judge": {}}
    assert score(rewards, [CHAT, CHAT], ["a", "bb"], **columns) == [[1.0, 0.0], [1.0, 2.0]]


def test_registered_rewards_and_verl_get_text(path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("r1fast.rewards.registry.REWARDS", dict(REWARDS))
    (tmp_path / "registers_one.py").write_text(REGISTERED_PY)
    monkeypatch.syspath_prepend(tmp_path)
    import_module("registers_one")
    texts = ["<think>real thought</think><answer>1</answer>", "<think>real thought</think><answer>2</answer>"]
    rewards = {
        "accuracy": {},
        "r1fast.rewards.format.format_reward": {},
        "registered": {},
        f"{path}:compute_score": {},
        f"{path}:compute_later": {},
    }
    found = score(rewards, [CHAT, CHAT], texts, answer=["1", texts[1]])
    assert found[0][0] == 1.0
    assert found[1:3] == [[1.0, 1.0], [1.0, 1.0]]
    assert found[3] == found[4] == [0.0, 1.0]


def test_what_only_the_trainer_of_trl_passes(path) -> None:
    assert score({f"{path}:with_default_state": {}}, ["p", "p"], ["x", "y"]) == [[1.0, 1.0]]
    with pytest.raises(ValueError, match=r"needs \['log_metric', 'trainer_state'\], which only TRL's trainer passes"):
        RewardPool({f"{path}:with_state": {}})


def test_a_verl_dict_without_a_score_is_named(path) -> None:
    with RewardPool({f"{path}:no_score": {}}) as pool:
        result = pool.score(["p"], ["c"], [[1]], {"answer": ["a"]})
    assert r"a dict with the keys ['acc'], expected 'score'" in result.failures[0]
