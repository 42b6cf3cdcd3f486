"""The table of others' names: what it says of ours is true, and what users of TRL write has a row."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from r1fast.config import load_recipe
from r1fast.explain import options_of, topics
from r1fast.schema import KINDS, Recipe
from r1fast.translations import translate, translate_last, translations, values
from r1fast.unknown_keys import FLAGS, VALUED
from tests.tiny_checkpoint import ZERO, message_of

OURS = {option.name for kind in KINDS for option in options_of(kind)} | {o.name for o in options_of("recipe")}


def test_every_right_hand_side_is_an_option() -> None:
    known = {*OURS, *VALUED, *FLAGS, "--help", "rewards.repetition", "rewards.cosine"}
    assert [(row.theirs, name) for row in translations() for name in row.ours if name not in known] == []
    assert len(translations()) > 200


def test_a_row_says_something_and_no_name_has_two() -> None:
    names = [row.theirs for row in translations()]
    assert len(set(names)) == len(names)
    assert [row.theirs for row in translations() if not row.ours and not row.note] == []
    # A name that an option of ours has too is understood, or has another meaning at its place.
    bare = {name for name in names if name in OURS} - {"top_p", "activation_checkpointing"}
    assert bare == set()


def test_nearest_prefix_wins() -> None:
    row = translate("actor_rollout_ref.actor.fsdp_config.param_offload")
    assert row is not None and row.ours == ("trainer.offload",)
    for key, theirs in (("hub_token", "hub_*"), ("vllm_tp", "vllm_*"), ("vllm_mode", "vllm_mode")):
        row = translate(key)
        assert row is not None and row.theirs == theirs
    assert translate("max_stepz") is None
    row = translate_last("clip_ratio_high")
    assert row is not None and row.ours == ("epsilon_high",)
    assert translate_last("enable") is None and translate_last("path") is None  # two that differ


def fields_of(file: str, name: str) -> list[str]:
    """Names that a configuration class of TRL or transformers declares; importing it would take seconds."""
    package, _, rest = file.partition("/")
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    tree = ast.parse(Path(spec.submodule_search_locations[0], rest).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return [ast.unparse(node.target) for node in found.body if isinstance(node, ast.AnnAssign)]


@pytest.mark.parametrize(
    ("file", "name"),
    [("trl/trainer/grpo_config.py", "GRPOConfig"), ("trl/trainer/sft_config.py", "SFTConfig"),
     ("trl/trainer/reward_config.py", "RewardConfig"), ("trl/trainer/model_config.py", "ModelConfig")],
)  # fmt: skip
def test_all_that_trl_has_is_known(file: str, name: str) -> None:
    known = {option.name.split(".")[-1] for topic in topics() for option in options_of(topic)}
    lacking = [field for field in fields_of(file, name) if field not in known and translate(field) is None]
    assert lacking == []


WRITTEN = [
    ("per_device_train_batch_size: 8", "per_device_train_batch_size: unknown key of TRL; here prompts_per_step and"),
    ("use_vllm: true", "use_vllm: unknown key of TRL; here rollout.engine: vllm"),
    ("temperature: 1.0", "temperature: unknown key; stages of kind grpo, collect, reject, distill have it: write it in "
     "one of them, or on the command line zero.temperature=VALUE"),
    ("kl_loss_coef: 0.1", "kl_loss_coef: unknown key of verl; here beta"),
    ("per-device-train-batch-size: 8", "per-device-train-batch-size: unknown key of TRL; here prompts_per_step and"),
    ("max-steps: 8", "max-steps: unknown key; stages of kind pretrain, sft, grpo, distill have it"),
    ("hub_token: x", "hub_token: unknown key of TRL; nothing here: nothing is uploaded"),
    ("data: {train_batch_size: 256}", "data.train_batch_size: unknown key of verl; here prompts_per_step"),
    ("actor_rollout_ref: {actor: {clip_ratio: 0.2, optim: {lr: 1}}}",
     "actor_rollout_ref.actor.clip_ratio: unknown key of verl; here epsilon"),
    ("actor_rollout_ref: {actor: {clip_ratio: 0.2, optim: {lr: 1}}}",
     "actor_rollout_ref.actor.optim.lr: unknown key of verl; here learning_rate"),
    ("trainer: {total_epochs: 15}", "trainer.total_epochs: unknown key of verl; here num_train_epochs"),
    ("critic: {ppo_epochs: 1}", "critic.ppo_epochs: unknown key of verl; nothing here: there is no critic"),
    ("datum: {a: 1}", "datum: unknown key; "),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), WRITTEN, ids=[line for line, _ in WRITTEN])
def test_a_key_of_another_trainer_is_translated(write, line: str, message: str) -> None:
    config = write(f"{line}\nstages: [{ZERO}]")
    assert message in message_of(config)
    if ": {" not in line:
        key, value = line.split(": ")
        assert message.split(": ", 1)[-1] in message_of(write(f"stages: [{ZERO}]"), f"{key}={value}")


def test_a_value_of_another_trainer_is_translated(zero: str) -> None:
    places = {"model.dtype": "model.dtype", "rollout.engine": "rollout.engine", "report_to": "report_to"}
    for option, theirs, ours in values():
        key = places.get(option, f"stages.zero.{option}")
        message = message_of(zero, f"{key}={theirs}")
        assert message.endswith(f"here {ours}") and "\n" not in message and "Input should" not in message
    assert "report_to.1: got 'console'; here the trackers alone" in message_of(zero, "report_to=[wandb, console]")
    assert load_recipe(zero, ["stages.zero.eval_files=null", "report_to=null"]).report_to == []


def test_in_a_stage_too(zero: str) -> None:
    assert "zero.learning-rate: unknown key; did you mean 'learning_rate'?" in message_of(zero, "zero.learning-rate=1")
    assert "stages.zero.lora_r: unknown key of TRL; here lora.r" in message_of(zero, "zero.lora_r=8")
    assert "zero.rollout: unknown key; it stands beside stages" in message_of(zero, "zero.rollout.n=8")
    assert "zero.dtype: unknown key; write model.dtype, beside stages" in message_of(zero, "zero.dtype=auto")
    assert "zero.report_to: unknown key; it stands beside stages" in message_of(zero, "zero.report_to=[]")
    assert "zero.filters: unknown key; kind collect and reject and distill have it, not grpo" in message_of(
        zero, "zero.filters={}"
    )


def test_three_nearest_names_otherwise(zero: str) -> None:
    message = message_of(zero, "zero.eval_step=1")
    assert "did you mean 'eval_steps', " in message and message.count("'") == 6
    assert "did you mean '--output-dir'?" in message_of(zero, "outputdir=x")
    assert "--help grpo lists what there is" in message_of(zero, "zero.qqqqqq=1")


def test_a_whole_yaml_of_verl_is_answered_line_by_line(write) -> None:
    theirs = {row.theirs: 1 for row in translations() if row.peer == "verl" and "*" not in row.theirs}
    nested: dict = {}
    for key in theirs:
        *path, leaf = key.split(".")
        node = nested
        for part in path:
            node = node.setdefault(part, {})
        if isinstance(node, dict):
            node[leaf] = 1
    lines = message_of(write(yaml.safe_dump(nested))).splitlines()
    foreign = [line for line in lines if "of verl" in line]
    assert len(foreign) > 100 and not [line for line in lines if "did you mean" in line]
    assert set(Recipe.model_fields).isdisjoint({"data", "actor_rollout_ref", "algorithm"})
