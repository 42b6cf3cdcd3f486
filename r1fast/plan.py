"""What a run will do, for `--dry-run`: rows, steps, tokens, evaluations and checkpoints of each stage.

Counts are exact where files say them, and bounds where completions are still to be sampled: no completion is longer
than max_completion_length. Rows that an earlier stage makes are not known before, nor what depends on them. How long it
takes is not said: that is a matter of the machine, and of how long answers become, which no file tells.
"""

from collections.abc import Iterator, Sequence

from r1fast.lengths import Lengths
from r1fast.schema import CollectStage, DistillStage, GRPOStage, Recipe, RewardModelStage
from r1fast.schema_options import (
    EpochOptions,
    EvalOptions,
    FitOptions,
    SampleOptions,
    StageBase,
    TrainOptions,
    ValidationOptions,
)


def plan_lines(recipe: Recipe, stages: Sequence[str], lengths: Lengths, num_ranks: int) -> list[str]:
    """A few lines for each of these stages."""
    lines = []
    for stage in recipe.stages:
        if stage.name in stages:
            lines.append(f"{stage.name} ({stage.kind})")
            lines += [f"  {what:12} {said}" for what, said in _of_stage(stage, lengths, num_ranks)]
    return lines


def _of_stage(stage: StageBase, lengths: Lengths, num_ranks: int) -> Iterator[tuple[str, str]]:
    rows: int | None = None
    for key in ("train_files", "eval_files"):
        if files := lengths.files(stage, key):
            yield key, ", ".join(f"{ref} {_number(count, 'row')}" for ref, count in files.items())
            if key == "train_files":
                rows = None if None in files.values() else lengths.num_rows(stage, key)
                if rows is not None and (left_out := sum(count or 0 for count in files.values()) - rows):
                    yield "left_out", f"{_number(left_out, 'row')} of train_files (decontaminate, deduplicate)"
    if isinstance(stage, SampleOptions) and (not isinstance(stage, DistillStage) or stage.teacher is not None):
        yield "samples", _sampled(stage, rows)
        rows = None  # of those that are kept
    steps: int | None = None
    if isinstance(stage, GRPOStage):
        steps = stage.max_steps if rows is None else stage.steps_on(rows)
        yield from _of_grpo(stage, steps, rows, lengths)
    elif isinstance(stage, FitOptions):
        steps = stage.num_updates() if rows is None else _updates_on(stage, rows)
        yield from _of_fit(stage, steps, rows, lengths, num_ranks)
    if isinstance(stage, EvalOptions) and stage.eval_files:
        yield "evaluations", _evaluated(stage, steps, lengths)
    if isinstance(stage, TrainOptions) and steps is not None:
        saved = -(-steps // stage.save_steps)
        kept = min(saved, stage.save_total_limit)
        yield "checkpoints", f"{saved:,}, of which {kept:,} stay (every {stage.save_steps:,} steps, and the last)"


def _of_grpo(stage: GRPOStage, steps: int | None, rows: int | None, lengths: Lengths) -> Iterator[tuple[str, str]]:
    samples = stage.prompts_per_step * stage.num_generations
    said = f"{_steps(steps)} of {_number(stage.prompts_per_step, 'prompt')} x {stage.num_generations:,} samples"
    if steps is not None:
        said += f" = {_number(steps * stage.updates_per_step, 'optimizer step')}"
        if rows is not None:
            said += f"; {_passes(steps * stage.prompts_per_step, rows)} of {_number(rows, 'prompt')}"
    yield "steps", said
    longest = lengths.prompt(stage, ["train_files"])
    said = f"at most {samples * (longest + stage.max_completion_length):,} a step"
    if steps is not None:
        rounds = 1 + stage.dynamic_sampling_refills
        said += f"; at most {steps * rounds * samples * stage.max_completion_length:,} are sampled"
    yield "tokens", f"{said} (prompts of up to {longest:,}, completions of up to {stage.max_completion_length:,})"


def _of_fit(
    stage: FitOptions, steps: int | None, rows: int | None, lengths: Lengths, num_ranks: int
) -> Iterator[tuple[str, str]]:
    held_out = isinstance(stage, RewardModelStage) and stage.eval_fraction > 0 and steps is not None
    said = f"{'at most ' if held_out else ''}{_steps(steps)} of {_number(stage.batch_size, 'row')}"
    if steps is not None and rows is not None:
        whole, rest = divmod(steps, -(-rows // stage.batch_size))  # the last step of a pass takes what is left
        said += f"; {_passes(whole * rows + rest * stage.batch_size, rows)} of {_number(rows, 'row')}"
    elif isinstance(stage, EpochOptions):
        said += f"; {stage.num_train_epochs:,} passes, over rows that are still to be made"
    yield "steps", said
    yield "tokens", f"at most {lengths.batches(stage, num_ranks)[2]:,} a step"


def _updates_on(stage: FitOptions, rows: int) -> int | None:
    return stage.updates_on(rows) if isinstance(stage, EpochOptions) else stage.num_updates()


def _sampled(stage: SampleOptions, rows: int | None) -> str:
    few_shot = stage.few_shot if isinstance(stage, CollectStage) else None
    parts = [(stage.num_prompts, stage.num_samples)]
    if few_shot is not None:
        parts.append((few_shot.num_prompts, few_shot.num_samples))
    said, total = [], 0
    for most, each in parts:
        prompts = most if rows is None else min(rows, most or rows)
        if prompts is None:
            said.append(f"{each:,} of each prompt")
        else:
            said.append(f"{prompts * each:,} of {prompts:,} prompts")
            total += prompts * each
    tokens = f", at most {total * stage.max_completion_length:,} tokens" if total else ""
    return f"{' and, after worked examples, '.join(said)}{tokens}"


def _evaluated(stage: EvalOptions, steps: int | None, lengths: Lengths) -> str:
    """Each of so many completions; the one before may have been made by the stage before."""
    counts = list(lengths.files(stage, "eval_files").values())
    rows = None if None in counts else sum(count or 0 for count in counts)
    rows = stage.eval_limit if rows is None else min(rows, stage.eval_limit or rows)
    each = stage.eval_num_samples + stage.eval_greedy
    number = 1 + (isinstance(stage, TrainOptions) and stage.eval_before and stage.kind != "pretrain")
    said = f"{number} of {_number(rows, 'prompt')}"
    completions = None if rows is None else number * rows * each
    if isinstance(stage, ValidationOptions) and stage.eval_steps is not None and steps is not None:
        under_way, limit = steps // stage.eval_steps, stage.eval_steps_limit
        part = rows if limit is None else limit if rows is None else min(rows, limit)
        said += f" and {under_way:,} under way of {_number(part, 'prompt')}"
        completions = None if completions is None or part is None else completions + under_way * part * each
    said += f", {_number(each, 'completion')} each"
    return said if completions is None else f"{said}, at most {completions * stage.max_completion_length:,} tokens"


def _steps(steps: int | None) -> str:
    return "steps" if steps is None else _number(steps, "step")


def _passes(taken: int, rows: int) -> str:
    return f"{taken / rows:.2f} passes" if rows else "no pass"


def _number(count: int | None, what: str) -> str:
    """ "1 row", "2 rows", or that it is not known yet."""
    return f"{what}s still to be made" if count is None else f"{count:,} {what}{'' if count == 1 else 's'}"
