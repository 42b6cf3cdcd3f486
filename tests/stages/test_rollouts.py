"""Which samples a step gets: whole groups, sampled in parts or at once; others in place of groups of equal reward."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from r1fast.parallel.mesh import Dist
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.sampling import SamplingParams
from r1fast.schema import GRPOStage
from r1fast.stages import rollouts as module
from r1fast.stages.grpo import Learner, by_group, has_spread
from r1fast.stages.packed import Prompt
from r1fast.stages.rollouts import Rollouts
from r1fast.stages.sampler import Sample, SamplingCall
from r1fast.stages.scoring import punish_overlong
from tests.stages.gradient_cases import GRPO, context
from tests.tiny_checkpoint import DEEPSEEK_V3, write_checkpoint

LONGEST, G = 12, 3


@dataclass
class Script:
    """What the sampler of these tests says: tokens are (sequence, place), and lengths are set beforehand."""

    seed: int
    parts: bool
    calls: list[SamplingCall] = field(default_factory=list)

    def whole(self, sequence: int) -> list[Any]:
        return [(sequence, place) for place in range(random.Random(f"{self.seed},{sequence}").randint(1, 2 * LONGEST))]

    def sample(self, call: SamplingCall) -> list[Sample]:
        self.calls.append(call)
        found = []
        for i, (prompt, number) in enumerate(zip(call.prompts, call.sequence_ids, strict=True)):
            for place in range(call.params.n):
                rest = self.whole(number if self.parts else number * G + place)[len(prompt.ids) - 1 :]
                cut, most = rest[: call.params.max_tokens], call.params.max_tokens
                reason = "stop" if len(rest) <= most else "length"
                logprobs = [-float(at) for _, at in cut]
                found.append(Sample(call.rows[i], i, prompt.ids, cut, logprobs, reason, "", prompt.prefilled))
        return found


class ScriptedSampler:
    script: Script

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def encode(self, rows: list[dict]) -> list[Prompt]:
        return [Prompt([0], False) for _ in rows]

    def start(self, call: SamplingCall) -> Callable[[], list[Sample]]:
        return lambda: self.script.sample(call)

    def text_of(self, completion_ids: list[int]) -> str:
        return str(len(completion_ids))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Rollouts, Script]]:
    def build(seed: int, **options: Any) -> tuple[Rollouts, Script]:
        script = Script(seed, parts="partial_rollout_length" in options)
        monkeypatch.setattr(ScriptedSampler, "script", script, raising=False)
        monkeypatch.setattr(module, "Sampler", ScriptedSampler)
        rows = [{"prompt": str(i), "domain": "ab"[i % 2]} for i in range(7)]
        stage = {"name": "zero", "kind": "grpo", "train_files": ["-"], "num_generations": G, "prompts_per_step": 4}
        stage |= {"max_steps": 9}
        stage |= {"max_completion_length": LONGEST, **options}
        recipe = SimpleNamespace(rollout=SimpleNamespace(async_steps=0))
        ctx: Any = SimpleNamespace(stage=GRPOStage.model_validate(stage), seed=seed, recipe=recipe)
        return Rollouts(ctx, None, None, rows), script  # type: ignore[arg-type]

    return build


def test_a_step_has_the_next_prompts_in_whole_groups(scripted) -> None:
    rollouts, script = scripted(0, domain_weights={"a": 3, "b": 1})
    steps = [rollouts.next_groups() for _ in range(5)]
    assert [[group[0].group for group in groups] for groups in steps] == [[*range(4 * i, 4 * i + 4)] for i in range(5)]
    assert [[group[0].row["domain"] for group in groups] for groups in steps] == [["a", "a", "a", "b"]] * 5
    assert len(script.calls) == 5 and rollouts.groups == []
    for sample in (sample for groups in steps for group in groups for sample in group):
        assert 1 <= len(sample.completion_ids) <= LONGEST


@pytest.mark.parametrize("part", [1, 3, 4, 6])
def test_partial_rollouts_lose_and_mix_nothing(scripted, part: int) -> None:
    """Each group is handed on once, in the step that ends its last completion, and every token is where it belongs."""
    for seed in range(40):
        check_partial_rollouts(scripted, seed, part)


def check_partial_rollouts(scripted, seed: int, part: int) -> None:
    rollouts, script = scripted(seed, partial_rollout_length=part, domain_weights={"a": 1, "b": 1})
    handed_on: list[int] = []
    for _ in range(30):
        waiting = {group[0].group for group in rollouts.groups}
        calls_before = len(script.calls)
        groups = rollouts.next_groups()
        assert groups and not {id(group) for group in groups} & {id(group) for group in rollouts.groups}
        # Only to have one group at all is a step given more than one part, and then everything waits together.
        assert len(script.calls) - calls_before <= LONGEST // part
        numbers = [group[0].group for group in groups]
        assert len(groups) + len(rollouts.groups) == 4 and waiting <= {*numbers, *(g[0].group for g in rollouts.groups)}
        assert rollouts.num_carried() == len(rollouts.groups)
        under_way = [group[0].row["domain"] for group in (*groups, *rollouts.groups)]
        assert sorted(under_way) == ["a", "a", "b", "b"]
        for group in groups:
            assert len(group) == G
            for place, sample in enumerate(group):
                whole = script.whole(sample.group * G + place)
                assert sample.completion_ids == whole[:LONGEST]
                assert sample.sampler_logprobs == [-float(at) for _, at in sample.completion_ids]
                assert sample.finish_reason == ("stop" if len(whole) <= LONGEST else "length")
                assert sample.text == ("" if len(sample.completion_ids) <= part else str(len(sample.completion_ids)))
        handed_on += numbers
    assert len(set(handed_on)) == len(handed_on)
    assert {*range(max(handed_on))} - {*handed_on} <= {group[0].group for group in rollouts.groups}


def test_rollouts_go_on_from_a_saved_state(scripted) -> None:
    def steps(rollouts: Rollouts, count: int) -> list[Any]:
        return [[(s.group, s.completion_ids) for group in rollouts.next_groups() for s in group] for _ in range(count)]

    whole, _ = scripted(5, partial_rollout_length=4)
    expected = steps(whole, 9)
    carried = 0
    for done in range(1, 9):
        first, _ = scripted(5, partial_rollout_length=4)
        assert steps(first, done) == expected[:done]
        state = first.state()
        second, _ = scripted(5, partial_rollout_length=4)
        second.load_state(state)
        carried += len(second.groups)
        assert steps(second, 9 - done) == expected[done:]
    assert carried > 0


@pytest.mark.parametrize("part", [None, 4], ids=["whole", "partial"])
def test_a_sampler_that_fails_loses_no_prompt(scripted, monkeypatch: pytest.MonkeyPatch, part: int | None) -> None:
    options = {"partial_rollout_length": part} if part else {}
    rollouts, _ = scripted(2, **options)
    expected = [rollouts.next_groups() for _ in range(4)]
    rollouts, script = scripted(2, **options)
    assert rollouts.next_groups() == expected[0]
    with monkeypatch.context() as patch:
        patch.setattr(script, "sample", lambda call: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rollouts.next_groups()
    again, _ = scripted(2, **options)
    again.load_state(rollouts.state())
    assert [again.next_groups() for _ in range(3)] == expected[1:]


def refilling_learner(rollouts: Rollouts, chance: float) -> Any:
    """A Learner with what `refill` needs; chance: that a group has equal rewards."""
    learner: Any = Learner.__new__(Learner)
    learner.stage, learner.rollouts = rollouts.stage, rollouts
    learner._sample_ahead = lambda step: None
    learner.rewarded = []

    def reward(samples: list[Sample]) -> int:
        for sample in samples:
            learner.rewarded.append(sample)
            equal = random.Random(f"equal {sample.group}").random() < chance
            sample.reward = 1.0 if equal else float(len(learner.rewarded))
        return 1

    learner.reward = reward
    return learner


@pytest.mark.parametrize("part", [None, 4], ids=["whole", "partial"])
@pytest.mark.parametrize("refills", [1, 2, 5])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.9, 1.0])
def test_refills_are_bounded_and_keep_the_size_of_a_step(
    scripted, part: int | None, refills: int, chance: float
) -> None:
    rollouts, script = scripted(
        1, dynamic_sampling_refills=refills, **({"partial_rollout_length": part} if part else {})
    )

    for step in range(8):
        learner = refilling_learner(rollouts, chance)
        samples = [sample for group in rollouts.next_groups() for sample in group]
        metrics = {"rewards/failures": learner.reward(samples)}
        calls_before = len(script.calls)
        kept = learner.refill(step, samples, metrics)
        before, after = by_group(samples), by_group(kept)
        assert len(after) == len(before) and all(len(group) == G for group in after)
        rounds, discarded = metrics["dynamic_sampling/refills"], metrics["dynamic_sampling/discarded_groups"]
        assert rounds == len(script.calls) - calls_before <= refills and discarded <= rounds * len(before)
        assert {id(sample) for sample in kept} <= {id(sample) for sample in learner.rewarded}
        assert len(learner.rewarded) == (len(before) + discarded) * G  # each sample once
        good = [group[0].group for group in before if has_spread(group)]
        assert [group[0].group for group in after if group[0].group in good] == good  # and where they were
        if rounds < refills:
            assert all(has_spread(group) for group in after)
        if chance == 0.0:
            assert rounds == 0 and kept == samples
        if chance == 1.0 and part is None:
            assert rounds == refills and discarded == refills * 4
            assert metrics["rewards/failures"] == 1 + refills


def test_an_unscorable_group_has_no_spread() -> None:
    def group(*rewards: float) -> list[Sample]:
        samples = [Sample({}, 0, [0], [1], [0.0], "stop", "", False) for _ in rewards]
        for sample, reward in zip(samples, rewards):
            sample.reward = reward
        return samples

    nan = float("nan")
    assert not has_spread(group(nan, nan)) and not has_spread(group(0.1, 0.1, nan)) and has_spread(group(nan, 0.0, 1.0))


# The paper's own numbers: 16,384 tokens as expected, 4,096 more to be punished in.
@pytest.mark.parametrize(
    ("length", "expected"), [(1, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0)]
)
def test_soft_overlong_punishment(length: int, expected: float) -> None:
    sample = Sample({}, 0, [0], [0] * length, [0.0] * length, "stop", "", False, rewards={"accuracy": 1.0})
    punish_overlong([sample], 20480, 4096)
    assert sample.rewards == {"accuracy": 1.0, "overlong": expected}


def test_overlong_punishment_scores_nothing_that_has_no_score() -> None:
    nan = float("nan")
    samples = [
        Sample({}, 0, [0], [0] * 8, [0.0] * 8, "length", "", False, rewards={"a": a, "b": nan}) for a in (nan, 0)
    ]
    punish_overlong(samples, 8, 8)
    assert str(samples[0].rewards["overlong"]) == "nan" and samples[1].rewards["overlong"] == -1.0


@pytest.fixture(scope="module")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("moe"), **DEEPSEEK_V3))


def groups_of(dist: Dist, model: str, part: int, count: int) -> dict[int, list[Sample]]:
    ctx = context({**GRPO, "num_generations": 4, "partial_rollout_length": part}, dist, model)
    policy, tokenizer = ctx.load(model, trainable=True)
    rollouts = Rollouts(ctx, policy, tokenizer, [{"prompt": "red " * i} for i in range(1, 8)])
    found: dict[int, list[Sample]] = {}
    while not {*range(count)} <= found.keys():
        found |= {group[0].group: group for group in rollouts.next_groups()}
    return {number: found[number] for number in range(count)}


def test_with_the_same_weights_parts_make_the_whole(dist: Dist, moe_model: str) -> None:
    """Tokens, log-probs, experts and texts of completions that were carried are those of ones that were not."""
    halves, quarters = (groups_of(dist, moe_model, part, 6) for part in (6, 3))
    ctx = context(GRPO, dist, moe_model)
    model, tokenizer = ctx.load(moe_model, trainable=False)
    model.unshard()
    engine = RolloutEngine(model, tokenizer, enable_return_routed_experts=True)
    params = SamplingParams(n=1, max_tokens=12, seed=ctx.seed)
    carried = 0
    for number, group in halves.items():
        for place, (sample, other) in enumerate(zip(group, quarters[number], strict=True)):
            [[whole]] = engine.generate([sample.prompt_ids], params, sequence_ids=[number * 4 + place])
            for got in (sample, other):
                assert got.completion_ids == whole.token_ids and got.finish_reason == whole.finish_reason
                assert got.text == whole.text
                assert got.sampler_logprobs == pytest.approx(whole.logprobs, abs=1e-4)
                assert got.routed_experts is not None and (got.routed_experts == whole.routed_experts).all()
            carried += len(whole.token_ids) > 6
    assert carried > 6 and torch.is_grad_enabled()
