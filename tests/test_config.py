"""Recipes: precedence, inheritance, overrides; every error names the key, the value and the nearest valid one."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1fast.config import RECIPES, ConfigError, dump_recipe, error_lines, load_recipe, validate
from r1fast.schema import Recipe
from tests.tiny_checkpoint import ZERO, message_of

ALL_KINDS = """
name: everything
seed: 3
model: {path: "@base", dtype: float32}
report_to: [tensorboard]
stages:
  - {name: base, kind: pretrain, train_files: [t.jsonl], architecture: {model_type: llama}, max_steps: 2}
  - name: zero
    kind: grpo
    max_steps: 3
    train_files: [a.jsonl]
    rewards: {accuracy: 1, format: {weight: 0.5, domains: [math]}, mine: {function: a.b.c, weight: 2, threshold: 0.25}}
    domain_weights: {math: 2, chat: 1}
    learning_rate: 1e-6
  - name: cold
    kind: collect
    model: "@zero"
    train_files: [a.jsonl]
    few_shot: {examples_files: [e.jsonl]}
    filters: {allow_code: true}
  - {name: kept, kind: reject, model: "@zero", train_files: [a.jsonl]}
  - {name: tuned, kind: sft, train_files: ["@cold", "@kept"]}
  - {name: rm, kind: reward_model, model: "@tuned", train_files: [p.jsonl], loss: pairwise}
  - name: r1
    kind: grpo
    max_steps: 3
    model: "@tuned"
    train_files: [a.jsonl]
    rewards: {}
    reward_models: {helpful: {model: "@rm", domains: [chat], score_on: summary}}
  - {name: student, kind: distill, teacher: "@r1", train_files: [a.jsonl]}
  - {name: test, kind: evaluate, model: "@student", eval_files: [b.jsonl], eval_rewards: {accuracy: {strict: false}}}
"""


def test_later_sources_win(write) -> None:
    write("seed: 1\nmodel: {path: a, dtype: float32}\nrollout: {max_num_seqs: 1}\nstages: []", "grandparent.yaml")
    write(f"defaults: grandparent.yaml\nseed: 2\nmodel: {{path: b}}\nstages: [{ZERO}]", "parent.yaml")
    child = write("defaults: parent.yaml\nmodel: {path: c}")
    recipe = load_recipe(child, [])
    assert (recipe.seed, recipe.model.path, recipe.model.dtype, recipe.rollout.max_num_seqs) == (2, "c", "float32", 1)
    assert recipe.reward_workers.timeout_s == 30.0  # from the schema: nobody set it
    recipe = load_recipe(child, ["seed=3", "model.path=d", "seed=4"])
    assert (recipe.seed, recipe.model.path, recipe.model.dtype) == (4, "d", "float32")


def test_of_several_defaults_the_last_wins(write) -> None:
    write(f"seed: 1\nmodel: {{path: one}}\nstages: [{ZERO}]", "one.yaml")
    write("seed: 2\nmodel: {dtype: float32}", "two.yaml")
    recipe = load_recipe(write("defaults: [one.yaml, two.yaml]"), [])
    assert (recipe.seed, recipe.model.path, recipe.model.dtype) == (2, "one", "float32")


def test_stages_merge_by_name_in_the_order_of_the_parent(write) -> None:
    write(
        "model: {path: m}\nstages:\n"
        "- {name: zero, kind: grpo, train_files: [a], rewards: {accuracy: 1.0}, max_steps: 3}\n"
        "- {name: dev1, kind: sft, train_files: [b]}",
        "parent.yaml",
    )
    child = write(
        "defaults: parent.yaml\nstages:\n"
        "- {name: last, kind: evaluate, eval_files: [c]}\n"
        "- {name: dev1, batch_size: 7}\n"
        "- {name: zero, max_steps: 5, rewards: {format: 0.5}, train_files: [z]}"
    )
    recipe = load_recipe(child, [])
    assert [stage.name for stage in recipe.stages] == ["zero", "dev1", "last"]
    zero, dev1 = recipe.stage("zero"), recipe.stage("dev1")
    assert (zero.max_steps, zero.rewards, zero.train_files) == (5, {"accuracy": 1.0, "format": 0.5}, ["z"])
    assert (dev1.batch_size, dev1.train_files, dev1.kind) == (7, ["b"], "sft")


def test_defaults_name_a_recipe_or_a_file_beside(write) -> None:
    write(f"seed: 11\nmodel: {{path: m}}\nstages: [{ZERO}]", "tiny.yaml")
    assert load_recipe(write("defaults: tiny.yaml"), []).seed == 11
    recipe = load_recipe(write("defaults: tiny\nseed: 12", "elsewhere/child.yaml"), [])
    assert recipe.seed == 12 and recipe.stages[0].kind == "pretrain"


def test_anchors_have_a_place_of_their_own(write) -> None:
    stage = ZERO[1:].replace(", max_steps: 200", "")
    text = f"x-common: &common {{max_steps: 9, beta: 0}}\nmodel: {{path: m}}\nstages: [{{<<: *common, {stage}]"
    stage = load_recipe(write(text), []).stages[0]
    assert (stage.max_steps, stage.beta) == (9, 0.0)


def test_name_is_that_of_the_file(write) -> None:
    assert load_recipe(write(f"model: {{path: m}}\nstages: [{ZERO}]", "my-run.yaml"), []).name == "my-run"
    assert load_recipe("tiny", []).name == "tiny"


OVERRIDES = [
    ("stages.zero.max_steps=7", "max_steps", 7),
    ("--stages.zero.max_steps=7", "max_steps", 7),
    ("stages.zero.learning_rate=1e-5", "learning_rate", 1e-5),  # YAML reads a string there
    ("stages.zero.model=@base", "model", "@base"),  # YAML reserves the sign
    ("stages.zero.model=a=b", "model", "a=b"),
    ("stages.zero.train_files=[x.jsonl, '@cold']", "train_files", ["x.jsonl", "@cold"]),
    ("stages.zero.epsilon_high=null", "epsilon_high", None),
    ("stages.zero.rewards.accuracy=0.25", "rewards", {"accuracy": 0.25}),
    ("stages.zero.domain_weights.math=2", "domain_weights", {"math": 2.0}),
]


@pytest.mark.parametrize(("override", "key", "value"), OVERRIDES, ids=[override for override, _, _ in OVERRIDES])
def test_override_sets_a_key_of_a_stage(zero: str, override: str, key: str, value: object) -> None:
    assert getattr(load_recipe(zero, [override]).stage("zero"), key) == value


def test_override_reaches_a_stage_whose_name_has_dots(write) -> None:
    config = write(f"model: {{path: m}}\nstages: [{ZERO.replace('zero', 'qwen2.5-1.5b')}]")
    assert load_recipe(config, ["stages.qwen2.5-1.5b.max_steps=7"]).stages[0].max_steps == 7


def test_override_changes_no_shared_anchor(write) -> None:
    stages = "- {name: a, kind: grpo, max_steps: 2, <<: *s}\n- {name: b, kind: grpo, max_steps: 2, <<: *s}"
    config = write(f"x-s: &s {{train_files: [f], rewards: {{accuracy: 1.0}}}}\nmodel: {{path: m}}\nstages:\n{stages}")
    recipe = load_recipe(config, ["stages.a.rewards.accuracy=3"])
    assert recipe.stage("a").rewards == {"accuracy": 3.0}
    assert recipe.stage("b").rewards == {"accuracy": 1.0}


def test_dump_load_round_trip(write) -> None:
    recipe = load_recipe(write(ALL_KINDS), [])
    dumped = dump_recipe(recipe)
    again = load_recipe(write(dumped, "again.yaml"), [])
    assert again == recipe and dump_recipe(again) == dumped
    reward = again.stage("zero").rewards["mine"]
    assert reward.model_extra == {"threshold": 0.25} and again.stage("zero").learning_rate == 1e-6


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_shipped_recipes_load_and_round_trip(write, name: str) -> None:
    recipe = load_recipe(name, [])
    assert load_recipe(write(dump_recipe(recipe)), []) == recipe


WRONG_OVERRIDES = [
    ("sead=3", ["sead", "unknown key", "'seed'"]),
    ("stages.zero.max_stepz=3", ["stages.zero.max_stepz", "unknown key", "'max_steps'"]),
    ("rollout.max_num=3", ["rollout.max_num", "unknown key", "'max_num_seqs'"]),
    ("stages.zero.reward_models.h.modle=x", ["stages.zero.reward_models.h.modle", "unknown key", "'model'"]),
    ("model.xyz=3", ["model.xyz", "unknown key", "known: path, revision, dtype"]),  # nothing is near
    ("stages.zero.max_steps=many", ["stages.zero.max_steps", "integer", "'many'"]),
    ("stages.zero.max_steps=0", ["stages.zero.max_steps", "greater than 0", "got 0"]),
    ("stages.zero.temperature=.inf", ["stages.zero.temperature", "finite", "got inf"]),
    ("stages.zero.optimizer=adam", ["stages.zero.optimizer", "'adamw' or 'muon'", "'adam'"]),
    ("stages.zero.train_files=3", ["stages.zero.train_files", "list", "got 3"]),
    ("stages.zero.rewards.accuracy=high", ["stages.zero.rewards.accuracy", "number", "'high'"]),
    ("stages.zero.eval_rewards.accuracy=1", ["stages.zero.eval_rewards.accuracy", "expected a mapping", "got 1"]),
    ("stages.zero.kind=grop", ["stages.zero.kind", "grop", "'grpo'", "reward_model"]),
    ("stages.zero.kind=", ["stages.zero.kind", "None", "expected one of", "grpo"]),
    ("stages.zero.name=..", ["stages...", "'..'"]),  # would be a folder outside the run directory
    ("stages.zero.name=a/b", ["stages.a/b", "'a/b'"]),
    ("rollout=3", ["rollout", "expected options (rollout.engine, ", "got 3"]),
    ("stages=3", ["stages", "list", "got 3"]),
    ("stages.zer.max_steps=3", ["stages.zer.max_steps", "no stage 'zer'", "'zero'"]),
    ("stages.zero=3", ["stages.zero", "stages.zero.max_steps=10"]),
    ("model.path.x=3", ["model.path.x", "model.path is 'm'"]),
    ("=3", ["'=3'", "key.sub=value"]),
    ("seed", ["'seed'", "key.sub=value"]),
    ("stages.zero.train_files=[a", ["stages.zero.train_files=[a", "not valid YAML"]),
    ("stages.zero.rewards={}", ["stages.zero", "rewards and reward_models are both empty"]),
    ("stages.zero.steps_per_generation=3", ["stages.zero", "= 128", "steps_per_generation = 3"]),
    ("stages.zero.skip_zero_variance_groups=true", ["stages.zero", "skip_zero_variance_groups", "beta"]),
    ("stages.zero.top_p=0.9", ["stages.zero.top_p", "nothing here", "whole distribution", "bias the ratio"]),
    ("stages.zero.top_k=50", ["stages.zero.top_k", "whole distribution"]),
    ("stages.zero.min_tokens=4", ["stages.zero.min_tokens", "whole distribution"]),
    ("stages.zero.sampling_importance_cap=high", ["stages.zero.sampling_importance_cap", "'auto'", "'high'"]),
    ("stages.zero.sampling_importance_cap=0", ["stages.zero.sampling_importance_cap", "greater than 0"]),
    ("rollout.async_steps=2", ["rollout.async_steps", "less than or equal to 1", "got 2"]),
    ("stages.zero.partial_rollout_length=100", ["stages.zero", "= 100", "= 512", "equal parts", "divisor"]),
    ("stages.zero.partial_rollout_length=512", ["stages.zero", "= 512 does not cut", "divisor"]),
    ("stages.zero.overlong_buffer_length=513", ["stages.zero", "overlong_buffer_length = 513", "= 512"]),
    ("stages.zero.overlong_penalty=2", ["stages.zero", "overlong_penalty needs overlong_buffer_length"]),
    (
        "stages.zero.max_completion_length=16384",
        ["stages.zero", "max_completion_length = 16896", "max_tokens_per_microbatch = 16384"],
    ),
]


@pytest.mark.parametrize(("override", "parts"), WRONG_OVERRIDES, ids=[override for override, _ in WRONG_OVERRIDES])
def test_wrong_override_is_named(zero: str, override: str, parts: list[str]) -> None:
    message = message_of(zero, override)
    for part in parts:
        assert part in message


WRONG_FILES = {
    "empty": ("", ["stages", "missing"]),
    "a-list": ("[1, 2]", ["expected a mapping", "list"]),
    "not-yaml": ("stages: [", ["not valid YAML", "line 1"]),
    "no-stages": ("stages: []", ["stages", "name at least one"]),
    "stage-is-a-string": ("stages: [zero]", ["stages.0", "'zero'"]),
    "stage-without-name": ("stages: [{kind: grpo, train_files: [a]}]", ["stages.0.name", "missing"]),
    "stage-without-data": ("stages: [{name: zero, kind: grpo}]", ["stages.zero.train_files", "missing"]),
    "stage-without-kind": ("stages: [{name: zero, train_files: [a]}]", ["stages.zero.kind", "nothing", "grpo"]),
    "one-name-twice": (f"stages: [{ZERO}, {ZERO}]", ["two stages", "'zero'"]),
    "one-name-twice-in-a-child": (f"defaults: tiny\nstages: [{ZERO}, {ZERO}]", ["two stages", "'zero'"]),
    "defaults-is-a-mapping": ("defaults: {a: 1}", ["defaults", "{'a': 1}"]),
    "defaults-holds-a-number": ("defaults: [tiny, 3]", ["defaults", "3"]),
    "pretrain-from-a-model": (
        "stages: [{name: b, kind: pretrain, model: x, train_files: [t], architecture: {}, max_steps: 1}]",
        ["stages.b", "'x'", "does not apply"],
    ),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_file_is_named(write, case: str) -> None:
    text, parts = WRONG_FILES[case]
    config = write(text)
    message = message_of(config)
    for part in [config, *parts]:
        assert part in message


def test_wrong_parent_is_named(write) -> None:
    message = message_of(write("defaults: tinny"))
    assert "'tinny'" in message and "'tiny'" in message


def test_every_mistake_of_a_recipe_is_listed(zero: str) -> None:
    message = message_of(zero, "sead=1", "stages.zero.max_steps=x", "stages.zero.bta=0")
    assert re.search(r"sead.*seed", message) and "max_steps" in message and re.search(r"bta.*'beta'", message)


@pytest.mark.parametrize("link", ["a.yaml", "../loop/a.yaml"], ids=["plain", "through-the-parent"])
def test_cyclic_defaults_are_named(write, link: str) -> None:
    write("defaults: b.yaml", "loop/a.yaml")
    config = write(f"defaults: {link}", "loop/b.yaml")
    message = message_of(config)
    assert "cycle" in message and message.count("b.yaml") >= 2 and "a.yaml" in message


def test_binary_recipe_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert str(path) in message_of(str(path))


@pytest.mark.parametrize(("config", "hint"), [("tinny", "'tiny'"), ("no/such/file.yaml", "tiny")])
def test_missing_recipe_is_named(config: str, hint: str) -> None:
    message = message_of(config)
    assert config in message and hint in message


def test_defaults_of_the_schema_are_valid() -> None:
    minimal = {"stages": [yaml.safe_load(ZERO)]}
    assert load_recipe_defaults(minimal).stages[0].rewards == {"accuracy": 1.0, "format": 1.0}


def load_recipe_defaults(raw: dict) -> Recipe:
    """Defaults are not validated on the way in; validating the dump does it."""
    return Recipe.model_validate(Recipe.model_validate(raw).model_dump())


def test_reference_refresh_needs_a_reference() -> None:
    stage = {"name": "zero", "kind": "grpo", "train_files": ["a.jsonl"], "max_steps": 9}
    stage |= {"beta": 0.0, "ref_model_sync_steps": 4}
    with pytest.raises(ConfigError, match=r"stages\.zero: ref_model_sync_steps needs beta above 0"):
        validate({"stages": [stage]}, "recipe")


def test_sample_options_need_a_teacher() -> None:
    stage = {"name": "student", "kind": "distill", "train_files": ["a.jsonl"]}
    with pytest.raises(ConfigError, match=r"stages\.student: num_samples applies to a teacher's samples"):
        validate({"stages": [stage | {"num_samples": 2}]}, "recipe")
    assert validate({"stages": [stage | {"num_samples": 2, "teacher": "t"}]}, "recipe").stages[0].num_samples == 2
    saved = yaml.safe_load(dump_recipe(validate({"stages": [stage]}, "recipe")))
    assert validate(saved, "saved").stages[0].teacher is None


def test_options_that_do_not_go_together(zero: str) -> None:
    rewards = "stages.zero.rewards.overlong=1"
    assert "a reward is named overlong" in message_of(zero, rewards, "stages.zero.overlong_buffer_length=64")
    many = "stages.zero.steps_per_generation=16"
    message = message_of(zero, many, "stages.zero.partial_rollout_length=128")
    assert "steps_per_generation = 16 is more than num_generations = 8" in message and "one group" in message


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"vllm": {"server_base_url": "http://a:1"}}, "rollout: vllm has options, but engine is 'r1fast'"),
        ({"engine": "vllm", "vllm": {"server_timeout": 1}}, "rollout.vllm: server_timeout needs server_base_url"),
        (
            {"engine": "vllm", "vllm": {"server_base_url": "http://a:1", "max_model_length": 9}},
            "rollout.vllm: max_model_length is a setting of the server",
        ),
        (
            {"engine": "vllm", "enforce_eager": True, "vllm": {"server_base_url": "http://a:1"}},
            "rollout: enforce_eager is a setting of the server",
        ),
        ({"engine": "vllm", "vllm": {"server_base_url": "a:1"}}, "server_base_url is 'a:1'; expected http://host:port"),
        ({"engine": "vllm", "vllm": {"server_url": "http://a:1"}}, "rollout.vllm.server_url: unknown key"),
        ({"engine": "vllm", "async_steps": 1}, "rollout: async_steps = 1 does not apply to vLLM in process"),
        ({"engine": "sglang"}, "rollout.engine: "),
    ],
)
def test_options_of_vllm_that_do_not_apply(rollout: dict, message: str) -> None:
    raw = {"rollout": rollout, "stages": [yaml.safe_load(ZERO)]}
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(raw, "mine.yaml")


def test_options_of_vllm_round_trip(write) -> None:
    """The saved recipe names every option, those of the other way to run vLLM too."""
    recipe = load_recipe(
        write(f"stages: [{ZERO}]"), ["rollout.engine=vllm", "rollout.vllm.server_base_url=http://a:1", "name=x"]
    )
    assert load_recipe(write(dump_recipe(recipe), "saved.yaml"), []) == recipe
    assert recipe.rollout.vllm.server_base_url == "http://a:1"


# Files


def test_a_byte_order_mark_is_no_part_of_a_key(write) -> None:
    assert load_recipe(write(f"\ufeffseed: 5\nstages: [{ZERO}]"), []).seed == 5


def test_what_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes("seed: 1\nname: caf\xe9".encode("latin-1"))
    assert "line 2: not UTF-8" in message_of(str(tmp_path / "mine.yaml"))


def test_what_is_no_recipe_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("folder", "zero", "pipe"):
        assert "expected a YAML file" in message_of(str(tmp_path / f"{name}.yaml"))
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(1 << 30)  # a hole
    assert "larger than 262144 bytes" in message_of(str(tmp_path / "huge.yaml"))
    assert "File name too long" in message_of("x" * 5000 + ".yaml")
    assert "null byte" in message_of("a\0b.yaml")
    assert "no recipe ''" in message_of("")
    (tmp_path / "secret.yaml").write_text("seed: 1")
    monkeypatch.setattr(Path, "open", refuse_to_open)  # a file's mode does not stop root
    assert "secret.yaml': cannot be read (Permission denied)" in message_of(str(tmp_path / "secret.yaml"))


def refuse_to_open(path: Path, *mode: Any, **options: Any) -> None:
    raise PermissionError(13, "Permission denied")


def test_parents_are_read_once_and_not_without_end(write) -> None:
    write(f"seed: 3\nstages: [{ZERO}]", "p0.yaml")
    for i in range(1, 30):
        write(f"defaults: [p{i - 1}.yaml, p{i - 1}.yaml]", f"p{i}.yaml")
    assert load_recipe(write("defaults: p15.yaml"), []).seed == 3  # 2^15 paths lead to it
    assert "more than 20 recipes in a row" in message_of(write("defaults: p29.yaml"))


def test_override_reaches_the_longer_of_two_names(write) -> None:
    config = write(f"stages: [{ZERO.replace('zero', 'qwen2')}, {ZERO.replace('zero', 'qwen2.5')}]")
    recipe = load_recipe(config, ["stages.qwen2.5.max_steps=7", "stages.qwen2.max_steps=8"])
    assert [stage.max_steps for stage in recipe.stages] == [8, 7]


def test_no_error_is_long(write) -> None:
    long = "x" * 200_000
    for text in (f"{long}: 1", f"seed: {long}", f"stages: [{{name: zero, kind: {long}}}]", f"defaults: [[{long}]]"):
        message = message_of(write(text))
        assert len(message) < 700
        assert all(len(line) < 1100 for line in error_lines(message + long))
    many = message_of(write("\n".join(f"a{i}: 1" for i in range(1000)) + f"\nstages: [{ZERO}]"))
    assert len(error_lines(many)) == 41 and error_lines(many)[-1] == "r1fast: and 960 more"
