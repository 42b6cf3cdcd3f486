"""What a recipe may say: types without surprises, names that a run can use, and no option that changes nothing."""

import re
from typing import get_type_hints

import pytest
import yaml
from pydantic import ConfigDict, TypeAdapter

from r1fast.config import load_recipe
from r1fast.explain import options_of, topics
from r1fast.schema import GRPOStage
from tests.tiny_checkpoint import ZERO, message_of

SFT = "{name: tuned, kind: sft, train_files: [a.jsonl]}"
PRETRAIN = "{name: base, kind: pretrain, train_files: [a.jsonl], architecture: {model_type: llama}, max_steps: 9}"
REWARD_MODEL = "{name: rm, kind: reward_model, train_files: [a.jsonl], loss: pointwise}"
REJECT = "{name: kept, kind: reject, train_files: [a.jsonl]}"
DISTILL = "{name: student, kind: distill, teacher: t, train_files: [a.jsonl]}"
EVALUATE = "{name: test, kind: evaluate, eval_files: [a.jsonl]}"


STRICT = [
    ('stages.zero.max_steps="10"', "valid integer; got '10'"),
    ("stages.zero.max_steps=true", "valid integer; got True"),
    ("stages.zero.max_steps=1.0", "valid integer; got 1.0"),
    ("stages.zero.max_steps=1:30", "valid integer; got '1:30'"),
    ("stages.zero.max_steps=0777", "valid integer; got '0777'"),
    ("stages.zero.max_steps=2147483648", "less than 2147483648; got 2147483648"),
    ("stages.zero.beta=true", "valid number; got True"),
    ("stages.zero.beta='0.1'", "valid number; got '0.1'"),
    ("stages.zero.beta=.nan", "finite number; got nan"),
    ("stages.zero.rewards.accuracy=true", "valid number; got True"),
    ("stages.zero.rewards.accuracy=.inf", "finite number; got inf"),
    ("stages.zero.rewards={accuracy: {limit: .inf}}", "got inf, expected a finite number"),
    ("stages.zero.rewards={accuracy: {function: ''}}", "at least 1 character"),
    ("stages.zero.router_replay=yes", "valid boolean; write true or false; got 'yes'"),
    ("stages.zero.epsilon_high=None", "None is written null; got 'None'"),
    ("stages.zero.router_replay=1", "valid boolean; write true or false; got 1"),
    ("stages.zero.model=1", "valid string; got 1"),
    ("stages.zero.model=''", "at least 1 character"),
    ("stages.zero.train_files=[]", "at least 1 item"),
    ("stages.zero.train_files=['']", "at least 1 character"),
    ("seed=18446744073709551616", "more than 64 bits"),
    ("seed=18446744073709551615", "less than 9223372036854775808"),
    ("seed=-1", "greater than or equal to 0"),
    ("stages.zero.seed=-1", "stages.zero.seed: Input should be greater than or equal to 0"),
    ("reward_workers.num_workers=1000000000", "less than or equal to 1024"),
    ("stages..max_steps=1", "expected names with dots between them"),
    ("stages.zero." + "a." * 100 + "b=1", "expected names with dots between them"),
    ("name=a/b", "'a/b' is no name of a folder"),
    ("name=" + "é" * 150, "has 300 bytes"),
    ("report_to=[wandb, wandb]", "names a tracker twice"),
    ("report_to=[none, wandb]", "got 'none'"),
    ("stages.zero.loss_type=ppo", "got 'ppo' or file.py:name or package.module.name for a loss of your own"),
    ("stages.zero.rewards=[accuracy, format]", "expected a mapping, {accuracy: .., format: ..}; got ['accuracy'"),
    ("stages.zero.rewards=accuracy", "expected a mapping, {accuracy: ..}; got 'accuracy'"),
    ("stages.zero.kind=GRPO", "got GRPO (did you mean 'grpo'?); expected one of"),
    ("stages={zero: {kind: grpo}}", "stages: expected a list, each of its entries with a dash before it; got {"),
    ("rollout.async_steps=1 ", None),
]


@pytest.mark.parametrize(("override", "part"), STRICT, ids=[override[:60] for override, _ in STRICT])
def test_types_are_strict(zero: str, override: str, part: str | None) -> None:
    if part is None:
        assert load_recipe(zero, [override]).rollout.async_steps == 1
    else:
        message = message_of(zero, override)
        assert part in message and "\n" not in message and len(message) < 500


def test_exact_numbers_are_taken(zero: str) -> None:
    stage = load_recipe(
        zero, ["stages.zero.beta=0", "stages.zero.learning_rate=1e-6", "stages.zero.rewards.accuracy=2"]
    )
    zero_stage = stage.stage("zero")
    assert (zero_stage.beta, zero_stage.learning_rate, zero_stage.rewards) == (0.0, 1e-6, {"accuracy": 2.0})
    assert type(zero_stage.beta) is float


NAMES = ["config.yaml", "report.html", "summary.json", "latest", "LATEST", "rollout_weights", "a.partial", "x" * 5000]


@pytest.mark.parametrize("name", NAMES, ids=[name[:20] for name in NAMES])
def test_names_that_a_run_needs_itself(write, name: str) -> None:
    message = message_of(write(f"stages: [{ZERO.replace('zero', name, 1)}]"))
    assert re.search("file of its own|expected 1 to 200", message) and len(message) < 1000


def test_names_that_differ_in_case_alone(write) -> None:
    assert "two stages are named 'zero'" in message_of(write(f"stages: [{ZERO}, {ZERO.replace('zero', 'Zero')}]"))


SENSELESS = [
    (ZERO, ["warmup_steps=201"], "warmup_steps = 201 is longer than the stage's 200 optimizer steps"),
    (ZERO, ["max_steps=3", "steps_per_generation=2", "num_iterations=2", "warmup_steps=13"], "the stage's 12 opt"),
    (PRETRAIN, ["warmup_steps=10"], "warmup_steps = 10 is longer than the stage's 9 optimizer steps"),
    (SFT, ["max_steps=3", "warmup_steps=4"], "warmup_steps = 4 is longer"),
    (ZERO, ["decay_ratio=0.5"], "decay_ratio applies to lr_scheduler_type wsd, got constant"),
    (ZERO, ["min_lr_ratio=0.5"], "min_lr_ratio applies to a schedule that decays"),
    (ZERO, ["eval_temperature=0.5"], "eval_temperature applies to eval_files, and there are none"),
    (ZERO, ["eval_limit=5"], "eval_limit applies to eval_files"),
    (ZERO, ["eval_files=[a]", "eval_temperature=0"], "eval_num_samples = 4 with eval_temperature 0 are"),
    (ZERO, ["eval_files=[a]", "eval_rewards={}"], "at least 1 item"),
    (ZERO, ["eval_files=[a]", "eval_rewards={accuracy: {weight: 1.0}}"], "weight does not apply to a reward that is"),
    (ZERO, ["eval_files=[a]", "eval_rewards={accuracy: {domains: 3}}"], "domains"),
    (ZERO, ["max_steps=null"], "neither max_steps (rollouts) nor num_train_epochs (passes over train_files) is given"),
    (ZERO, ["num_train_epochs=0.5"], "max_steps = 200 and num_train_epochs = 0.5 both say how long: drop one"),
    (ZERO, ["max_steps=null", "num_train_epochs=0"], "greater than 0"),
    (ZERO, ["rewards={accuracy: 0.0, format: 0}"], "every reward has weight 0"),
    (ZERO, ["rewards={h: {function: accuracy}}", "reward_models={h: {model: m}}"], "both named 'h'"),
    (ZERO, ["domain_weights={a: 0, b: 0}"], "domain_weights are all 0"),
    (ZERO, ["loss_type=cispo", "epsilon_high=5.0", "epsilon=0.3"], "epsilon = 0.3 does not apply to loss_type cispo"),
    (ZERO, ["delta=1.0"], "delta = 1.0 cuts off the ratio 1"),
    (ZERO, ["beta=0", "ref_model_sync_steps=5"], "without KL there is no reference"),
    (ZERO, ["log_completions=0", "log_completions_steps=5"], "log_completions_steps does not apply"),
    (ZERO, ["temperature=0"], "greater than or equal to 0.001; got 0"),
    (REJECT, ["temperature=0"], "num_samples = 4 with temperature 0 are 4 equal samples"),
    (REJECT, ["max_per_prompt=5"], "max_per_prompt = 5 is more than num_samples = 4"),
    (SFT, ["max_completion_length=9"], "max_completion_length = 9 does not apply: without eval_files"),
    (PRETRAIN, ["max_prompt_length=9"], "max_prompt_length = 9 does not apply: without eval_files"),
    (PRETRAIN, ["tokenizer=t", "vocab_size=300"], "vocab_size = 300 does not apply: tokenizer is given"),
    (PRETRAIN, ["vocab_size=264"], "greater than or equal to 265"),
    (PRETRAIN, ["vocab_size=1000000000000"], "less than or equal to 1048576"),
    (PRETRAIN, ["eval_files=[a]", "eval_before=false"], "eval_before does not apply"),
    (EVALUATE, ["eval_before=false"], "eval_before does not apply"),
    (EVALUATE, ["eval_files=[]"], "at least 1 item"),
    (REWARD_MODEL, ["max_completion_length=9"], "a reward model samples nothing"),
    (REWARD_MODEL, ["prefill_think=true"], "prefill_think does not apply"),
    (REWARD_MODEL, ["center_rewards_coefficient=0.5"], "applies to loss pairwise, got pointwise"),
    (DISTILL, ["max_length=1000"], "max_prompt_length + max_completion_length = 1024 does not fit into max_length"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "changes", "part"), SENSELESS, ids=[f"{s[7:12]}-{c[-1]}" for s, c, _ in SENSELESS])
def test_an_option_that_changes_nothing_is_refused(write, stage: str, changes: list[str], part: str) -> None:
    config = write(f"stages: [{stage}]")
    load_recipe(config, [])
    name = yaml.safe_load(stage)["name"]
    message = message_of(config, *(f"stages.{name}.{change}" for change in changes))
    assert f"stages.{name}" in message and part in message


def test_a_loss_of_ones_own_may_read_a_moving_reference_without_kl(zero: str) -> None:
    changes = ["loss_type=mine.loss", "beta=0", "ref_model=m", "ref_model_sync_steps=5"]
    load_recipe(zero, [f"stages.zero.{change}" for change in changes])


def test_sampling_ahead_needs_a_stage_that_does(write) -> None:
    assert "rollout.async_steps applies to stages of kind grpo" in message_of(
        write(f"rollout: {{async_steps: 1}}\nstages: [{SFT}]")
    )


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (["trainer.offload=[optimizer, optimizer]"], "offload names something twice"),
        (["trainer.offload=[weights]"], "trainer.offload"),
        (["trainer.offload=[reference]", "stages.zero.beta=0"], "no stage has the reference in memory"),
        (["trainer.activation_checkpointing=some"], "Input should be 'none', 'selective' or 'full'"),
    ],
)
def test_what_trainer_refuses(zero: str, changes: list[str], part: str) -> None:
    assert part in message_of(zero, *changes)


def test_older_recipes_say_checkpointing_by_true_and_false(zero: str) -> None:
    for old, new in (("true", "full"), ("false", "none")):
        assert load_recipe(zero, [f"trainer.activation_checkpointing={old}"]).trainer.activation_checkpointing == new


def test_trackers_may_be_none_or_one(zero: str) -> None:
    for value, names in (("none", []), ("null", []), ("[none]", []), ("wandb", ["wandb"])):
        assert load_recipe(zero, [f"report_to={value}"]).report_to == names


@pytest.mark.parametrize("url", ["http://", "http://a:x", "http://a:99999", "http:// a:1/", "http://\u2028"])
def test_a_server_that_no_address_leads_to(zero: str, url: str) -> None:
    message = message_of(zero, "rollout.engine=vllm", f"rollout.vllm.server_base_url='{url}'")
    assert "expected http://host:port" in message


ONE = [
    ("zero.train_files=b.jsonl", "train_files", ["b.jsonl"]),
    ("zero.train_files=@base", "train_files", ["@base"]),
    ("zero.eval_files=task:arithmetic/report", "eval_files", ["task:arithmetic/report"]),
    ("zero.rewards={accuracy: {domains: math}}", "rewards", {"accuracy": ["math"]}),
    ("zero.lora={target_modules: o_proj}", "lora", ["o_proj"]),
    ("zero.lora={target_modules: all-linear}", "lora", "all-linear"),
]


@pytest.mark.parametrize(("override", "key", "value"), ONE, ids=[override for override, _, _ in ONE])
def test_of_a_list_one_thing_alone_will_do(zero: str, override: str, key: str, value: object) -> None:
    stage = load_recipe(zero, [override]).stage("zero").model_dump()
    found = stage[key]
    if key == "rewards":
        found = {name: spec["domains"] for name, spec in found.items()}
    assert (found["target_modules"] if key == "lora" else found) == value


def test_every_list_of_the_schema_takes_one_thing() -> None:
    """But for stages themselves, which are no text."""
    lists = [(topic, o.name) for topic in topics() for o in options_of(topic) if o.type.startswith("list of")]
    assert len(lists) > 20
    for topic, name in lists:
        model, *path = topics()[topic], *name.split(".")
        if len(path) == 1 and path[0] != "stages":
            adapter = TypeAdapter(get_type_hints(model, include_extras=True)[name], config=ConfigDict(strict=True))
            word = {"offload": "optimizer", "report_to": "wandb"}.get(name, "one")
            assert adapter.validate_python(word) == [word], (topic, name)


@pytest.mark.parametrize(
    ("epochs", "num_prompts", "steps"), [(1, 40, 10), (2, 40, 20), (0.5, 40, 5), (1, 41, 11), (0.1, 120, 3), (3, 1, 1)]
)
def test_grpo_in_epochs_is_so_many_steps(zero: str, epochs: float, num_prompts: int, steps: int) -> None:
    changes = ["max_steps=null", f"num_train_epochs={epochs}", "prompts_per_step=4", "steps_per_generation=2"]
    stage = load_recipe(zero, [f"zero.{change}" for change in changes]).stage("zero")
    assert isinstance(stage, GRPOStage)
    assert stage.steps_on(num_prompts) == steps and stage.num_updates() is None
    # A pass is over prompts: how often each is answered is no part of it.
    assert stage.model_copy(update={"num_generations": 64}).steps_on(num_prompts) == steps
    assert load_recipe(zero, []).stage("zero").num_updates() == 200
