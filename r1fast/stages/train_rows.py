"""Which rows of train_files are trained on: none that a test has too (`decontaminate`), each once (`deduplicate`)."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from r1fast.data.overlap import contaminated, near_duplicates
from r1fast.data.rows import location, parts_of, texts_of
from r1fast.schema_options import TrainFilesOptions
from r1fast.schema_types import RowKind

LEFT_OUT = "left_out.jsonl"
_REASONS = {"contaminated": "contaminated", "near_duplicate": "repeated"}


def tested_key(stage: TrainFilesOptions) -> str | None:
    """The option that names the prompts which rows are compared with; None: with none."""
    if stage.decontaminate is None:
        return None
    return "decontaminate.files" if stage.decontaminate.files else "eval_files"


def choose_rows(
    stage: TrainFilesOptions, kind: RowKind, rows: Sequence[dict], tested: Sequence[dict]
) -> tuple[list[dict], list[dict[str, str]]]:
    """The rows to train on, in their order, and of each other {where, reason, because, text}.

    tested: prompts, of which none may be trained on; of chats, their own and those of rows, the user's turns count.
    Near duplicates are judged by all that the stage reads of a row, and the first one stays.
    """
    left_out: dict[int, dict[str, str]] = {}
    places = [location(row, index) for index, row in enumerate(rows)]
    if stage.decontaminate is not None:
        asked = [_asked(parts_of(row, kind)) for row in rows]
        known = [_asked([row["prompt"]]) for row in tested]
        for index, because in contaminated(asked, known, stage.decontaminate.ngram).items():
            left_out[index] = {"reason": "contaminated", "because": because, "text": asked[index]}
    if stage.deduplicate is not None:
        rest = [index for index in range(len(rows)) if index not in left_out]
        texts = ["\n".join(text for part in parts_of(rows[index], kind) for text in texts_of(part)) for index in rest]
        for place, other in near_duplicates(texts, stage.deduplicate.threshold).items():
            because = places[rest[other]]
            left_out[rest[place]] = {"reason": "near_duplicate", "because": because, "text": texts[place]}
    kept = [row for index, row in enumerate(rows) if index not in left_out]
    return kept, [{"where": places[index], **left_out[index]} for index in sorted(left_out)]


def counts_of(left_out: Sequence[dict[str, str]]) -> dict[str, int]:
    return dict(Counter(row["reason"] for row in left_out))


def describe(left_out: Sequence[dict[str, str]], num_rows: int) -> str:
    """In one line, with the first of each kind."""
    parts = []
    for reason, count in counts_of(left_out).items():
        first = next(row for row in left_out if row["reason"] == reason)
        because = f"{first['because'][:80]!r} is in a test" if reason == "contaminated" else f"of {first['because']}"
        parts.append(f"{count} {_REASONS[reason]} (the first: {first['where']}, {because})")
    return f"train_files: {len(left_out)} of {num_rows} rows are left out: {'; '.join(parts)}"


def nothing_left(left_out: Sequence[dict[str, str]], num_rows: int) -> str:
    """What to do where no row stays."""
    advice = "raise decontaminate.ngram if that is an instruction around every question, or take another file"
    return f"{describe(left_out, num_rows)}; no row is left: {advice}"


def _asked(parts: Sequence[Any]) -> str:
    """A prompt without what systems say, which many have in common; plain text is its own."""
    prompt = parts[0] if parts[0] is not None else parts[1]
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return "\n".join(turn["content"] for turn in turns if turn["role"] == "user")
