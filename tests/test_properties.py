"""What holds for every input: packing, layout, recipes, blocks, advantages, truncation. Cases drawn by hypothesis, the
same ones each time; more of them: HYPOTHESIS_PROFILE=long."""

import os
import random
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from r1fast.config import RECIPES, ConfigError, dump_recipe, load_recipe, validate
from r1fast.data.packing import balance, pack
from r1fast.rollout.blocks import BlockPool
from r1fast.stages.grpo import Learner
from r1fast.stages.packed import Example, collate, num_repeated
from r1fast.stages.sampler import Sample
from r1fast.stages.scoring import punish_overlong
from r1fast.stages.training import share
from r1fast_kernels import dispatch, group_advantages

settings.register_profile("short", derandomize=True, deadline=None, max_examples=40, database=None)
settings.register_profile("long", deadline=None, max_examples=5000, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 60), max_size=40)


@given(LENGTHS, st.integers(60, 200))
def test_pack(lengths: list[int], limit: int) -> None:
    """Nothing is lost, no pack is over the limit, all is in order, and no two packs would fit into one."""
    packs = pack(lengths, limit)
    assert sorted(i for members in packs for i in members) == list(range(len(lengths)))
    assert packs == sorted(sorted(members) for members in packs)
    loads = sorted(sum(lengths[i] for i in members) for members in packs)
    assert all(0 < load <= limit for load in loads)
    assert len(loads) < 2 or loads[0] + loads[1] > limit


@given(LENGTHS, st.integers(1, 7))
def test_balance(lengths: list[int], num_parts: int) -> None:
    """Nothing is lost, and the heaviest part leads the lightest by one sequence at most."""
    parts = balance(lengths, num_parts)
    assert len(parts) == num_parts and all(part == sorted(part) for part in parts)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= max(lengths, default=0)


TOKENS = st.integers(0, 99)


@st.composite
def some_examples(draw: st.DrawFn) -> list[Example]:
    found = []
    for _ in range(draw(st.integers(1, 6))):
        prompt, completion = (draw(st.lists(TOKENS, min_size=1, max_size=8)) for _ in range(2))
        if found and draw(st.booleans()):
            prompt = draw(st.sampled_from(found)).prompt_ids
        values = {"per_token": [float(token) for token in completion], "per_sequence": float(len(completion))}
        found.append(Example(prompt, completion, values, learned=draw(st.booleans())))
    return found


@given(some_examples())
def test_collate(examples: list[Example]) -> None:
    """Each learned token's input is the one before it in its own sequence, and no other's; what is not learned is read
    alone. Prompts that are given once have those of others left out."""
    batch = collate(examples, CPU)
    inputs, ends = batch.input_ids_T, batch.cu_seqlens.tolist()
    assert len(inputs) == sum(example.num_inputs for example in examples) - num_repeated(examples)
    places = torch.arange(len(inputs)) if batch.shared_S is None else batch.shared_S
    rows = [inputs[places[first:end]].tolist() for first, end in pairwise(ends)]
    assert rows == [(example.prompt_ids + example.completion_ids)[:-1] for example in examples]
    learned = [(place, example) for place, example in enumerate(examples) if example.learned]
    loss_ends = batch.loss_cu_seqlens.tolist()
    assert len(loss_ends) == len(learned) + 1 and loss_ends[-1] == len(batch.target_ids_M) == len(batch.loss_index_M)
    for n, (place, example) in enumerate(learned):
        tokens = slice(loss_ends[n], loss_ends[n + 1])
        assert batch.target_ids_M[tokens].tolist() == example.completion_ids
        index = places[ends[place] + len(example.prompt_ids) - 1 : ends[place + 1]]
        assert torch.equal(batch.loss_index_M[tokens], index) and int((places[:, None] == index).sum()) == len(index)
        assert batch.values["per_token"][tokens].tolist() == example.values["per_token"]
        assert float(batch.values["per_sequence"][n]) == example.values["per_sequence"]


@given(some_examples(), st.integers(1, 3), st.integers(15, 60))
def test_micro_batches_share_out_the_examples(examples: list[Example], num_ranks: int, most: int) -> None:
    """Each goes to one rank, in micro-batches that are not too long; a prompt's come together where there is room."""
    shares = []
    for rank in range(num_ranks):
        stage, dist = SimpleNamespace(max_tokens_per_microbatch=most), SimpleNamespace(world_size=num_ranks, rank=rank)
        shares.append(share([[example] for example in examples], SimpleNamespace(stage=stage, dist=dist)))
    batches = [batch for mine in shares for batch in mine]
    assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
    assert all(sum(examples[i].num_inputs for i in batch) <= most for batch in batches)
    if num_ranks == 1 and num_repeated(examples) and sum(example.num_inputs for example in examples) <= most:
        assert len(batches) == 1


EDITS = {
    "learning_rate": st.floats(1e-8, 1.0),
    "num_generations": st.sampled_from([2, 4, 8, 16]),
    "max_steps": st.integers(1, 10**6),
    "temperature": st.floats(0.01, 10.0),
    "beta": st.floats(0.0, 1.0),
    "loss_type": st.sampled_from(["grpo", "bnpo", "dr_grpo", "dapo"]),
    "scale_rewards": st.sampled_from(["group", "batch", "none"]),
    "mask_truncated_completions": st.booleans(),
    "delta": st.none() | st.floats(1.5, 10.0),
    "seed": st.none() | st.integers(0, 2**31 - 1),
    "train_files": st.lists(st.text("abc/.@ :#'\"é", min_size=1, max_size=12), min_size=1, max_size=3),
}
GRPO: dict[str, Any] = {"name": "zero", "kind": "grpo", "train_files": ["train.jsonl"], "max_steps": 200}


def recipe(stage: dict[str, Any]) -> dict[str, Any]:
    return {"name": "mine", "model": {"path": "somewhere"}, "stages": [stage]}


@given(st.fixed_dictionaries({}, optional=EDITS))
def test_a_dumped_recipe_is_read_as_it_was(tmp_path_factory: pytest.TempPathFactory, edits: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    ours = validate(recipe({**GRPO, **edits}), "mine")
    path.write_text(dump_recipe(ours), encoding="utf-8")
    again = load_recipe(str(path), [])
    assert again == ours and dump_recipe(again) == dump_recipe(ours)


@given(st.fixed_dictionaries({}, optional=EDITS))
def test_an_override_is_an_edit(tmp_path_factory: pytest.TempPathFactory, edits: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "edited.yaml"
    path.write_text(yaml.safe_dump(recipe(GRPO)), encoding="utf-8")
    flow = {name: yaml.safe_dump(value, default_flow_style=True, width=10**6) for name, value in edits.items()}
    overridden = load_recipe(str(path), [f"stages.zero.{name}={value}" for name, value in flow.items()])
    assert overridden == validate(recipe({**GRPO, **edits}), "mine")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_survive_a_dump(path: Any, tmp_path: Any) -> None:
    ours = load_recipe(path.stem, [])
    (tmp_path / "dumped.yaml").write_text(dump_recipe(ours), encoding="utf-8")
    assert load_recipe(str(tmp_path / "dumped.yaml"), []) == ours


@given(st.sampled_from(sorted(EDITS)), st.text(min_size=1, max_size=6))
def test_an_unknown_key_is_an_error_that_names_it(name: str, more: str) -> None:
    with pytest.raises(ConfigError) as raised:
        validate(recipe({**GRPO, f"{name}_{more}": 1}), "mine")
    shown = " ".join(f"{name}_{more}".split())  # an error is one line, white space is folded
    assert f"stages.zero.{shown}: unknown key" in " ".join(str(raised.value).split())


class Blocks(RuleBasedStateMachine):
    """The pool against a count of holders."""

    @initialize(num_blocks=st.integers(0, 12))
    def start(self, num_blocks: int) -> None:
        self.num_blocks, self.pool = num_blocks, BlockPool(num_blocks)
        self.held: list[list[int]] = []  # by each sequence

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        taken = self.pool.allocate(data.draw(st.integers(0, self.pool.num_free)))
        others = {block for blocks in self.held for block in blocks}
        assert len(set(taken)) == len(taken) and not others & set(taken)
        assert all(0 <= block < self.num_blocks for block in taken)
        self.held.append(taken)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.held))
        self.pool.add_reference(blocks)
        self.held.append(list(blocks))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        assert self.pool.num_free == self.num_blocks - len({block for blocks in self.held for block in blocks})

    def teardown(self) -> None:
        for blocks in self.held:
            self.pool.free(blocks)
        assert sorted(self.pool.allocate(self.pool.num_free)) == list(range(self.num_blocks))


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=30, stateful_step_count=20)

# Multiples of 1/8: exact in fp32, so that equal rewards stay equal under the maps below.
REWARDS = st.lists(
    st.tuples(st.none() | st.integers(-40, 40).map(lambda n: n / 8), st.integers(0, 4)), min_size=1, max_size=24
)
IMPLS = ["reference", pytest.param("cpp", marks=pytest.mark.skipif(not dispatch.HAS_EXTENSION, reason="not built"))]


def advantages(rewards: list[tuple[float | None, int]], scale: str, impl: str) -> torch.Tensor:
    values_N = torch.tensor([float("nan") if value is None else value for value, _ in rewards])
    return group_advantages(values_N, torch.tensor([group for _, group in rewards]), scale=scale, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@given(rewards=REWARDS, seed=st.integers(0, 99), shift=st.integers(-9, 9), power=st.integers(-3, 3))
def test_advantages(
    scale: str, impl: str, rewards: list[tuple[float | None, int]], seed: int, shift: int, power: int
) -> None:
    """Order and names of groups do not matter, a shift of all rewards neither; a factor scales them, or cancels out."""
    want = advantages(rewards, scale, impl)
    order = list(range(len(rewards)))
    random.Random(seed).shuffle(order)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(advantages([rewards[i] for i in order], scale, impl), want[order], **close)
    renamed = [(value, 1000 - 7 * group) for value, group in rewards]
    torch.testing.assert_close(advantages(renamed, scale, impl), want, **close)
    shifted = [(None if value is None else value + shift, group) for value, group in rewards]
    torch.testing.assert_close(advantages(shifted, scale, impl), want, **close)
    factor = 2.0**power
    scaled = [(None if value is None else value * factor, group) for value, group in rewards]
    # 1e-4 beside a standard deviation of 1/64 at least
    times, tolerance = (factor, close) if scale == "none" else (1.0, {"rtol": 0.1, "atol": 1e-5})
    torch.testing.assert_close(advantages(scaled, scale, impl), want * times, **tolerance)
    for group in {group for _, group in rewards}:
        mine = [i for i, (value, of) in enumerate(rewards) if of == group and value is not None]
        assert abs(float(want[mine].double().sum())) < 1e-4
        if len({rewards[i][0] for i in mine}) < 2:
            assert not want[mine].any()
    assert not any(want[i] for i, (value, _) in enumerate(rewards) if value is None)


LENGTH = 12


@given(
    st.lists(st.tuples(st.integers(1, LENGTH), st.booleans()), min_size=1, max_size=8),
    st.booleans(),
    st.integers(1, LENGTH),
)
def test_truncation(shapes: list[tuple[int, bool]], mask: bool, buffer: int) -> None:
    """A masked completion has no loss and keeps its reward; the punishment starts before the end, and grows to 1."""
    samples = [
        Sample({}, 0, [1], [2] * length, [0.0] * length, "stop" if stops else "length", "", False, rewards={"r": 1.0})
        for length, stops in shapes
    ]
    stage = SimpleNamespace(mask_truncated_completions=mask, steps_per_generation=1, num_iterations=1)
    bare: Any = SimpleNamespace(stage=stage, reference=None, ctx=SimpleNamespace(phase=nullcontext))
    examples = Learner.logprobs(bare, samples)
    for (length, stops), example in zip(shapes, examples, strict=True):
        assert example.completion_ids == [2] * length and example.learned == (stops or not mask)
    punish_overlong(samples, LENGTH, buffer)
    for (length, _), sample in zip(shapes, samples, strict=True):
        penalty = sample.rewards["overlong"]
        assert -1 <= penalty <= 0 and penalty == pytest.approx(-max(0, length - (LENGTH - buffer)) / buffer)
