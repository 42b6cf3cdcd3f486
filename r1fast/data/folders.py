"""Which files of a folder are data, and of which split, as the library datasets has it.

    data/train-00000-of-00002.parquet           shards of the Hub: nothing else in the folder is read
    train.jsonl  test.jsonl  or  train/a.jsonl  a split by the name of its files or folders
    main/train.jsonl  socratic/train.jsonl      several data sets: main and socratic are to be named
    a.jsonl  b.parquet                          no splits
Files in the folder itself come before those of folders in it, which are read where there are no others.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

_SHARD = re.compile(r"(?P<split>[\w.-]+)-[0-9]{5}-of-[0-9]{5}.*")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = {word: split for split, words in _SPLITS.items() for word in words}
_NO_DATA = frozenset(("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"))


def split_folder(source: str) -> tuple[Path, str] | None:
    """The folder and the split of "some/folder:test"; None where that is no folder."""
    folder, _, split = source.rpartition(":")
    return (Path(folder), split) if folder and split and Path(folder).is_dir() else None


def files_by_split(folder: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """Data files by split, in order; "" are those whose split is not known.

    Raises OSError, and ValueError for a folder of several data sets (configurations of the Hub), of which one is meant.
    """
    shards: dict[str, list[Path]] = {}
    for file in _data_files((folder / "data").glob("*"), folder, suffixes):
        if found := _SHARD.fullmatch(file.name):
            shards.setdefault(found["split"], []).append(file)
    if shards:
        return shards
    files = _data_files(folder.glob("*"), folder, suffixes) or _data_files(folder.rglob("*"), folder, suffixes)
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    sets = sorted({str(file.parent) for file in files if _split_by_name_alone(file.relative_to(folder))})
    if len(sets) > 1:
        raise ValueError(
            f"{folder} holds several data sets, each with splits of its own; name one of {', '.join(sets)}"
        )
    return splits


def _data_files(found: Iterator[Path], folder: Path, suffixes: Sequence[str]) -> list[Path]:
    return sorted(
        path for path in found
        if path.suffix in suffixes and path.name not in _NO_DATA and path.is_file()
        and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    )  # fmt: skip


def _split_of(path: Path) -> str:
    """By a word in a folder's name, else in the file's."""
    words = [word for name in (*path.parts[:-1], path.stem) for word in re.split(r"[-._ 0-9]+", name.lower())]
    return next((_WORDS[word] for word in words if word in _WORDS), "")


def _split_by_name_alone(path: Path) -> bool:
    return _split_of(path) != "" and _split_of(path.with_name("of-no-split")) == ""
