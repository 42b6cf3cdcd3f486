"""Embedded tasks: data that a model trained from scratch on two CPU cores can learn.

`load("arithmetic", "train")` is what the source `task:arithmetic/train` reads. Splits are by problem, so that a problem
and its commuted twin (`2 + 3 * 4`, `4 * 3 + 2`) are always on the same side:

    train    what the stages learn from
    dev      what settings may be chosen on
    report   what is reported, and nothing else
"""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

from r1fast.data.tasks import arithmetic, chat, corpus

_LOADERS: dict[str, dict[str, Callable[[], list[dict]]]] = {
    "arithmetic": {split: partial(arithmetic.prompts, split) for split in arithmetic.SPLITS}
    | {"examples": arithmetic.examples},
    "chat": {split: partial(chat.prompts, split) for split in chat.SPLITS}
    | {"sft": chat.sft_rows, "pairs": chat.pair_rows, "labels": chat.label_rows},
    "corpus": {"train": corpus.documents},
}


def load(name: str, split: str) -> list[dict]:
    """Rows of the embedded task `name`, split `split`; the same rows in every process and run."""
    splits = _entry(_LOADERS, name, f"unknown task {name!r}", "tasks")
    return _entry(splits, split, f"task {name!r} has no split {split!r}", "splits")()


def _entry(known: dict[str, Any], word: str, problem: str, listed: str) -> Any:
    if word in known:
        return known[word]
    match = get_close_matches(word, known, n=1)
    near = f" (did you mean {match[0]!r}?)" if match else ""
    raise ValueError(f"{problem}{near}; {listed}: {', '.join(known)}")
