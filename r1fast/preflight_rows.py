"""What is checked of rows before any work: they render and fit, and hold what the stage's settings ask of them."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from r1fast.config import ConfigError
from r1fast.data.rows import Row, location, prompt_and_target, shown, texts_of
from r1fast.preflight_architecture import architecture_of, checkpoint_of
from r1fast.schema import Recipe, RewardSpec

GOLD_TIMEOUT_S = 10.0  # for 64 of them
MAX_GOLDS = 500  # different ones that are tried, formulas among them at some milliseconds each
SAMPLING_KINDS = ("collect", "reject", "distill")  # keep samples that are right and in the row's language

Rows = Sequence[dict]


@cache
def tokenizer_of(ref: str) -> Any:
    from r1fast.models.weights import load_tokenizer

    return load_tokenizer(ref)


# Texts


def text_problems(recipe: Recipe, stage: Any, key: str, kind: str, rows: Rows) -> Iterator[str]:
    """Rows that the template or the tokenizer cannot take, or too long; without a tokenizer before the run, less."""
    from r1fast.stages.packed import of_rows, render_prompts

    if key.startswith("few_shot."):
        return
    ref = getattr(stage, "tokenizer", None) if stage.kind == "pretrain" else stage.model or recipe.model.path
    if key == "train_files" and kind == "prompts":
        ref = getattr(stage, "teacher", None) or ref
    tokenizer = tokenizer_of(ref) if ref is not None and not ref.startswith("@") else None
    try:
        if getattr(stage, "few_shot", None):
            few_shot = stage.model_copy(update={"prompt_template": "few_shot", "response_format": "special_token"})
            of_rows(rows, lambda part: render_prompts([row["prompt"] for row in part], None, few_shot))
        if tokenizer is not None:
            yield from _encoding_problems(recipe, stage, key, kind, rows, tokenizer, ref)
        elif stage.prompt_template != "tokenizer":
            of_rows(rows, lambda part: render_prompts(_prompts(part, kind), None, stage))
    except ConfigError as error:
        yield f"{key}: {str(error).removeprefix(f'stages.{stage.name}: ')}"


def _read(row: dict, kind: str) -> list[Any]:
    """What is encoded of a row, the prompt first (None: plain text without one). Other columns may hold anything."""
    if kind == "sft":
        return list(prompt_and_target(row))
    others = {"prompts": (), "pairs": ("chosen", "rejected"), "labels": ("response",)}[kind]
    return [row[name] for name in ("prompt", *others)]


def _prompts(rows: Rows, kind: str) -> list[Any]:
    return [prompt for prompt, *_ in (_read(row, kind) for row in rows) if prompt is not None]


def _encoding_problems(
    recipe: Recipe, stage: Any, key: str, kind: str, rows: Rows, tokenizer: Any, ref: Any
) -> Iterator[str]:
    from r1fast.stages.packed import check_lengths, encode_examples, encode_row_prompts

    if kind != "prompts" and tokenizer.eos_token_id is None:
        yield f"{key}: the tokenizer of {ref} has no EOS token, which every answer ends with; set eos_token in it"
        return
    vocabulary = tokenizer.get_vocab()
    limit = stage.max_prompt_length if kind == "prompts" else stage.max_length
    # Encoding a file of one line takes minutes. Normalisation may shorten a text, hence the factor.
    _refuse_endless(rows, kind, 4 * limit * max(map(len, vocabulary)), limit)
    model = architecture_of(recipe, stage) if stage.kind == "pretrain" else checkpoint_of(ref)[0]
    if model is None:
        return  # its own stage reports it
    if kind == "prompts":
        prompts = [ids for ids, _ in encode_row_prompts(rows, tokenizer, stage)]
        yield from _prompt_lengths(stage, key, rows, prompts, model.max_position_embeddings)
        encoded = [[ids] for ids in prompts]
    else:
        if kind == "sft":
            mask = getattr(stage, "mask_prompt", True)
            units = [[example] for example in encode_examples(rows, tokenizer, stage, mask_prompt=mask)]
        else:
            from r1fast.stages.reward_model import encode_units

            units = encode_units(rows, tokenizer, stage)
        check_lengths(units, rows, stage)
        encoded = [[ids for example in unit for ids in (example.prompt_ids, example.completion_ids)] for unit in units]
    size = model.vocab_size
    if max(vocabulary.values()) >= size:
        for i, lists in enumerate(encoded):
            if (largest := max(max(ids, default=0) for ids in lists)) >= size:
                yield (
                    f"{key}: {location(rows[i], i)}: token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) is "
                    f"beyond the {size} entries of the model's vocabulary; use the tokenizer that it was trained with"
                )
                return


def _refuse_endless(rows: Rows, kind: str, most: int, limit: int) -> None:
    for i, row in enumerate(rows):
        size = max(sum(map(len, texts_of(value))) for value in _read(row, kind))
        if size > most:
            raise ConfigError(
                f"{location(row, i)}: a text of {size} characters cannot be {limit} tokens or less; shorten the row"
            )


def _prompt_lengths(stage: Any, key: str, rows: Rows, prompts: list[list[int]], positions: int) -> Iterator[str]:
    for i, ids in enumerate(prompts):
        if len(ids) > stage.max_prompt_length:
            problem = f"more than max_prompt_length = {stage.max_prompt_length}"
        elif len(ids) + stage.max_completion_length > positions:
            problem = (
                f"with max_completion_length = {stage.max_completion_length} more than the {positions} positions of "
                "the model (max_position_embeddings)"
            )
        else:
            continue
        yield f"{key}: {location(rows[i], i)} ({str(rows[i]['prompt'])[:60]!r}) has {len(ids)} prompt tokens, {problem}"


# What settings ask of columns


def row_problems(recipe: Recipe, stage: Any, rows_of: dict[str, Rows], notes: list[str]) -> Iterator[str]:
    """Rows that this kind of stage needs, and that are not there. rows_of: not of files that earlier stages write."""
    rows = rows_of.get("train_files")
    if rows is not None:
        if stage.kind == "grpo":
            yield from _domain_weight_problems(stage, rows)
            for name, spec in stage.reward_models.items():
                yield from _domain_problems(f"reward_models.{name}.domains", "train_files", spec.domains, rows)
        yield from _schedule_problems(stage, rows)
        if stage.kind in SAMPLING_KINDS and getattr(stage, "teacher", stage.kind) is not None:
            yield from _sampling_problems(recipe, stage, rows, notes)
    if "few_shot.examples_files" in rows_of:
        yield from _few_shot_problems(stage, rows_of["few_shot.examples_files"], rows or ())


def reward_problems(
    recipe: Recipe, key: str, files: str, specs: dict[str, RewardSpec], rows: Rows, notes: list[str]
) -> Iterator[str]:
    """Rewards that no row is for, or that cannot read what rows hold."""
    for name, spec in specs.items():
        yield from (problems := list(_domain_problems(f"{key}.{name}.domains", files, spec.domains, rows)))
        if problems:
            continue
        chosen = [row for row in rows if not spec.domains or row.get("domain") in spec.domains]
        function = spec.function or name
        given = (spec.model_extra or {}).get("language")
        if function == "language":
            yield from _language_problems(f"{key}.{name}", [Row({"language": given}, key)] if given else chosen)
            if given is None and all(row.get("language") is None for row in chosen):
                yield f"{key}.{name}: no row of {files} has a language; add the column, or take the reward out"
        if function == "accuracy":
            yield from _gold_problems(recipe, f"{key}.{name}", chosen, notes)
            if any(row.get("reasoning_gym") for row in chosen):
                notes.append(
                    f"{key}.{name}: rows of {files} are of reasoning_gym, whose tasks have verifiers of their own; "
                    "use the reward reasoning_gym"
                )


def _domain_weight_problems(stage: Any, rows: Rows) -> Iterator[str]:
    if len(rows) < stage.prompts_per_step:
        yield f"train_files: {len(rows)} prompts, fewer than prompts_per_step = {stage.prompts_per_step}"
    if not stage.domain_weights:
        return
    yield from (problems := list(_domain_problems("domain_weights", "train_files", stage.domain_weights, rows)))
    if not problems:
        for name in sorted({str(row.get("domain")) for row in rows}):
            if name not in stage.domain_weights:
                yield f"domain_weights: rows of train_files have domain {name!r}; give it a weight (0 leaves it out)"


def unrewarded_problems(stage: Any, rows: Rows) -> Iterator[str]:
    """Rows of a domain that no reward is for: nothing can be learned from them."""
    specs = [spec for spec in (*stage.rewards.values(), *stage.reward_models.values()) if not isinstance(spec, float)]
    if len(specs) < len(stage.rewards) + len(stage.reward_models) or not all(spec.domains for spec in specs):
        return  # one is for all
    rewarded = {name for spec in specs for name in spec.domains}
    for name in dict.fromkeys(str(row.get("domain")) for row in rows):
        if name not in rewarded and (not stage.domain_weights or stage.domain_weights.get(name, 0) > 0):
            yield f"rewards: none applies to the rows of train_files with domain {name!r}; name one, or drop the rows"


def _domain_problems(key: str, files: str, names: Sequence[str], rows: Rows) -> Iterator[str]:
    if not names:
        return
    for i, row in enumerate(rows):
        if not isinstance(row.get("domain"), str | None):
            yield f"{files}: {location(row, i)}: column 'domain' is {shown(row['domain'])}, expected a string ({key})"
            return
    domains = {row.get("domain") for row in rows}
    for name in names:
        if name not in domains:
            yield f"{key}: no row of {files} has domain {name!r}; domains: {sorted(map(str, domains))}"


def _schedule_problems(stage: Any, rows: Rows) -> Iterator[str]:
    """Where the rows say how many steps there are. A reward model holds some out, so it may have fewer."""
    if not hasattr(stage, "num_train_epochs") or getattr(stage, "teacher", None) is not None:
        return
    steps = stage.num_train_epochs * -(-len(rows) // stage.batch_size)
    steps = min(steps, getattr(stage, "max_steps", None) or steps)
    if stage.warmup_steps > steps:
        yield f"warmup_steps: {stage.warmup_steps} is more than the {steps} steps that {len(rows)} rows make"


def _sampling_problems(recipe: Recipe, stage: Any, rows: Rows, notes: list[str]) -> Iterator[str]:
    yield from _language_problems("train_files", rows)
    yield from _gold_problems(recipe, "train_files", [row for row in rows if row["answer"] is not None], notes)
    for i, row in enumerate(rows):
        try:
            json.dumps(row)
        except (TypeError, ValueError, RecursionError) as error:
            yield f"train_files: {location(row, i)}: cannot be written to data.jsonl: {error}"
            return


def _language_problems(key: str, rows: Rows) -> Iterator[str]:
    from r1fast.rewards.language import target_scripts

    known: set[str | None] = {None}
    for i, row in enumerate(rows):
        language = row.get("language")
        if not isinstance(language, str | None):
            yield f"{key}: {location(row, i)}: column 'language' is {shown(language)}, expected a code such as 'en'"
            return
        if language in known:
            continue
        try:
            target_scripts(language)  # type: ignore[arg-type]
        except ValueError as error:
            yield f"{key}: {location(row, i)}: {error}"
            return
        known.add(language)


def _few_shot_problems(stage: Any, examples: Rows, rows: Rows) -> Iterator[str]:
    key = "few_shot.examples_files"
    for i, row in enumerate(examples):
        if missing := [name for name in ("reasoning", "answer") if row.get(name) is None]:
            yield f"{key}: {location(row, i)} lacks {' and '.join(missing)}"
        for name in ("prompt", "reasoning", "answer", "language"):
            if not isinstance(row.get(name), str | None):
                yield f"{key}: {location(row, i)}: column {name!r} is {shown(row[name])}, expected a string"
                return
    shown_in = Counter(row.get("language") for row in examples)
    for language in dict.fromkeys(row.get("language") for row in rows):
        if shown_in[language] < stage.few_shot.num_examples:
            yield (
                f"{key}: {shown_in[language]} examples in language {language!r}, expected at least num_examples = "
                f"{stage.few_shot.num_examples}"
            )


# Golds


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
    notes.append(
        f"{key}: accuracy cannot read the answer of {len(wrong)} of {len(rows)} rows{among} and will not score them; "
        f"{first}"
    )


def _spelled(gold: Any) -> str:
    return gold if isinstance(gold, str) else repr(gold)


def _unreadable(golds: dict[str, Any], recipe: Recipe) -> set[str]:
    """The reward is the judge: it gives None for an empty completion exactly where it cannot read the gold."""
    from r1fast.rewards.accuracy import plain_number
    from r1fast.rewards.pool import RewardPool

    unread = {name for name, gold in golds.items() if gold is None}
    # Numbers, most golds of most files, are read without starting a process.
    numbers = {name for name, gold in golds.items() if isinstance(gold, str) and plain_number(gold) is not None}
    asked = [name for name in golds if name not in unread | numbers]
    if asked:
        blank = [""] * len(asked)
        limit_s = min(recipe.reward_workers.timeout_s, GOLD_TIMEOUT_S)
        with RewardPool({"accuracy": 1.0}, timeout_s=limit_s) as pool:
            result = pool.score(blank, blank, [[]] * len(asked), {"answer": [golds[name] for name in asked]})
        # What the limit stopped is not known to be unreadable; the run reports it as a failure.
        nones = np.isnan(result.values["accuracy"]) & ~result.failed
        unread |= {name for name, is_none in zip(asked, nones) if is_none}
    return unread
