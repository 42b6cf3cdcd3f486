"""The command line: a recipe in three places, an override in every form, and one line for what makes no sense."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from r1fast.command_line import parse
from r1fast.config import load_recipe
from r1fast.explain import options_of, topics
from r1fast.unknown_keys import FLAGS, VALUED
from tests.tiny_checkpoint import ZERO, message_of

ROOT = Path(__file__).parents[1]
VALUES = st.one_of(
    st.integers(-9, 9), st.floats(-1e6, 1e6), st.booleans(), st.none(),
    st.text("ab =:,'\"#[]{}-@./\\", max_size=8), st.lists(st.text("ab =-", max_size=4), max_size=3),
)  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(list(argv))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and len(err) < 700
    return err


@pytest.mark.parametrize("argv", [["mine.yaml"], ["--config", "mine.yaml"], ["--config=mine.yaml"]])
def test_a_recipe_is_named_in_three_ways(argv: list[str]) -> None:
    for before, after in ([], ["--dry-run"]), (["--dry-run", "seed=1"], []), (["--seed", "1"], ["--dry-run"]):
        args, overrides = parse([*before, *argv, *after])
        assert args.config == "mine.yaml" and args.dry_run
        assert overrides == ["seed=1"] * (len(before) > 0)


def test_no_recipe_is_none_and_a_path_may_hold_an_equals_sign() -> None:
    assert parse([])[0].config is None
    args, overrides = parse(["runs/lr=1/mine.yaml", "model.path=a.yaml"])
    assert (args.config, overrides) == ("runs/lr=1/mine.yaml", ["model.path=a.yaml"])


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_a_value_is_the_same_in_every_form(value: object) -> None:
    """As YAML that means the value, after `=` and as an argument of its own."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
    forms = [[f"zero.model={text}"], [f"--zero.model={text}"]]
    if not text.startswith("--"):
        forms.append(["--zero.model", text])
    for form in forms:
        assert parse([*form, "tiny"])[1] == [f"zero.model={text}"], form


def test_flags_are_true_and_others_need_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    flags = {o.name.split(".")[-1] for topic in topics() for o in options_of(topic) if o.type == "true or false"}
    assert {"router_replay", "compile", "eval_greedy", "merge_and_unload"} <= flags
    for name in flags:
        assert parse([f"--zero.{name}"])[1] == parse([f"--zero.{name}", "true"])[1] == [f"zero.{name}=true"]
        assert parse([f"--zero.{name}", "false", "tiny"])[1] == [f"zero.{name}=false"]
        args, overrides = parse([f"--zero.{name}", "tiny", "seed=1"])
        assert (args.config, overrides) == ("tiny", [f"zero.{name}=true", "seed=1"])
    assert parse(["--zero.min_reward", "-1"])[1] == ["zero.min_reward=-1"]
    for argv in (["--zero.beta"], ["--zero.beta", "--dry-run"], ["--zero.beta", "-h"]):
        assert "zero.beta has no value" in refused(capsys, *argv)
    assert "did you mean '--dry-run'" in refused(capsys, "--dryrun")


WRONG = [
    (["a.yaml", "b.yaml"], "two recipes: 'a.yaml' and 'b.yaml'"),
    (["a.yaml", "--config", "b.yaml"], "two recipes: 'a.yaml' and --config b.yaml"),
    (["--config", "a", "--config", "b"], "--config is given twice"),
    (["--output-dir="], "--output-dir is empty"),
    (["--output-dir"], "expected one argument"),
    (["--output-dir", "--dry-run"], "--output-dir: expected one argument"),
    (["--stages", "--resume"], "--stages: expected one argument"),
    (["+trainer.total_epochs=2"], "'+trainer.total_epochs=2' is neither an option nor an override"),
    (["~zero.beta"], "'~zero.beta' is neither an option nor an override"),
    ([".x=2"], "neither an option nor an override"),
    (["a.yaml", "zero.beta", "0"], "two recipes: 'a.yaml' and 'zero.beta' (an override is key=value)"),
    (["-x"], "'-x' is neither an option nor an override"),
    (["=3"], "neither an option nor an override"),
    ([""], "neither an option nor an override"),
    (["--=3"], "neither an option nor an override"),
    (["--dry-run=true"], "--dry-run: ignored explicit argument 'true'"),
    (["--accept-changes"], "--accept-changes goes with --resume"),
]


@pytest.mark.parametrize(("argv", "part"), WRONG, ids=[" ".join(argv) or "empty" for argv, _ in WRONG])
def test_what_makes_no_sense_is_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], part: str) -> None:
    assert part in refused(capsys, *argv)


def test_help_lists_recipes_options_and_topics(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, text.splitlines())) <= 120
    for name in (*VALUED, *FLAGS, *(path.stem for path in (ROOT / "r1fast" / "recipes").glob("*.yaml")), *topics()):
        assert name in text
    assert "The whole R1 chain from scratch, on two CPU cores" in text


@pytest.mark.parametrize(
    ("argv", "begin"),
    [(["-h", "lora"], "lora: "), (["--help=lora"], "lora: "), (["a.yaml", "--help", "--dry-run"], "torchrun -m "),
     (["-h", "--resume"], "torchrun -m ")],
)  # fmt: skip
def test_help_is_asked_for_in_every_form(capsys: pytest.CaptureFixture[str], argv: list[str], begin: str) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    assert stop.value.code == 0 and capsys.readouterr().out.startswith(begin)


def test_help_into_a_pipe_that_is_closed() -> None:
    command = f"{sys.executable} -m r1fast.train --help grpo | head -1"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith("grpo: ") and result.stderr == ""


# Which stage an override is of


def steps(config: str, *overrides: str) -> list[int]:
    return [stage.max_steps for stage in load_recipe(config, list(overrides)).stages]


def test_a_stage_is_addressed_by_name_number_or_bare_name(write) -> None:
    config = write(f"stages: [{ZERO}, {ZERO.replace('zero', 'dev')}]")
    for override in ("stages.dev.max_steps=7", "stages.1.max_steps=7", "dev.max_steps=7"):
        assert steps(config, override) == [200, 7]
    assert steps(config, "zero.max_steps=3", "stages.0.max_steps=4", "dev.max_steps=5") == [4, 5]
    assert "no stage '2'" in message_of(config, "stages.2.max_steps=7")
    assert "no stage '-1'" in message_of(config, "stages.-1.max_steps=7")
    assert "no stage '0'" in message_of(config, "stages.0=7")


def test_a_name_comes_before_a_number_and_a_section_before_a_stage(write) -> None:
    config = write(f"stages: [{ZERO}, {ZERO.replace('zero', chr(39) + '0' + chr(39))}]")
    assert steps(config, "stages.0.max_steps=7", "stages.1.beta=0") == [200, 7]
    config = write(f"stages: [{ZERO.replace('zero', 'model')}]")
    assert load_recipe(config, ["model.path=m"]).model.path == "m"
    assert "model.max_steps: unknown key" in message_of(config, "model.max_steps=7")
    assert steps(config, "stages.model.max_steps=7") == [7]


def test_bare_names_with_dots(write) -> None:
    config = write(f"stages: [{ZERO.replace('zero', 'qwen2')}, {ZERO.replace('zero', 'qwen2.5')}]")
    assert steps(config, "qwen2.5.max_steps=7", "qwen2.max_steps=8") == [8, 7]


def test_a_bare_name_that_is_misspelt(zero: str) -> None:
    assert "did you mean 'zero'?" in message_of(zero, "zer.max_steps=7")
    assert "on the command line zero.max_steps" in message_of(zero, "max_steps=7")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    assert f"--resume --output-dir {tmp_path}"[:40] in message_of(str(tmp_path))
