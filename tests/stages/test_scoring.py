"""What a failed reward does to totals, evaluations and filters; by hand, without a model."""

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from r1fast.data.rows import canonical, prompt_and_target, texts_of
from r1fast.schema import GRPOStage
from r1fast.schema_options import FilterOptions, RewardSpec, RewardWorkers
from r1fast.stages import reject
from r1fast.stages.evaluate import _key, summarize
from r1fast.stages.grpo import Learner, rollout_metrics
from r1fast.stages.reject import drop_reason
from r1fast.stages.sampler import Sample
from r1fast.stages.scoring import NothingScored, Scorer, total_rewards

NAN = math.nan


def sample(group: int, failed: tuple[str, ...] = (), *, text: str = "", row: Any = None, **rewards: float) -> Sample:
    found = Sample(row or {"answer": "1"}, group, [0], [1], [0.0], "stop", text, False)
    found.rewards, found.failed_rewards = dict(rewards), failed
    return found


def totals(samples: list[Sample], **weights: float) -> list[float]:
    total_rewards(samples, weights)
    return [one.reward for one in samples]


def same(found: list[float], expected: list[float]) -> bool:
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(found, expected, strict=True))


def test_a_reward_that_failed_on_one_sample_leaves_it_out() -> None:
    """With its format reward alone it would be compared with sums of two rewards."""
    group = [sample(0, accuracy=1.0, format=1.0), sample(0, ("accuracy",), accuracy=NAN, format=1.0)]
    assert same(totals(group, accuracy=2.0, format=0.5), [2.5, NAN])
    assert group[1].rewards["format"] == 1.0


def test_a_reward_that_failed_on_a_whole_group_leaves_the_others_theirs() -> None:
    failed = [sample(0, ("accuracy",), accuracy=NAN, format=value) for value in (1.0, 0.0)]
    scored = [sample(1, accuracy=value, format=1.0) for value in (1.0, 0.0)]
    assert same(totals([*failed, *scored], accuracy=2.0, format=0.5), [0.5, 0.0, 2.5, 0.5])


def test_none_is_left_out_of_the_sum_and_a_failure_scored_0_is_in_it() -> None:
    group = [
        sample(0, accuracy=NAN, format=1.0),
        sample(0, ("accuracy",), accuracy=0.0, format=1.0),
        sample(0, accuracy=1.0, format=1.0),
    ]
    assert same(totals(group, accuracy=2.0, format=0.5), [0.5, 0.5, 2.5])


def test_where_all_failed_there_is_nothing_to_learn() -> None:
    assert same(totals([sample(0, ("a", "b"), a=NAN, b=NAN)] * 2, a=1.0, b=1.0), [NAN, NAN])


def test_failures_count_as_wrong_in_an_evaluation_and_stand_beside_it() -> None:
    samples = [sample(0, accuracy=1.0), *(sample(group, ("accuracy",), accuracy=NAN) for group in (1, 2))]
    result = summarize(samples, [], "think_answer")
    assert result["pass@1"] == pytest.approx(1 / 3) and result["n"] == 3
    assert result["failures"] == 2 and result["unscorable"] == 0
    assert result["cons@k"] == 0.0  # no answer in these texts


def test_a_head_in_float32_makes_another_evaluation() -> None:
    stage = {"name": "zero", "kind": "grpo", "train_files": ["-"], "max_steps": 2}
    contexts: list[Any] = [
        SimpleNamespace(stage=GRPOStage.model_validate({**stage, "lm_head_fp32": in_fp32})) for in_fp32 in (False, True)
    ]
    assert len({_key(ctx, "@base") for ctx in contexts}) == 2


def test_golds_that_cannot_be_read_are_counted_and_left_out() -> None:
    chat = {"prompt": "hello"}
    samples = [sample(0, accuracy=1.0), sample(1, accuracy=NAN), sample(2, accuracy=NAN, row=chat)]
    result = summarize(samples, [], "think_answer")
    assert (result["pass@1"], result["n"], result["failures"], result["unscorable"]) == (1.0, 1, 0, 1)


def test_the_most_frequent_answer_may_be_one_whose_reward_failed() -> None:
    text = "<think>hm</think><answer>1</answer>"
    samples = [sample(0, ("accuracy",), accuracy=NAN, text=text) for _ in range(2)]
    samples.append(sample(0, accuracy=1.0, text=text.replace("1", "2")))
    assert summarize(samples, [], "think_answer")["cons@k"] == 0.0


def test_of_answers_that_are_as_frequent_the_first_counts() -> None:
    """Numbers by value: 1 and 1.0 are one answer, as frequent as 2."""
    text = "<think>hm</think><answer>{}</answer>"
    for said, expected in ((["2", "1", "1.0", "2"], 0.0), (["1.0", "2", "2", "1"], 1.0), (["2", "1", "1.0"], 1.0)):
        right = [float(answer.startswith("1")) for answer in said]
        samples = [sample(0, accuracy=x, text=text.format(answer)) for x, answer in zip(right, said, strict=True)]
        assert summarize(samples, [], "think_answer")["cons@k"] == expected


def test_other_rewards_that_failed_lower_their_mean() -> None:
    samples = [sample(0, accuracy=1.0, format=1.0), sample(1, ("format",), accuracy=1.0, format=NAN)]
    result = summarize(samples, [], "think_answer")
    assert result["format"] == 0.5 and result["pass@1"] == 1.0 and result["failures"] == 1


def test_every_metric_has_its_interval_and_greedy_answers_their_own() -> None:
    rows = [{"prompt": str(i), "answer": "1", "problem": "same"} for i in range(2)] + [{"prompt": "2", "answer": "1"}]
    samples = [sample(i, accuracy=x, mine=2.0 * x, row=rows[i]) for i, x in ((0, 1.0), (0, 0.0), (1, 1.0), (2, 0.0))]
    greedy = [sample(i, accuracy=1.0, mine=NAN if i else 3.0, row=rows[i]) for i in range(3)]
    result = summarize(samples, greedy, "think_answer")
    # Means of prompts 0.5, 1, 0; the first two are one problem: deviations 0.5 and -0.5 of two problems.
    half = 1.96 * (0.5**2 * 2 * 2 / 1) ** 0.5 / 3
    assert result["pass@1"] == 0.5 and result["pass@1_ci"] == pytest.approx(half)
    assert result["mine"] == 1.0 and result["mine_ci"] == pytest.approx(2 * half)
    assert result["greedy"] == 1.0 and result["greedy_ci"] == 1.0 and result["greedy/mine"] == 3.0
    assert "greedy/mine_ci" not in result  # of one prompt nobody knows


@pytest.mark.parametrize(
    ("failed", "accuracy", "row", "reason"),
    [
        (("accuracy",), NAN, None, "reward failed"),
        (("accuracy",), 0.0, None, "reward failed"),
        ((), NAN, None, "gold unreadable"),
        ((), 0.0, {"text": "<think>one and one</think><answer>3</answer>"}, "incorrect"),
        ((), 0.0, None, "not in format think_answer"),
        ((), 0.0, {"finish_reason": "length"}, "truncated"),
        ((), NAN, {"prompt": "hello"}, "not in format think_answer"),  # no gold: only the form is judged
    ],
)
def test_why_a_sample_is_dropped(failed: tuple[str, ...], accuracy: float, row: Any, reason: str) -> None:
    stage: Any = SimpleNamespace(filters=FilterOptions(), min_reward=1.0, rewards={"accuracy": 1.0})
    found = row or {}
    made = sample(0, failed, accuracy=accuracy, row=None if "prompt" not in found else row, text="no tags")
    made.text, made.finish_reason = found.get("text", made.text), found.get("finish_reason", "stop")
    made.reward = accuracy
    assert drop_reason(made, stage, "think_answer") == reason


def test_a_verifier_that_fails_on_everything_ends_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Scorer):
        def __init__(self, ctx: Any, *_: Any) -> None:
            self.ctx, self.pools, self.specs = ctx, {}, {"accuracy": RewardSpec()}
            self.failures = ["reward 'accuracy', rows 0-1: MemoryError"]

        def score(self, samples: Any) -> int:
            return len(samples)

    monkeypatch.setattr(reject, "Scorer", Failing)
    samples = [sample(group, ("accuracy",), accuracy=NAN) for group in (0, 1)]
    ctx: Any = SimpleNamespace(stage=SimpleNamespace(name="kept", rewards={}))
    with pytest.raises(NothingScored, match=r"stages\.kept: none of 2 samples could be scored: .* MemoryError"):
        reject.select(ctx, samples, "think_answer")


def learner(prompts_per_step: int) -> Learner:
    made: Any = Learner.__new__(Learner)
    made.stage, made.unscored_prompts = SimpleNamespace(prompts_per_step=prompts_per_step), 0
    made.scorer = Scorer.__new__(Scorer)
    made.scorer.ctx = SimpleNamespace(stage=SimpleNamespace(name="zero"))
    made.scorer.specs, made.scorer.failures = (
        {"accuracy": None, "mine": None},
        ["reward 'mine', rows 0-1: KeyError: 'x'"],
    )
    return made


def test_a_step_without_any_score_ends_the_run() -> None:
    samples = [sample(group, ("mine",), accuracy=NAN, mine=NAN) for group in (0, 1)]
    with pytest.raises(NothingScored) as raised:
        learner(2).check_scored(samples)
    assert str(raised.value) == (
        "stages.zero: none of 2 samples could be scored: reward 'mine', rows 0-1: KeyError: 'x'; reward 'accuracy' "
        "gave None for every sample; correct the reward, or the columns that it reads"
    )


def test_short_steps_without_a_score_count_together() -> None:
    """With partial rollouts one prompt whose gold cannot be read may be a whole step."""
    one = learner(3)
    silent, scored = [sample(0, mine=NAN, accuracy=NAN)], [sample(0, mine=1.0, accuracy=NAN)]
    scored[0].reward = 1.0
    for samples in (silent, silent, scored, silent, silent):
        one.check_scored(samples)
    with pytest.raises(NothingScored):
        one.check_scored(silent)


def test_unscorable_samples_are_a_metric() -> None:
    group = [sample(0, accuracy=1.0), sample(0, ("accuracy",), accuracy=NAN)]
    total_rewards(group, {"accuracy": 1.0})
    metrics = rollout_metrics(group)
    assert metrics["frac_unscorable"] == 0.5 and metrics["rewards/accuracy/mean"] == 1.0


def test_samples_are_compared_with_those_of_their_prompt() -> None:
    """Of two prompts whose samples lie one after the other, as a scorer passes them to the reward `length`."""
    ctx: Any = SimpleNamespace(
        dist=SimpleNamespace(is_main=True, all_gather_objects=lambda value: [value]),
        recipe=SimpleNamespace(reward_workers=RewardWorkers()),
        phase=lambda _: nullcontext(),
    )
    text = "<think>some thought</think><answer>1</answer>"
    samples = [sample(group, text=text, row={"prompt": "p", "answer": "1"}) for group in (0, 1, 0, 1)]
    for found, tokens in zip(samples, (10, 1000, 20, 2000), strict=True):
        found.completion_ids = [1] * tokens
    with Scorer(ctx, {"length": 1.0}, "think_answer") as scorer:
        assert scorer.score(samples) == 0
    assert [found.rewards["length"] for found in samples] == [0.5, 0.5, -0.5, -0.5]


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "p", "answer": "1", "text": "another form"},
        {"messages": [{"role": "user", "content": "p"}], "solution": "1"},
        {"conversations": [{"from": "human", "value": "p"}]},
    ],
    ids=lambda columns: next(iter(columns)),
)
def test_a_kept_sample_is_an_sft_row(columns: dict[str, Any]) -> None:
    """Whatever form its prompt came in: that would be read in place of the sample."""
    kept = sample(0, text="<think>why</think>1", row=canonical(columns, "prompts", "a.jsonl:1"))
    prompt, target = prompt_and_target(canonical(reject.sft_row(kept, "think_answer"), "sft", "data.jsonl:1"))
    assert texts_of(prompt) == ["p"] and target == "<think>why</think>1"
