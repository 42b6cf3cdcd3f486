"""Whatever a data file holds, --dry-run accepts it whole or refuses it in one line that names file and row.

Longer, or from other seeds: R1FAST_FUZZ_ROWS=first:last python -m pytest tests/fuzz/test_rows.py -m slow
"""

import ast
import contextlib
import json
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from r1fast.data.sources import load_rows
from r1fast.data.tokenizer import EOS
from r1fast.models.weights import load_tokenizer
from r1fast.stages.packed import encode_examples, encode_prompts
from r1fast.stages.reward_model import encode_units
from tests.fuzz.rows import KINDS, SUFFIXES, Case, make_case
from tests.tiny_checkpoint import GRPO, write_recipe

SHORT = range(60)
LIMIT_S = 10
LENGTHS = {"max_length": 4000, "max_tokens_per_microbatch": 8000}
STAGES: dict[str, dict[str, Any]] = {
    "prompts": {**GRPO, "prompts_per_step": 1, "rewards": {"format": 1.0}, "max_prompt_length": 100},
    "sft": {"name": "tuned", "kind": "sft", "response_format": "think_summary", "prompt_template": "chat", **LENGTHS},
    "pairs": {"name": "rm", "kind": "reward_model", "loss": "pairwise", **LENGTHS},
    "labels": {"name": "rm", "kind": "reward_model", "loss": "pointwise", **LENGTHS},
}
# Of the file, not of a row.
NO_ROW = r"has no rows|not a readable parquet|got a JSON|two columns|not UTF-8|accuracy can read the answer of no row"


class Hang(BaseException):
    pass


@pytest.fixture
def stopwatch() -> Iterator[Callable[[], None]]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    yield lambda: signal.alarm(LIMIT_S)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def run_cases(seeds: range, command: Callable[..., int], base_model: Path, folder: Path, capfd: Any, start: Any) -> int:
    """How many were accepted."""
    configs = {}
    for kind in KINDS:
        for suffix in SUFFIXES:
            stage = {**STAGES[kind], "train_files": [f"case{suffix}"]}
            path = folder / f"{kind}{suffix}.yaml"
            configs[kind, suffix] = write_recipe(path, stage, model={"path": str(base_model)})
    tokenizer = load_tokenizer(base_model)
    accepted = 0
    for seed in seeds:
        case = make_case(seed)
        path = folder / case.name
        path.write_bytes(case.content)
        rewards = ["stages.zero.rewards={accuracy: 1.0}"] if case.kind == "prompts" and seed % 8 == 0 else []
        capfd.readouterr()
        start()
        status = command("--config", configs[case.kind, path.suffix], "--output-dir", "run", "--dry-run", *rewards)
        signal.alarm(0)
        out, err = capfd.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("r1fast: note: ")]
        shown = f"seed {seed}, {case.kind}, {case.content[:2000]!r}\n{err}"
        if status == 0:
            assert out and lines[0].startswith("GiB on the rank"), shown
            check_nothing_vanished(case, load_rows([str(path)], case.kind), tokenizer, shown)  # type: ignore[arg-type]
            accepted += 1
        else:
            assert status == 2 and not out and len(lines) == 1 and lines[0].startswith("r1fast: "), shown
            assert re.search(rf"{case.name}(:\d+|: row \d+)|{NO_ROW}", lines[0]) and case.name in lines[0], shown
            assert len(lines[0]) < 1200, shown
    return accepted


def check_nothing_vanished(case: Case, rows: list[dict], tokenizer: Any, shown: str) -> None:
    """Every column is there still, and every text of those that are learned or scored is in what the model reads."""
    for row, raw in zip(rows, plain_rows(case), strict=True):
        for name, value in raw.items():
            if name not in ("prompt", "completion", "chosen", "rejected", "response", "messages", "label", "answer"):
                assert same(row[name], value), (name, shown)
        text = read_by_model(case.kind, row, tokenizer)
        for leaf in learned_texts(case.kind, raw):
            assert leaf.strip().removesuffix(EOS).strip() in text, (leaf, text, shown)


def plain_rows(case: Case) -> list[dict[str, Any]]:
    """The file as any program would read it."""
    import csv
    import io

    import pyarrow.parquet as pq

    if case.name.endswith(".parquet"):
        return pq.read_table(io.BytesIO(case.content)).to_pylist()
    text = case.content.decode("utf-8-sig")
    if case.name.endswith((".csv", ".tsv")):
        separator = "\t" if case.name.endswith(".tsv") else ","
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if line]
        return [{name: value or None for name, value in zip(lines[0], line)} for line in lines[1:]]
    if case.name.endswith(".jsonl"):
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    content = json.loads(text)
    return content["data"] if isinstance(content, dict) else content


def same(kept: Any, value: Any) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return kept is None
    if isinstance(value, list) and isinstance(kept, list):
        return len(value) == len(kept) and all(map(same, kept, value))
    if isinstance(value, dict) and isinstance(kept, dict):
        return list(value) == list(kept) and all(same(kept[name], value[name]) for name in value)
    return kept == value or not isinstance(value, str | int | float | None)


def read_by_model(kind: str, row: dict, tokenizer: Any) -> str:
    from types import SimpleNamespace

    options = SimpleNamespace(
        prompt_template="chat", response_format="think_summary", prefill_think=False, score_on="response",
        chat_template_kwargs={}, today=None,
        loss="pairwise" if kind == "pairs" else "pointwise",
    )  # fmt: skip
    if kind == "prompts":
        ids = [prompt.ids for prompt in encode_prompts([row], tokenizer, options)]
    else:
        units = (
            encode_units([row], tokenizer, options) if kind != "sft" else [encode_examples([row], tokenizer, options)]
        )
        ids = [example.prompt_ids + example.completion_ids for unit in units for example in unit]
    return "\n".join(tokenizer.decode(line, skip_special_tokens=False) for line in ids)


def learned_texts(kind: str, raw: dict[str, Any]) -> list[str]:
    """The texts under the names that a stage reads, as far as they are the row's own names and not aliases."""
    given = {name for name, value in raw.items() if value is not None}
    if kind != "sft":
        names = {"prompts": ("prompt",), "pairs": ("prompt", "chosen", "rejected"), "labels": ("prompt", "response")}[
            kind
        ]
    elif "messages" in given:
        names = ("messages",)
    elif given & {"prompt", "completion"}:
        names = ("prompt", "completion")
    else:
        names = ("instruction", "input", "output") if {"instruction", "output"} <= given else ("text",)
    if names == ("messages",):
        return list(leaves(_turns(raw["messages"])))
    return [leaf for name in names for leaf in leaves(raw.get(name))]


def _turns(value: Any) -> Any:
    """Turns may be a text: JSON, or as Python writes lists."""
    for read in (json.loads, ast.literal_eval) if isinstance(value, str) else ():
        with contextlib.suppress(ValueError, SyntaxError):
            return read(value)
    return value


def leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            is_turn = isinstance(entry, dict) and "role" in entry
            # R1's template leaves the reasoning of earlier turns out.
            yield from leaves({"content": entry["content"]} if is_turn and i < len(value) - 1 else entry)
    elif isinstance(value, dict):
        for name, entry in value.items():
            if name not in ("role", "type"):
                yield from leaves(entry)


def test_damaged_files(command, base_model: Path, tmp_path: Path, capfd, stopwatch) -> None:
    accepted = run_cases(SHORT, command, base_model, tmp_path, capfd, stopwatch)
    assert len(SHORT) / 5 < accepted < 4 * len(SHORT) / 5  # or the cases are all of one sort


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_damaged_files(command, base_model: Path, tmp_path: Path, capfd, stopwatch) -> None:
    first, last = map(int, os.environ.get("R1FAST_FUZZ_ROWS", "1000:4000").split(":"))
    run_cases(range(first, last), command, base_model, tmp_path, capfd, stopwatch)
