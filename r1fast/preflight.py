"""What is checked before any work: the output can be written, data and models can be read and fit, rewards exist.

A mistake found here costs seconds and changes nothing on disk.
"""

import importlib.util
import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from r1fast.config import ConfigError, shown
from r1fast.preflight_architecture import architecture_of, architecture_problems, router_problems, vocabulary_of
from r1fast.recipe_yaml import check_text
from r1fast.schema import Recipe

DATA_KIND = {
    "pretrain": "sft", "sft": "sft", "distill": "sft",
    "grpo": "prompts", "collect": "prompts", "reject": "prompts",
}  # fmt: skip


def check_output(run_dir: Path, *, resume: bool, stages: Sequence[str] = ()) -> None:
    """The run directory is new (or resumed), can be written, and leaves room in a path for what the stages write."""
    _check_path(run_dir, stages)
    if run_dir.exists() and not resume:
        if not run_dir.is_dir():
            raise ConfigError(f"--output-dir {run_dir}: is a file, expected a folder")
        if any(run_dir.iterdir()):
            raise ConfigError(
                f"--output-dir {run_dir}: holds files already; choose another, or continue that run with --resume"
            )
    parent = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"--output-dir {run_dir}: cannot write in {parent} ({error.strerror}); choose another"
        ) from None


def _check_path(run_dir: Path, stages: Sequence[str]) -> None:
    name = shown(str(run_dir))
    longest = max(stages, key=len, default="")
    try:
        check_text(str(run_dir))
        (run_dir / longest / "checkpoints" / "tmp_step_000000" / "manifest.json").lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ConfigError(f"--output-dir {name}: {error.strerror}; choose another") from None
    except ValueError as error:
        raise ConfigError(f"--output-dir {error}") from None


def check_inputs(recipe: Recipe, selected: list[str], run_dir: Path) -> None:
    """Every file, model and reward that the recipe names from outside the run can be used."""
    for name in recipe.report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"report_to: {name} is not installed; pip install {name}, or take it out of report_to")
    if recipe.rollout.engine == "vllm":
        for problem in _vllm_problems(recipe, selected):
            raise ConfigError(problem)
    try:
        for stage in recipe.stages:
            if stage.name in selected:
                for problem in _problems(recipe, stage):
                    raise ConfigError(f"stages.{stage.name}.{' '.join(problem.split())}")  # a library's may have lines
    finally:
        _cache.clear()


def _problems(recipe: Recipe, stage: Any) -> Iterator[str]:
    """What is wrong, the first thing first; a caller that goes on after one may see what follows from it."""
    yield from _model_problems(recipe, stage)
    rows_of: dict[str, list[dict]] = {}  # not of files that earlier stages write
    for key, kind in _file_keys(stage):
        sources = attrgetter(key)(stage)
        outside = [source for source in sources if not source.startswith("@")]
        try:
            rows = _rows(outside, kind)
        except (ValueError, OSError) as error:  # a name that no file system takes, a folder that may not be read
            yield f"{key}: {error}"
            continue
        if len(outside) == len(sources):
            rows_of[key] = rows
        yield from _text_problems(recipe, stage, key, kind, rows)
    yield from _row_problems(stage, rows_of)
    for key, files in (("rewards", "train_files"), ("eval_rewards", "eval_files")):
        rewards = getattr(stage, key, None)
        if rewards and (key == "rewards" or stage.eval_files):
            columns = {name for row in rows_of[files] for name in row} if files in rows_of else None
            try:
                _check_rewards(rewards, columns)
            except ValueError as error:
                yield f"{key}: {error}"


def _vllm_problems(recipe: Recipe, selected: list[str]) -> Iterator[str]:
    from r1fast.rollout.vllm import INSTALL, LOWEST_TEMPERATURE, RolloutError
    from r1fast.rollout.vllm_server import Client, server_problems

    options = recipe.rollout.vllm
    stages = [stage for stage in recipe.stages if stage.name in selected]
    for stage, key in itertools.product(stages, ("temperature", "eval_temperature")):
        if 0 < (value := getattr(stage, key, 0)) < LOWEST_TEMPERATURE:
            yield f"stages.{stage.name}.{key} = {value}: vLLM takes 0 or at least {LOWEST_TEMPERATURE}"
    replays = [stage.name for stage in stages if getattr(stage, "router_replay", False)]
    if options.server_base_url is None or options.weight_transfer == "nccl":
        import torch

        if importlib.util.find_spec("vllm") is None:
            yield f"rollout.engine: vllm is not installed; {INSTALL}, or name a server in rollout.vllm.server_base_url"
        if not torch.cuda.is_available():
            if options.weight_transfer == "nccl":
                yield "rollout.vllm.weight_transfer: nccl needs a CUDA device on both sides; use folder"
            if replays:
                yield f"stages.{replays[0]}.router_replay: vLLM returns no routed experts on a CPU; set it to false"
    if options.server_base_url is not None:
        try:
            client = Client(options.server_base_url, timeout_s=0.0, request_timeout_s=options.server_timeout)
            for problem in server_problems(client, routed_experts=bool(replays)):
                yield f"rollout.vllm.server_base_url: {problem}"
        except RolloutError as error:
            yield f"rollout.vllm.server_base_url: {error}"


def _file_keys(stage: Any) -> Iterator[tuple[str, str]]:
    kind = DATA_KIND.get(stage.kind)
    if stage.kind == "reward_model":
        kind = "pairs" if stage.loss == "pairwise" else "labels"
    if stage.kind == "distill" and stage.teacher:
        kind = "prompts"
    if kind:
        yield "train_files", kind
    if getattr(stage, "eval_files", None):
        yield "eval_files", "prompts"
    if getattr(stage, "few_shot", None):
        yield "few_shot.examples_files", "prompts"


_cache: dict[tuple[tuple[str, ...], str], list[dict]] = {}


def _rows(sources: list[str], kind: str) -> list[dict]:
    from r1fast.data.sources import load_rows

    key = (tuple(sources), kind)
    if key not in _cache:
        _cache[key] = load_rows(sources, kind) if sources else []  # type: ignore[arg-type]
    return _cache[key]


def _model_refs(recipe: Recipe, stage: Any) -> Iterator[tuple[str, str]]:
    if stage.kind != "pretrain":
        yield "model", stage.model or recipe.model.path or ""  # check_references has asked for one
    if getattr(stage, "teacher", None):
        yield "teacher", stage.teacher
    if getattr(stage, "few_shot", None) and stage.few_shot.model:
        yield "few_shot.model", stage.few_shot.model
    for name, spec in getattr(stage, "reward_models", {}).items():
        yield f"reward_models.{name}.model", spec.model


def _model_problems(recipe: Recipe, stage: Any) -> Iterator[str]:
    from r1fast.models.weights import check_checkpoint, load_tokenizer

    for key, ref in _model_refs(recipe, stage):
        if ref.startswith("@"):
            continue
        try:
            _, is_reward_model = check_checkpoint(ref)
        except (ValueError, OSError) as error:
            yield f"{key}: {error}"
            continue
        yield from _tokenizer_problems(key, ref)
        if is_reward_model != key.startswith("reward_models.") and stage.kind != "reward_model":
            kinds = ("a language model", "a reward model (a `score` head)")
            yield f"{key}: {ref} is {kinds[is_reward_model]}, expected {kinds[not is_reward_model]}"
    if stage.kind == "pretrain":
        vocabulary = vocabulary_of(recipe, stage)
        if isinstance(vocabulary, str):
            if problems := list(_tokenizer_problems("tokenizer", vocabulary)):
                yield from problems
                return
            vocabulary = len(load_tokenizer(vocabulary))  # type: ignore[arg-type]
        yield from architecture_problems(stage, vocabulary)
    yield from router_problems(recipe, stage)


def _tokenizer_problems(key: str, ref: str) -> Iterator[str]:
    from r1fast.models.weights import load_tokenizer

    try:
        if load_tokenizer(ref) is None:
            yield f"{key}: {ref} has no tokenizer; expected tokenizer.json in it"
    except Exception as error:  # the tokenizers library raises plain Exception
        yield f"{key}: the tokenizer of {ref} cannot be read ({error}); copy or download it again"


def _check_rewards(rewards: dict[str, Any], columns: set[str] | None) -> None:
    from r1fast.rewards.pool import RewardPool
    from r1fast.stages.scoring import pool_arguments, reward_specs

    for arguments in pool_arguments(reward_specs(rewards)).values():
        with RewardPool(arguments) as pool:
            pool.check(columns)


def _text_problems(recipe: Recipe, stage: Any, key: str, kind: str, rows: list[dict]) -> Iterator[str]:
    """Prompts that the template cannot render; and too long rows, where there is a tokenizer before the run."""
    if key.startswith("few_shot."):
        return
    from r1fast.models.weights import check_checkpoint, load_tokenizer
    from r1fast.stages.batch import check_lengths, encode_examples, encode_prompts

    ref = getattr(stage, "tokenizer", None) if stage.kind == "pretrain" else stage.model or recipe.model.path
    if key == "train_files" and kind == "prompts":
        ref = getattr(stage, "teacher", None) or ref
    outside = ref is not None and not ref.startswith("@")
    tokenizer = load_tokenizer(ref) if outside else None  # type: ignore[arg-type]
    unrendered = list(_unrendered(stage, tokenizer, kind, rows))
    if unrendered:
        yield f"{key}: {unrendered[0]}"
    elif tokenizer is not None and kind == "sft":
        examples = encode_examples(rows, tokenizer, stage)
        try:
            check_lengths([[example] for example in examples], rows, stage)
        except ConfigError as error:
            yield f"{key}: {str(error).removeprefix(f'stages.{stage.name}: ')}"
    elif tokenizer is not None and kind == "prompts":
        config = architecture_of(recipe, stage) if stage.kind == "pretrain" else check_checkpoint(ref)[0]  # type: ignore[arg-type]
        limit = config.max_position_embeddings if config is not None else math.inf
        for i, (ids, _) in enumerate(encode_prompts([row["prompt"] for row in rows], tokenizer, stage)):
            row = f"row {i + 1} ({str(rows[i]['prompt'])[:60]!r}) has {len(ids)} prompt tokens"
            if len(ids) > stage.max_prompt_length:
                yield f"{key}: {row}, more than max_prompt_length = {stage.max_prompt_length}"
            elif len(ids) + stage.max_completion_length > limit:
                yield (
                    f"{key}: {row}, with max_completion_length = {stage.max_completion_length} more than the "
                    f"{limit} positions of the model (max_position_embeddings)"
                )


def _unrendered(stage: Any, tokenizer: Any, kind: str, rows: list[dict]) -> Iterator[str]:
    from r1fast.data.templates import render_prompt

    if tokenizer is None and stage.prompt_template == "tokenizer":
        return
    for i, row in enumerate(rows):
        prompt = row["messages"][:-1] if kind == "sft" and row.get("messages") else row.get("prompt")
        if prompt is None:
            continue
        try:
            text = render_prompt(
                prompt, stage.prompt_template, tokenizer=tokenizer, response_format=stage.response_format
            )
        except ValueError as error:
            yield f"row {i + 1}: {error}"
            continue
        if not text and tokenizer is not None and tokenizer.bos_token_id is None:
            yield f"row {i + 1}: the prompt is empty, and the tokenizer has no BOS token; drop the row"


def _row_problems(stage: Any, rows_of: dict[str, list[dict]]) -> Iterator[str]:
    """Rows that this kind of stage needs, and that are not there."""
    rows = rows_of.get("train_files")
    if stage.kind == "grpo" and rows is not None:
        if len(rows) < stage.prompts_per_step:
            yield f"train_files: {len(rows)} prompts, fewer than prompts_per_step = {stage.prompts_per_step}"
        yield from _domain_problems(stage, rows)
    if stage.kind in ("sft", "distill", "reward_model") and not getattr(stage, "teacher", None) and rows is not None:
        updates = stage.num_train_epochs * -(-len(rows) // stage.batch_size)
        if stage.warmup_steps > updates:
            yield (
                f"warmup_steps = {stage.warmup_steps} is longer than the {updates} optimizer steps that {len(rows)} "
                f"rows make in num_train_epochs = {stage.num_train_epochs}"
            )
    eval_rows = rows_of.get("eval_files")
    if eval_rows is not None:
        domains = _domains(eval_rows)
        for name, options in stage.eval_rewards.items():
            yield from _unknown_domains(f"eval_rewards.{name}.domains", options.get("domains", []), domains)
    examples = rows_of.get("few_shot.examples_files")
    if examples is not None:
        for i, row in enumerate(examples):
            if missing := [name for name in ("reasoning", "answer") if row.get(name) is None]:
                yield f"few_shot.examples_files: row {i + 1} lacks {' and '.join(missing)}"
        shown = Counter(row.get("language") for row in examples)
        for language in dict.fromkeys(row.get("language") for row in rows or []):
            if shown[language] < stage.few_shot.num_examples:
                yield (
                    f"few_shot.examples_files: {shown[language]} examples in language {language!r}, expected at least "
                    f"num_examples = {stage.few_shot.num_examples}"
                )


def _domains(rows: list[dict]) -> list[str | None]:
    """What the column `domain` holds."""
    return list(dict.fromkeys(domain if isinstance(domain := row.get("domain"), str) else None for row in rows))


def _unknown_domains(key: str, names: list[str], domains: list[str | None]) -> Iterator[str]:
    for name in names:
        if name not in domains:
            yield f"{key}: no row has domain {name!r}; domains: {', '.join(map(str, domains))}"


def _domain_problems(stage: Any, rows: list[dict]) -> Iterator[str]:
    """Domains that no row has, and rows of a domain that nothing weighs or rewards."""
    for i, row in enumerate(rows):
        if not isinstance(row.get("domain"), (str, type(None))):
            yield f"train_files: row {i + 1}: column 'domain' is {shown(repr(row['domain']))}, expected text"
            return
    domains = _domains(rows)
    yield from _unknown_domains("domain_weights", list(stage.domain_weights), domains)
    for name in domains if stage.domain_weights else ():
        if name not in stage.domain_weights:
            yield f"domain_weights: rows of train_files have domain {name!r}; give it a weight (0 leaves it out)"
    scopes: list[list[str]] = []
    for key, specs in (("rewards", stage.rewards), ("reward_models", stage.reward_models)):
        for name, spec in specs.items():
            scopes.append([] if isinstance(spec, float) else spec.domains)
            yield from _unknown_domains(f"{key}.{name}.domains", scopes[-1], domains)
    for name in domains:
        used = not stage.domain_weights or stage.domain_weights.get(str(name), 0) > 0
        if used and not any(not scope or name in scope for scope in scopes):
            yield f"rewards: none applies to the rows of train_files with domain {name!r}; name one, or drop the rows"
