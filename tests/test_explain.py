"""What --help says of an option is what the schema says: nothing left out, and nothing of what is not there."""

import re

import pytest

from r1fast.explain import help_text, options_of, topics
from r1fast.schema import KINDS, Recipe
from r1fast.train import main


def test_every_option_of_every_topic_is_told_once() -> None:
    for topic, model in topics().items():
        names = [option.name for option in options_of(topic)]
        assert len(set(names)) == len(names), topic
        assert {name for name in names if "." not in name} == set(model.model_fields), topic


def test_every_option_says_what_it_is() -> None:
    """A comment beside it in the schema, or a section of its own; a kind is explained by its stage."""
    for topic in topics():
        options = options_of(topic)
        parts = [option.name.split(".") for option in options]
        sections = {".".join(part[:depth]) for part in parts for depth in range(1, len(part))}
        silent = {option.name for option in options if not option.about} - sections - {"kind"}
        assert silent == set(), topic


def test_groups_are_sentences_and_hold_together() -> None:
    for topic in topics():
        groups = [option.group for option in options_of(topic)]
        runs = [group for i, group in enumerate(groups) if i == 0 or groups[i - 1] != group]
        assert len(set(runs)) == len(runs), topic
        assert not [group for group in runs if re.fullmatch(r"(\S+: )?[A-Z]\w+", group)], topic  # the name of a class


WORDS = [
    ("grpo", "num_generations", "integer >= 2", "8"),
    ("grpo", "epsilon_high", "number >= 0 or null", "null"),
    ("grpo", "sampling_importance_cap", "auto, number > 0 or null", "auto"),
    ("grpo", "rewards.NAME.weight", "number", "1.0"),
    ("grpo", "lora.dropout", "0 <= number < 1", "0.0"),
    ("grpo", "mask_truncated_completions", "true or false", "false"),
    ("pretrain", "max_steps", "integer > 0", "required"),
    ("sft", "learning_rate", "0 < number <= 1000", "5e-05"),
    ("rollout", "vllm.weight_transfer", "folder or nccl", "folder"),
]


@pytest.mark.parametrize(("topic", "name", "words", "default"), WORDS, ids=[f"{row[0]}-{row[1]}" for row in WORDS])
def test_types_and_defaults_in_words(topic: str, name: str, words: str, default: str) -> None:
    option = next(option for option in options_of(topic) if option.name == name)
    assert (option.type, option.default) == (words, default)


def test_comments_above_and_beside_belong_to_their_option() -> None:
    about = {option.name: option.about for option in options_of("grpo")}
    assert about["mask_truncated_completions"].startswith("A completion that max_completion_length cuts")
    assert about["prompts_per_step"] == "per rollout"
    assert about["beta"].startswith("factor of the KL") and "verl kl_loss_coef" in about["beta"]
    assert "fmt:" not in "".join(about.values()) and "type: ignore" not in "".join(about.values())
    # An option that a stage declares anew, without a comment, keeps what was said of it.
    assert {o.name: o.about for o in options_of("sft")}["batch_size"] == "rows per step"


@pytest.mark.parametrize("width", [60, 100])
def test_help_fits_its_width(width: int) -> None:
    for topic in (*KINDS, "recipe"):
        text = help_text(topic, width)
        assert max(map(len, text.splitlines())) <= width
        assert text.startswith(f"{topic}: ")


def test_help_explains_a_topic_and_stops(capfd: pytest.CaptureFixture[str]) -> None:
    for topic, part in (("grpo", "num_generations: integer >= 2 (default: 8)"), ("rollout", "vllm.server_base_url")):
        with pytest.raises(SystemExit) as stop:
            main(["--help", topic])
        assert stop.value.code == 0 and part in capfd.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--help", "grpp"])
    error = capfd.readouterr().err
    assert stop.value.code == 2 and "'grpp'" in error and "'grpo'" in error and error.count("\n") == 1


def test_topics_are_kinds_and_sections() -> None:
    sections = {name for name, field in Recipe.model_fields.items() if "Section" in str(field.annotation)}
    assert {*KINDS, *sections, "vllm", "lora", "filters", "few_shot", "recipe"} <= set(topics())
    with pytest.raises(KeyError):
        options_of("grpoo")
