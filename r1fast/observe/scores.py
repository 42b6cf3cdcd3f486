"""What evaluations say, for page, table and console alike: only scores of one setting stand together, each metric by
its own name.

An evaluation (stages/evaluate.py) is a mapping. `m` is the mean of metric m and `m_ci` the half-width of its 95%
interval; `greedy` and `greedy/m` are of greedy answers. SETTINGS say how it was measured, COUNTS what it is about.
Which metrics there are, the recipe says: whatever else is a number is one.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from r1fast.observe.formats import format_number, format_percent, is_number, plural

Evaluation = Mapping[str, Any]
MEASURES = ("pass@1", "greedy", "pass@k", "cons@k")  # of every evaluation that has golds, in the order shown
# What must be equal for two scores to be compared, and how it is said. `split` names the files.
SETTINGS = {
    "limit": "{} rows of them", "k": "{} samples each", "temperature": "temperature {}", "top_p": "top_p {}",
    "prompt_template": "template {}", "prefill_think": "reasoning opened", "chat_template_kwargs": "chat template's {}",
    "max_completion_length": "at most {} tokens",
}  # fmt: skip
UNSAID: dict[str, Any] = {"top_p": 1.0, "prefill_think": False, "chat_template_kwargs": {}}  # what goes without saying
COUNTS = ("length", "failures", "unscorable")
# Of a step: what a person looks at first, in this order. Names without "/" that are not listed are of the stage or the
# user (a loss's own metrics) and come with the losses.
_BEFORE_OWN = ("reward", "eval/*", "rewards/*/mean", "loss")
_AFTER_OWN = ("kl", "completions/mean_length", "entropy", "learning_rate", "grad_norm")
_LATER = {
    "reward_std", "frac_unscorable", "frac_reward_zero_std", "off_policy_mask_ratio", "num_tokens", "step_time",
    "tokens_per_second", "step", "time",
}  # fmt: skip
_NO_METRICS = {"split", *SETTINGS, *COUNTS, "n", "files", "step", "response_format"}


class Score(NamedTuple):
    """A mean, and half of its 95% interval where that is known."""

    value: float
    half: float | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval; of a share it ends at 0 and 1."""
        half = self.half or 0.0
        low, high = self.value - half, self.value + half
        return (max(0.0, low), min(1.0, high)) if 0 <= self.value <= 1 else (low, high)

    def text(self, is_share: bool) -> str:
        """79.1 ± 4.0, in percent if it is a share of one."""
        write = format_percent if is_share else format_number
        return write(self.value) + (f" ± {write(self.half)}" if self.half is not None else "")

    def minus(self, other: "Score") -> "Score":
        """The difference. Its interval takes the two as independent, which is wide for answers to the same prompts."""
        known = self.half is not None and other.half is not None
        half = math.hypot(self.half or 0.0, other.half or 0.0) if known else None
        return Score(self.value - other.value, half)


def number_of(values: Mapping[str, Any] | None, key: str) -> float | None:
    """One finite number, or None."""
    value = (values or {}).get(key)
    return float(value) if is_number(value) else None


def score_of(evaluation: Evaluation | None, metric: str) -> Score | None:
    """A metric of an evaluation, or None where it has none."""
    value = number_of(evaluation, metric)
    return None if value is None else Score(value, number_of(evaluation, f"{metric}_ci"))


def metrics_of(evaluations: Iterable[Evaluation]) -> list[str]:
    """The names of what was measured: MEASURES, then the rewards, each before its greedy one."""
    found = dict.fromkeys(
        name
        for evaluation in evaluations
        for name, value in evaluation.items()
        if name not in _NO_METRICS and not name.endswith("_ci") and is_number(value)
    )
    rewards = list(dict.fromkeys(name.removeprefix("greedy/") for name in found if name not in MEASURES))
    ordered = [*MEASURES, *(name for reward in rewards for name in (reward, f"greedy/{reward}"))]
    return [name for name in ordered if name in found]


def losses(evaluation: Evaluation | None) -> list[str]:
    """What stands beside the scores of an evaluation: how much of it is not the model's doing. Empty: nothing."""
    named = (
        ("failures", "sample", "with a failed reward (scored 0)"),
        ("unscorable", "prompt", "without a readable gold"),
    )
    counts = [(int(number_of(evaluation, key) or 0), noun, words) for key, noun, words in named]
    return [f"{plural(count, noun)} {words}" for count, noun, words in counts if count]


def first_of_step(names: Iterable[str]) -> list[str]:
    """The metrics of a step to see first, in order."""
    names = list(names)

    def matching(forms: Iterable[str]) -> list[str]:
        return [name for form in forms for name in names if fnmatchcase(name, form)]

    first, last = matching(_BEFORE_OWN), matching(_AFTER_OWN)
    own = [name for name in names if "/" not in name and name not in _LATER and name not in (*first, *last)]
    return [*first, *own, *last]


def by_file(evaluation: Evaluation) -> Iterator[Evaluation]:
    """The evaluation, or of several files that of each by itself: what they have in common is of none of them."""
    files = evaluation.get("files")
    if not isinstance(files, Mapping) or not files:
        yield evaluation
        return
    how = {key: value for key, value in evaluation.items() if key in _NO_METRICS - {"files", "n", *COUNTS}}
    for file, part in files.items():
        if isinstance(part, Mapping):
            limited = {"limit": f"{how['limit']} of {evaluation.get('split')}"} if how.get("limit") else {}
            yield {**how, **limited, **part, "split": str(file)}


def setting_of(evaluation: Evaluation) -> tuple[str, ...]:
    """Equal for evaluations that may be compared."""
    return (str(evaluation.get("split")), *(str(evaluation.get(key, UNSAID.get(key))) for key in SETTINGS))


@dataclass
class ScoreGroup:
    """Evaluations of one setting, by the name of the model."""

    rows: dict[str, Evaluation] = field(default_factory=dict)

    @property
    def files(self) -> str:
        return str(next(iter(self.rows.values())).get("split") or "held-out rows")

    @property
    def how(self) -> str:
        """The setting, in words."""
        first = next(iter(self.rows.values()))
        numbers = {number_of(evaluation, "n") for evaluation in self.rows.values()} - {None}
        parts = [plural(int(count), "prompt") for count in numbers if len(numbers) == 1 and count is not None]
        for key, form in SETTINGS.items():
            value = first.get(key)
            if value is not None and value != UNSAID.get(key):
                parts.append(form.format(format_number(value) if is_number(value) else value))
        return ", ".join(parts)

    @property
    def formats(self) -> str:
        """Which answers were read in which form, where that differs: each model is asked as it was taught."""
        by_format: dict[str, list[str]] = {}
        for name, evaluation in self.rows.items():
            if form := evaluation.get("response_format"):
                by_format.setdefault(str(form), []).append(name)
        return "; ".join(f"{form}: {', '.join(names)}" for form, names in by_format.items() if len(by_format) > 1)

    @property
    def metrics(self) -> list[str]:
        return metrics_of(self.rows.values())

    def scores(self, metric: str) -> dict[str, Score]:
        """By model, of those that have it."""
        found = {name: score_of(evaluation, metric) for name, evaluation in self.rows.items()}
        return {name: score for name, score in found.items() if score is not None}

    def is_share(self, metric: str) -> bool:
        return are_shares(self.scores(metric).values())


def are_shares(scores: Iterable[Score]) -> bool:
    """Whether values may be written in percent: a reward may also be a count, or a punishment."""
    return all(0 <= score.value <= 1 for score in scores)


def group_scores(entries: Iterable[tuple[str, Evaluation | None]]) -> list[ScoreGroup]:
    """(model, evaluation) in the chain's order -> one group per setting; of a model measured twice the first counts."""
    groups: dict[tuple[str, ...], ScoreGroup] = {}
    for name, evaluation in entries:
        for part in by_file(evaluation or {}):
            if metrics_of([part]):
                groups.setdefault(setting_of(part), ScoreGroup()).rows.setdefault(name, part)
    return list(groups.values())


def entries_of(stages: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Evaluation | None]]:
    """The evaluations of stages as summary.json has them; a model from outside comes before its first use."""
    for stage in stages:
        yield str(stage.get("model") or f"before {stage['name']}"), stage.get("eval_before")
        yield str(stage["name"]), stage.get("eval_after")


def outcome(numbers: Mapping[str, Any]) -> list[str]:
    """What stages that are not evaluated came to: rows kept of those sampled, what held-out rows say."""
    parts = []
    kept, dropped = number_of(numbers, "kept"), numbers.get("dropped")
    if kept is not None:
        left_out = dropped.values() if isinstance(dropped, Mapping) else ()
        sampled = kept + sum(int(count) for count in left_out if is_number(count))
        of = f" of {int(sampled):,} ({format_percent(kept / sampled)}%)" if sampled else ""
        parts.append(f"kept {int(kept):,}{of}")
    for name in metrics_of([{key: value for key, value in numbers.items() if key.startswith("held_out_")}]):
        score = score_of(numbers, name)
        if score is not None and name != "held_out_rows":
            is_share = are_shares([score])
            words = name.removeprefix("held_out_").replace("_", " ")
            parts.append(f"held-out {words} {score.text(is_share)}{'%' * is_share}")
    return parts


def said(evaluation: Evaluation) -> list[str]:
    """A line for each file: its metrics by name, in percent where all are shares of one."""
    parts = list(by_file(evaluation))
    lines = []
    for part in parts:
        found = {name: score for name in metrics_of([part]) if (score := score_of(part, name)) is not None}
        texts = [f"{name} {score.text(are_shares([score]))}" for name, score in found.items()]
        if texts:
            lines.append((f"{part.get('split')}: " if len(parts) > 1 else "") + "  ".join(texts))
    return lines
