"""Embedded tasks: data that a model trained from scratch on two CPU cores, or a small pretrained one, can learn.

`load("arithmetic", "train")` is what the source `task:arithmetic/train` reads. Splits are by problem, so that a problem
and its commuted twin (`2 + 3 * 4`, `4 * 3 + 2`) are always on the same side:

    train    what the stages learn from
    dev      what settings may be chosen on
    report   what is reported, and nothing else
"""

from collections.abc import Callable
from functools import partial

from r1fast.data.tasks import arithmetic, chat, corpus, word_problems
from r1fast.wording import did_you_mean

_LOADERS: dict[str, dict[str, Callable[[], list[dict]]]] = {
    "arithmetic": {split: partial(arithmetic.prompts, split) for split in arithmetic.SPLITS}
    | {"examples": arithmetic.examples},
    "chat": {split: partial(chat.prompts, split) for split in chat.SPLITS}
    | {"sft": chat.sft_rows, "pairs": chat.pair_rows, "labels": chat.label_rows},
    "corpus": {"train": corpus.documents},
    "word_problems": {split: partial(word_problems.prompts, split) for split in word_problems.SPLITS}
    | {"cold": word_problems.cold_rows},
}


def load(name: str, split: str) -> list[dict]:
    """Rows of the embedded task `name`, split `split`; the same rows in every process and run."""
    if name not in _LOADERS:
        raise ValueError(f"unknown task {name!r}; tasks: {', '.join(_LOADERS)}{did_you_mean(name, _LOADERS)}")
    splits = _LOADERS[name]
    if split not in splits:
        hint = did_you_mean(split, splits)
        raise ValueError(f"task {name!r} has no split {split!r}; splits: {', '.join(splits)}{hint}")
    return splits[split]()
