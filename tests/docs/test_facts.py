"""What pages state is so: options and metrics that they name exist, defaults are those of the packages."""

import ast
import importlib.util
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

from r1fast.explain import options_of, topics
from r1fast.rewards import registry
from tests.docs.pages import ROOT, prose


@cache
def options() -> set[str]:
    """Of recipes, also by what follows the last dot; rewards, and their parameters; what a recipe is read by."""
    names = {option.name for topic in topics() for option in options_of(topic)}
    registry.resolve("accuracy")  # reads the modules of all
    functions = [function for function in registry.REWARDS.values() if registry.is_builtin(function)]
    given = {name for function in functions for name in inspect.signature(function).parameters}
    return (
        names
        | {name.rpartition(".")[2] for name in names}
        | given
        | set(registry.REWARDS)
        | set(topics())
        | {"defaults"}
    )


METRICS = re.compile(
    r"(?:reward|reward_std|frac_\w+|loss|grad_norm|entropy|kl|learning_rate|num_tokens|step_time|tokens_per_second|"
    r"cispo_clip_ratio|off_policy_mask_ratio|(?:rewards|completions|clip_ratio|importance_ratio|sampling|moe|"
    r"dynamic_sampling|partial_rollouts)/[\w/]+)"
)


@cache
def words_of_code() -> set[str]:
    """All names and texts of the sources, in words."""
    files = [*(ROOT / "r1fast").rglob("*.py"), *(ROOT / "kernels/r1fast_kernels").glob("*.py")]
    return {word for path in files for word in re.findall(r"[\w/@]+", path.read_text(encoding="utf-8"))}


def spans(page: Path) -> list[str]:
    """What stands between `."""
    return re.findall(r"`([^`\n]+)`", prose(page))


TRL_FILES = (
    ("transformers", "training_args.py"),
    ("trl", "trainer/base_config.py"),
    ("trl", "trainer/grpo_config.py"),
)
USER_PAGES = [ROOT / "docs" / f"{name}.md" for name in
              ("index", "stages", "rewards", "extend", "memory", "multi-node", "troubleshooting")]  # fmt: skip


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: page.stem)
def test_options_that_a_page_names_exist(page: Path) -> None:
    for span in spans(page):
        if found := re.match(r"([a-z]\w*(?:\.[a-z]\w*)*): ", span):  # an option with a value
            assert found[1] in options(), f"{page.name}: {span}"
        elif re.fullmatch(r"[a-z]+_\w+", span) and span not in options():  # or something else of the code
            assert span in words_of_code(), f"{page.name}: {span}"


def test_metrics_that_pages_name_are_written() -> None:
    found = {span for page in USER_PAGES for span in spans(page) if METRICS.fullmatch(span)}
    assert len(found) > 20
    for name in found:
        rewards = re.fullmatch(r"rewards/(\w+)/mean", name)  # of any reward
        assert name in words_of_code() or rewards, name


@cache
def defaults_of_trl() -> dict[str, object]:
    """Of GRPOConfig and what it inherits, read from the sources: importing them takes seconds."""
    found: dict[str, object] = {}
    for package, file in TRL_FILES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                value = node.value
                if isinstance(value, ast.Call):
                    value = next((k.value for k in value.keywords if k.arg == "default"), value)
                if isinstance(value, (ast.Constant, ast.UnaryOp)):
                    found[node.target.id] = ast.literal_eval(value)
    return found


def section(page: str, begin: str, end: str) -> str:
    return prose(ROOT / "docs" / page).partition(begin)[2].partition(end)[0]


def our_defaults() -> dict[str, str]:
    return {option.name: option.default for topic in ("grpo", "recipe") for option in options_of(topic)}


def test_defaults_that_differ_from_trls() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| `?([\w.-]+)`?.* \| `?([\w.-]+)", section("coming-from.md", "From TRL", "The same"), re.M
    )
    assert {"loss_type", "adam_beta2", "max_steps", "seed"} <= {name for name, *_ in rows}
    checked = 0
    for name, theirs, ours in rows:
        if theirs != "on":
            assert str(defaults_of_trl()[name]) == theirs, name
        if name in our_defaults():
            assert our_defaults()[name] == ours, name
            checked += 1
    assert checked >= 6


def test_defaults_that_are_the_same_as_trls() -> None:
    pairs = re.findall(r"`(\w+)`\s+([\w.-]+)", section("coming-from.md", "The same:", "From verl"))
    assert len(pairs) >= 8
    for name, value in pairs:
        value = value.rstrip(".")
        for default in (defaults_of_trl()[name], our_defaults()[name]):
            assert str(default) == value or float(str(default)) == float(value), name


def test_defaults_beside_verls() -> None:
    """Of verl only what stands here for it: it is not installed."""
    stated = dict(re.findall(r"`(\w+): ([\w.-]+)`", section("coming-from.md", "From verl", "## A TRL script")))
    assert {"prompts_per_step", "num_generations", "delta", "eval_temperature"} <= stated.keys()
    for name, value in stated.items():
        assert our_defaults()[name] == value, name
