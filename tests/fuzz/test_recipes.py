"""Ten thousand wrong recipes: each is refused in a line or two, and each that is accepted makes sense."""

import contextlib
import io
import math
import re
import signal
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml

from r1fast.models.folders import PACKAGE, SUFFIX, in_package
from tests.fuzz import recipes
from tests.tiny_checkpoint import PROMPTS, write_jsonl

CPU_SECONDS, SECONDS = 10, 60  # of one case: its own time, and what a busy machine makes of it
MAKES = {
    "pretrain": "model", "sft": "model", "grpo": "model", "distill": "model data", "collect": "data", "reject": "data",
    "reward_model": "score", "evaluate": "",
}  # fmt: skip
OWN_FILES = re.compile(r"(latest|.*\.(yaml|json|jsonl|html|partial|lock))\Z", re.IGNORECASE)


class TooSlow(BaseException):
    """Past every handler."""


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow


@pytest.fixture
def dry_run(base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], Any]]:
    """`--dry-run` of a recipe in this process; (status, stdout, stderr). What does not depend on it is kept."""
    import huggingface_hub.constants

    from r1fast import preflight, train
    from r1fast.data import sources, tasks
    from r1fast.models import weights

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "checkpoint").symlink_to(base_model)
    _write_data(tmp_path)
    monkeypatch.setattr(tasks, "load", lru_cache(_short(tasks.load)))
    monkeypatch.setattr(sources, "_read_hub", _no_hub)
    for module, name in ((weights, "check_checkpoint"), (weights, "load_tokenizer")):
        monkeypatch.setattr(module, name, lru_cache(getattr(module, name)))
    monkeypatch.setattr(preflight, "_check_rewards", _kept(preflight._check_rewards))
    for kind in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(kind, _too_slow)

    def run(content: bytes) -> tuple[int, str, str]:
        (tmp_path / "mine.yaml").write_bytes(content)
        out, err = io.StringIO(), io.StringIO()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = train.main(["--config", "mine.yaml", "--output-dir", "run", "--dry-run"])
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        return status, out.getvalue(), err.getvalue()

    yield run
    for kind in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(kind, signal.SIG_DFL)


def _write_data(folder: Path) -> None:
    write_jsonl(folder / "train.jsonl", [{**row, "domain": "math"} for row in PROMPTS])
    write_jsonl(folder / "sft.jsonl", [{"prompt": "one ?", "completion": "two"}] * 4)
    write_jsonl(folder / "examples.jsonl", [{**row, "reasoning": "a sum"} for row in PROMPTS])
    write_jsonl(folder / "pairs.jsonl", [{"prompt": "a", "chosen": "good", "rejected": "bad"}] * 4)
    write_jsonl(folder / "labels.jsonl", [{"prompt": "a", "response": "good", "label": 1}] * 4)


def _short(load: Callable[[str, str], list[dict]]) -> Callable[[str, str], list[dict]]:
    def load_some(name: str, split: str) -> list[dict]:
        if name == "corpus":  # 40,000 documents
            return [{"text": "1 + 1 = 2"}] * 50
        rows = load(name, split)
        return rows[:: max(1, len(rows) // 100)]

    return load_some


def _no_hub(source: str) -> Iterator[Any]:
    raise ValueError(f"{source[:80]}: no such file or folder here")


def _kept(check: Callable[..., None]) -> Callable[..., None]:
    """The check of rewards, by its arguments; it imports modules."""
    known: dict[str, str | None] = {}

    def check_once(rewards: dict[str, Any], columns: set[str] | None) -> None:
        key = repr((rewards, columns and sorted(columns)))
        if key not in known:
            try:
                known[key] = check(rewards, columns)
            except ValueError as error:
                known[key] = str(error)
        if (message := known[key]) is not None:
            raise ValueError(message)

    return check_once


def check_case(number: int, content: bytes, dry_run: Callable[[bytes], Any]) -> bool:
    """Whether it was accepted."""
    case = f"case {number}: {content[:3000]!r}"
    try:
        status, out, err = dry_run(content)
    except TooSlow:
        raise AssertionError(f"more than {CPU_SECONDS} s: {case}") from None
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{type(error).__name__}: {error}: {case}") from error
    assert status in (0, 2), case
    if status == 2:
        lines = err.splitlines()
        assert 1 <= len(lines) <= 41 and all(line.startswith("r1fast: ") and len(line) < 1100 for line in lines), case
        assert out == "" and "Traceback" not in err, case
        return False
    try:
        check_accepted(out)
    except Exception as error:
        raise AssertionError(f"accepted, but {type(error).__name__}: {error}: {case}\n{out}") from error
    return True


@pytest.mark.parametrize("first", [0, 75])
def test_wrong_recipes(dry_run, first: int) -> None:
    accepted = [check_case(number, recipes.recipe(number), dry_run) for number in range(first, first + 75)]
    assert 5 < sum(accepted) < 60  # neither lane is empty


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("first", range(1000, 11000, 1000))
def test_ten_thousand_wrong_recipes(dry_run, first: int) -> None:
    accepted = [check_case(number, recipes.recipe(number), dry_run) for number in range(first, first + 1000)]
    print(f"{first}: {sum(accepted)} accepted")


@pytest.mark.parametrize("base", recipes.bases()[: len(recipes.STAGES)], ids=list(recipes.STAGES))
def test_the_recipes_that_are_changed_are_right(dry_run, base: dict[str, Any]) -> None:
    """Else nothing but their first mistake would be tested."""
    status, out, err = dry_run(yaml.safe_dump(base).encode())
    assert status == 0 and err.startswith("GiB on the rank")
    check_accepted(out)


# What an accepted recipe must be, written down a second time


def check_accepted(dumped: str) -> None:
    from r1fast.config import dump_recipe, load_recipe

    recipe = yaml.safe_load(dumped)
    Path("saved.yaml").write_text(dumped, encoding="utf-8")
    assert dump_recipe(load_recipe("saved.yaml", [])) == dumped, "the saved recipe is another one"
    _check_scalars(recipe)
    names = [stage["name"] for stage in recipe["stages"]]
    assert len({name.lower() for name in names}) == len(names) > 0
    earlier: dict[str, dict[str, Any]] = {}
    for stage in recipe["stages"]:
        assert re.fullmatch(r"\w[\w.-]{0,199}", stage["name"], re.ASCII) and not OWN_FILES.match(stage["name"])
        assert 0 <= (recipe["seed"] if stage["seed"] is None else stage["seed"]) < 2**63
        _check_references(recipe, stage, earlier)
        _check_options(stage)
        if stage["kind"] == "pretrain":
            _check_architecture(stage)
        earlier[stage["name"]] = stage


def _check_scalars(node: Any) -> None:
    if isinstance(node, dict):
        assert all(isinstance(key, str) for key in node)
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _check_scalars(child)
    assert not isinstance(node, float) or math.isfinite(node)
    assert not isinstance(node, int) or -(2**63) <= node < 2**64
    assert not isinstance(node, str) or not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff]", node)


def _check_references(recipe: dict[str, Any], stage: dict[str, Any], earlier: dict[str, Any]) -> None:
    few_shot = stage.get("few_shot") or {}
    models = [stage.get("teacher"), stage.get("tokenizer"), few_shot.get("model")]
    if stage["kind"] != "pretrain":
        models.append(stage["model"] or recipe["model"]["path"])
        assert models[-1]
    files = [*stage.get("train_files", []), *stage.get("eval_files", []), *few_shot.get("examples_files", [])]
    scores = [spec["model"] for spec in stage.get("reward_models", {}).values()]
    for wanted, refs in (("model", models), ("data", files), ("score", scores)):
        for ref in refs:
            if ref is not None and ref.startswith("@"):
                assert wanted in MAKES[earlier[ref[1:]]["kind"]].split()
            elif wanted == "data":
                assert Path(ref).exists() or ref.startswith("task:")
            elif ref is not None:
                found = in_package(ref) if ref.startswith(PACKAGE) else Path(ref)
                assert found.is_file() if found.suffix == SUFFIX else (found / "config.json").is_file()


POSITIVE = """
max_prompt_length max_completion_length max_tokens_per_microbatch save_steps batch_size max_steps max_length
num_train_epochs num_samples num_prompts max_per_prompt eval_num_samples eval_limit num_generations prompts_per_step
steps_per_generation num_iterations log_completions_steps limit vocab_size partial_rollout_length ref_model_sync_steps
overlong_buffer_length
""".split()  # noqa: SIM905
NUMBERS = """
learning_rate warmup_steps min_lr_ratio decay_ratio weight_decay adam_beta1 adam_beta2 max_grad_norm beta
epsilon epsilon_high delta temperature eval_temperature overlong_penalty center_rewards_coefficient eval_fraction
router_bias_update_rate router_aux_loss_coef""".split()  # noqa: SIM905
FLAGS = """
eval_greedy eval_before prefill_think mask_prompt mask_truncated_completions router_replay
skip_zero_variance_groups""".split()  # noqa: SIM905


def _check_options(stage: dict[str, Any]) -> None:
    for name, value in stage.items():
        if name in POSITIVE and value is not None:
            assert type(value) is int and 0 < value < 2**31, name
        if name in NUMBERS and value is not None:
            assert type(value) in (int, float) and 0 <= value <= 1e18, name
        if name in FLAGS:
            assert type(value) is bool, name
    assert "train_files" not in stage or stage["train_files"]
    assert stage["kind"] != "evaluate" or stage["eval_files"]
    if stage.get("max_steps") is not None and "warmup_steps" in stage:
        updates = stage["max_steps"] * stage.get("steps_per_generation", 1) * stage.get("num_iterations", 1)
        assert stage["warmup_steps"] <= updates
    if stage["kind"] == "grpo":
        weights = [w if isinstance(w, float) else w["weight"] for w in stage["rewards"].values()]
        weights += [spec["weight"] for spec in stage["reward_models"].values()]
        assert any(weights) and not set(stage["rewards"]) & set(stage["reward_models"])
        assert stage["num_generations"] >= 2 and stage["learning_rate"] > 0
        assert (stage["num_generations"] * stage["prompts_per_step"]) % stage["steps_per_generation"] == 0
        assert not stage["domain_weights"] or sum(stage["domain_weights"].values()) > 0


def _check_architecture(stage: dict[str, Any]) -> None:
    """A decoder can be built of it; a small one runs."""
    import torch

    from r1fast.models.decoder import Decoder
    from r1fast.models.model_config import ModelConfig

    config = ModelConfig.from_dict({"vocab_size": stage["vocab_size"], **stage["architecture"]})
    assert max(stage["max_length"], 1) <= config.max_position_embeddings
    if config.num_hidden_layers > 8 or config.n_routed_experts > 64:
        return
    with torch.device("meta"):
        decoder = Decoder(config)
    if sum(parameter.numel() for parameter in decoder.parameters()) < 1_000_000:
        decoder = Decoder(config)
        decoder.init_weights(torch.Generator().manual_seed(0))
        logits_TV = decoder(torch.arange(5) % config.vocab_size, torch.tensor([0, 2, 5], dtype=torch.int32))
        assert logits_TV.shape == (5, config.vocab_size) and bool(logits_TV.isfinite().all())
        assert type(config.to_hf()).model_type == config.model_type
