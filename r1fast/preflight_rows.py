"""What is checked of rows before any work: they render and fit, and hold what the stage's settings ask of them.

What the stage checks again, of rows that an earlier stage has made, stands beside the stage.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from r1fast import schema
from r1fast import schema_options as options
from r1fast.artifacts import start_model
from r1fast.config import ConfigError
from r1fast.data.rows import Row, location, parts_of, shown, texts_of
from r1fast.data.templates import render_prompt
from r1fast.preflight_models import architecture_of, checkpoint_of, tokenizer_of
from r1fast.rewards.answers import plain_number
from r1fast.rewards.code import read_row
from r1fast.rewards.language import target_scripts
from r1fast.rewards.pool import RewardPool
from r1fast.rewards.sandbox import Sandbox, SandboxError
from r1fast.schema import Recipe
from r1fast.schema_options import StageBase
from r1fast.schema_types import RowKind
from r1fast.stages import packed
from r1fast.stages.collect import few_shot_problems
from r1fast.stages.packed import of_rows, render_prompts
from r1fast.stages.reward_model import encode_units
from r1fast.stages.rollouts import domain_problems, prompt_problems

GOLD_TIMEOUT_S = 10.0  # for 64 of them
MAX_GOLDS = 500  # different ones that are tried, formulas among them at some milliseconds each

Rows = Sequence[dict]


def text_problems(recipe: Recipe, stage: StageBase, key: str, kind: RowKind, rows: Rows) -> Iterator[str]:
    """Rows that the template or the tokenizer cannot take, or too long; without a tokenizer before the run, less."""
    assert isinstance(stage, options.GenerateOptions)
    if key.startswith(("few_shot.", "decontaminate.")):
        return
    ref = stage.tokenizer if isinstance(stage, schema.PretrainStage) else start_model(recipe, stage)
    if isinstance(stage, schema.DistillStage) and key == "train_files":
        ref = stage.teacher or ref
    try:
        if isinstance(stage, schema.CollectStage) and stage.few_shot is not None:
            of_rows(rows, lambda part: [render_prompt(row["prompt"], "few_shot") for row in part])
        if ref is not None and not ref.startswith("@"):
            yield from _encoding_problems(recipe, stage, key, kind, rows, ref)
        elif stage.prompt_template != "tokenizer":
            of_rows(rows, lambda part: _render(part, kind, stage))
    except ConfigError as error:
        yield f"{key}: {error}"


def _render(rows: Rows, kind: RowKind, stage: options.GenerateOptions) -> list[str]:
    prompts = [(prompt, row.get("tools")) for row, (prompt, *_) in ((row, parts_of(row, kind)) for row in rows)]
    asked = [(prompt, tools) for prompt, tools in prompts if prompt is not None]
    return render_prompts([prompt for prompt, _ in asked], None, stage, tools=[tools for _, tools in asked])


def _encoding_problems(
    recipe: Recipe, stage: options.GenerateOptions, key: str, kind: RowKind, rows: Rows, ref: str
) -> Iterator[str]:
    tokenizer = tokenizer_of(ref)
    model = architecture_of(recipe, stage) if isinstance(stage, schema.PretrainStage) else checkpoint_of(ref)[0]
    if tokenizer is None or model is None:
        return  # reported with the model
    if kind != "prompts" and tokenizer.eos_token_id is None:
        yield f"{key}: the tokenizer of {ref} has no EOS token, which every answer ends with; set eos_token in it"
        return
    vocabulary = tokenizer.get_vocab()
    limit = stage.max_length if kind != "prompts" and isinstance(stage, options.FitOptions) else stage.max_prompt_length
    # Encoding a file of one line takes minutes. Normalisation may shorten a text, hence the factor.
    most = 4 * limit * max(map(len, vocabulary))
    for i, row in enumerate(rows):
        if (size := max(sum(map(len, texts_of(value))) for value in parts_of(row, kind))) > most:
            text = f"a text of {size} characters cannot be {limit} tokens or less"
            raise ConfigError(f"{location(row, i)}: {text}; shorten the row")
    if kind == "prompts":
        prompts = [ids for ids, _ in packed.encode_prompts(rows, tokenizer, stage)]
        problems = packed.prompt_length_problems(prompts, rows, stage, model.max_position_embeddings)
        encoded = [[ids] for ids in prompts]
    else:
        assert isinstance(stage, options.FitOptions)
        if isinstance(stage, schema.RewardModelStage):
            units = encode_units(rows, tokenizer, stage)
        else:
            units = [[example] for example in packed.encode_examples(rows, tokenizer, stage)]
        problems = packed.length_problems(units, rows, stage)
        encoded = [[ids for example in unit for ids in (example.prompt_ids, example.completion_ids)] for unit in units]
    yield from (f"{key}: {problem}" for problem in problems)
    if max(vocabulary.values()) < model.vocab_size:
        return
    for i, lists in enumerate(encoded):
        if (largest := max(max(ids, default=0) for ids in lists)) >= model.vocab_size:
            token = f"token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r})"
            beyond = f"is beyond the {model.vocab_size} entries of the model's vocabulary"
            yield f"{key}: {location(rows[i], i)}: {token} {beyond}; use the tokenizer that it was trained with"
            return


def row_problems(recipe: Recipe, stage: StageBase, rows_of: Mapping[str, Rows], notes: list[str]) -> Iterator[str]:
    """Rows that this kind of stage needs, and that are not there. rows_of: not of files that earlier stages write."""
    rows = rows_of.get("train_files")
    if rows is not None:
        if isinstance(stage, schema.GRPOStage):
            yield from prompt_problems(stage, rows)
            steps = stage.steps_on(len(rows))
            yield from _step_problems(stage, steps, steps * stage.updates_per_step, len(rows))
        if isinstance(stage, options.SampleOptions) and "data" in stage.makes:
            yield from _sampling_problems(recipe, stage, rows, notes)
        elif isinstance(stage, options.EpochOptions):
            steps = stage.updates_on(len(rows))  # a reward model holds some rows out, so it may have fewer
            yield from _step_problems(stage, steps, steps, len(rows))
    if isinstance(stage, schema.CollectStage) and stage.few_shot and "few_shot.examples_files" in rows_of:
        yield from few_shot_problems(stage.few_shot, rows_of["few_shot.examples_files"], rows or ())


def _step_problems(stage: options.TrainOptions, steps: int, updates: int, num_rows: int) -> Iterator[str]:
    """Options that count steps beyond those that the rows make."""
    for name, most in (("warmup_steps", updates), ("eval_steps", steps)):
        if (value := getattr(stage, name, None) or 0) > most:
            yield f"{name}: {value} is more than the {most} steps that {num_rows} rows make"


def reward_problems(
    recipe: Recipe, key: str, files: str, specs: Mapping[str, options.RewardSpec], rows: Rows, notes: list[str]
) -> Iterator[str]:
    """Rewards that no row is for, or that cannot read what rows hold."""
    for name, spec in specs.items():
        yield from (problems := list(domain_problems(f"{key}.{name}.domains", files, spec.domains, rows)))
        if problems:
            continue
        chosen = [row for row in rows if spec.applies_to(row)]
        given = (spec.model_extra or {}).get("language")
        if spec.function == "language":
            yield from _language_problems(f"{key}.{name}", [Row({"language": given}, key)] if given else chosen)
            if given is None and all(row.get("language") is None for row in chosen):
                yield f"{key}.{name}: no row of {files} has a language; add the column, or take the reward out"
        if spec.function == "code":
            yield from _code_problems(f"{key}.{name}", chosen, notes)
        if spec.function in ("accuracy", "cosine", "length"):
            yield from _gold_problems(recipe, f"{key}.{name}", chosen, notes)
            if any(row.get("reasoning_gym") for row in chosen):
                what = f"rows of {files} are of reasoning_gym, whose tasks have verifiers of their own"
                notes.append(f"{key}.{name}: {what}; use the reward reasoning_gym")


def _sampling_problems(recipe: Recipe, stage: options.SampleOptions, rows: Rows, notes: list[str]) -> Iterator[str]:
    """Samples are kept that are right, in the row's language, and written with the row."""
    yield from _language_problems("train_files", rows)
    if not stage.changed(["rewards"]):  # else reward_problems tells it
        yield from _gold_problems(recipe, "train_files", [row for row in rows if row["answer"] is not None], notes)
    for i, row in enumerate(rows):
        try:
            json.dumps(row)
        except (TypeError, ValueError, RecursionError) as error:
            yield f"train_files: {location(row, i)}: cannot be written to data.jsonl: {error}"
            return


def _language_problems(key: str, rows: Rows) -> Iterator[str]:
    known: set[str] = set()
    for i, row in enumerate(rows):
        language = row.get("language")
        if not isinstance(language, str | None):
            yield f"{key}: {location(row, i)}: column 'language' is {shown(language)}, expected a code such as 'en'"
            return
        if language is None or language in known:
            continue
        try:
            target_scripts(language)
        except ValueError as error:
            yield f"{key}: {location(row, i)}: {error}"
            return
        known.add(language)


def _gold_problems(recipe: Recipe, key: str, rows: Rows, notes: list[str]) -> Iterator[str]:
    """A note on the rows whose gold the accuracy reward cannot read; a problem if there are no others."""
    golds = {_spelled(row.get("answer")): row.get("answer") for row in rows}
    # A domain without any gold, such as chat beside mathematics, is not meant to have one.
    judged_domains = {_spelled(row.get("domain")) for row in rows if row.get("answer") is not None}
    if judged_domains:
        rows = [row for row in rows if row.get("answer") is not None or _spelled(row.get("domain")) in judged_domains]
    tried = dict.fromkeys(list(golds)[:: -(-len(golds) // MAX_GOLDS) or 1])
    unread = _unreadable({name: golds[name] for name in tried}, recipe)
    judged = [row for row in rows if _spelled(row.get("answer")) in tried]
    wrong = [row for row in judged if _spelled(row.get("answer")) in unread]
    if not wrong:
        return
    first = f"the first: {location(wrong[0], 0)}: {shown(wrong[0].get('answer'))}"
    if len(wrong) == len(judged):
        yield f"{key}: accuracy can read the answer of no row, so it would score none; {first}"
        return
    among = "" if len(tried) == len(golds) else f" ({len(tried)} of {len(golds)} different answers were tried)"
    rows_read = f"accuracy cannot read the answer of {len(wrong)} of {len(rows)} rows{among}"
    notes.append(f"{key}: {rows_read} and will not score them; {first}")


def _code_problems(key: str, rows: Rows, notes: list[str]) -> Iterator[str]:
    """The same for rows whose tests the code reward cannot read; and programs must be confined here."""
    wrong = []
    for i, row in enumerate(rows):
        try:
            read_row(row)
        except ValueError as error:
            wrong.append(f"{location(row, i)}: {error}")
    if wrong and len(wrong) == len(rows):
        yield f"{key}: code can read the tests of no row, so it would score none; the first: {wrong[0]}"
    elif wrong:
        what = f"code cannot read the tests of {len(wrong)} of {len(rows)} rows and will not score them"
        notes.append(f"{key}: {what}; the first: {wrong[0]}")
    try:
        Sandbox().close()
    except SandboxError as error:
        yield f"{key}: {error}"


def _spelled(gold: Any) -> str:
    return gold if isinstance(gold, str) else repr(gold)


def _unreadable(golds: dict[str, Any], recipe: Recipe) -> set[str]:
    """The reward is the judge: it gives None for an empty completion exactly where it cannot read the gold."""
    unread = {name for name, gold in golds.items() if gold is None}
    # Numbers, most golds of most files, are read without starting a process.
    numbers = {name for name, gold in golds.items() if isinstance(gold, str) and plain_number(gold) is not None}
    asked = [name for name in golds if name not in unread | numbers]
    if asked:
        blank = [""] * len(asked)
        limit_s = min(recipe.reward_workers.timeout_s, GOLD_TIMEOUT_S)
        with RewardPool({"accuracy": {}}, timeout_s=limit_s) as pool:
            result = pool.score(blank, blank, [[]] * len(asked), {"answer": [golds[name] for name in asked]})
        # What the limit stopped is not known to be unreadable; the run reports it as a failure.
        nones = np.isnan(result.values["accuracy"]) & ~result.failed
        unread |= {name for name, is_none in zip(asked, nones) if is_none}
    return unread
