"""python -m r1fast.generate --model M --input ROWS --output FILE: completions for every row of a data set.

Each process of torchrun has the whole model and takes one chunk after another (batch_file.py). A command that was
stopped goes on when it is given again. A row's noise is a function of the seed and its number, so that completions
depend neither on chunks nor on the number of processes.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from r1fast import asking
from r1fast.artifacts import fingerprint
from r1fast.batch_file import SUFFIXES, BatchFile, check_columns, check_output
from r1fast.data.rows import Row, canonical
from r1fast.data.sources import read_source
from r1fast.parallel.mesh import Dist, init_distributed
from r1fast.rollout.engine import RolloutEngine
from r1fast.rollout.sampling import Completion, SamplingParams

SAMPLES_PER_CHUNK = 1024  # four times as many as decode at a time, as the last of a chunk decode alone
LINE_SECONDS = 5.0  # between lines of progress where there is no terminal
_IDS = "completion_ids"
ADDED = ("completions", "finish_reasons", "num_tokens", "cumulative_logprobs")


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        asking.check_device(given.device)
    except ValueError as error:
        return _refused(error)
    dist = init_distributed(given.device)
    try:
        run(given, dist)
    except (ValueError, OSError) as error:
        return _refused(error) if dist.is_main else 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return 130
    finally:
        dist.close()
    return 0


def _refused(error: BaseException) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m r1fast.generate",
        description="Completions for every row of a data set, asked as the model was trained. A batch that was stopped "
        "goes on when the command is given again.",
    )
    add = parser.add_argument
    add("--model", required=True, help=asking.SOURCE)
    add("--input", required=True, help="rows with a prompt: all that train_files of a grpo stage may name")
    add("--output", required=True, type=Path, help=f"a file that is not there yet ({' or '.join(SUFFIXES)})")
    # Not --n: torchrun reads what follows -m too, and takes that for one of its own options, but does not know which.
    add("-n", "--num-generations", dest="n", type=int, default=1, help="completions of each row (default: 1)")
    add("--limit", type=int, metavar="ROWS", help="only the first so many rows")
    add("--token-ids", action="store_true", help=f"write the column {_IDS} too")
    add("--overwrite", action="store_true", help="replace the output, and begin a batch that was stopped anew")
    asking.add_options(parser)
    return parser


def run(given: argparse.Namespace, dist: Dist) -> None:
    """Raises ValueError or OSError, on every rank; before any sampling where it can be known."""
    console = Console(
        stderr=True, quiet=not dist.is_main, highlight=False, soft_wrap=True, markup=False, emoji=False
    )  # fmt: skip
    dist.on_all(lambda: check_output(given.output, overwrite=given.overwrite))
    source = asking.find_model(given.model)
    if source.is_step and dist.world_size > 1:
        raise ValueError(f"{given.model}: several processes read a model, not a step: python -m r1fast.export first")
    rows = dist.on_all(lambda: _read(given))
    engine = dist.on_all(lambda: asking.load(source, given.dtype, dist.device))
    params, prompts = dist.on_all(lambda: _prepare(given, rows, engine))
    settings = _settings(given, source, rows, params)
    most = max(1, min(-(-len(rows) // dist.world_size), SAMPLES_PER_CHUNK // given.n))
    batch = dist.on_main(lambda: BatchFile.open(given.output, settings, len(rows), most, overwrite=given.overwrite))
    console.print(f"model: {source.description}")
    if (num_done := batch.num_done()) > 0:
        console.print(f"going on after {num_done:,} of {len(rows):,} rows")
    missing = dist.on_main(batch.missing)

    def sample() -> None:
        with _Progress(batch, console, "rank 0: " if dist.world_size > 1 else "") as progress:
            for chunk in filter(batch.take, missing):
                index = batch.rows_of(chunk)
                try:
                    outputs = engine.generate([prompts[i] for i in index], params, sequence_ids=index)
                    made = zip((rows[i] for i in index), outputs, strict=True)
                    batch.write(chunk, [_output(row, group, given.token_ids) for row, group in made])
                except (FloatingPointError, ValueError, OSError) as error:
                    batch.fail()
                    raise ValueError(str(error)) from error  # which `on_all` hands to every rank
                progress.add(outputs)
            batch.wait()

    dist.on_all(sample)
    dist.on_main(batch.finish)
    if dist.is_main:
        print(given.output)


def _read(given: argparse.Namespace) -> list[Row]:
    """The rows as they are, each known to hold a prompt."""
    if given.output.exists() and Path(given.input).resolve() == given.output.resolve():
        raise ValueError(f"--output {given.output} is the input; choose another file")
    for name, value in (("-n", given.n), ("--limit", given.limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    rows = []
    try:
        for where, columns in read_source(given.input):
            canonical(columns, "prompts", where)
            rows.append(Row(columns, where))
            if len(rows) == given.limit:
                break
    except OSError as error:
        raise ValueError(f"{given.input[:200]}: cannot be read: {error.strerror or error}") from error
    if not rows:
        raise ValueError(f"{given.input} has no rows")
    check_columns(rows, (*ADDED, _IDS), given.output)
    return rows


def _prepare(
    given: argparse.Namespace, rows: list[Row], engine: RolloutEngine
) -> tuple[SamplingParams, list[list[int]]]:
    """Prompts that fit, and how their completions are sampled."""
    assert engine.tokenizer is not None
    prompts = []
    for row in rows:
        try:
            asked = _with_system(row, given.system)
            prompts.append(asking.prompt_ids(asked, engine.tokenizer, given))
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error
    params = asking.params_of(given, engine)
    longest = max(range(len(rows)), key=lambda index: len(prompts[index]))
    num_tokens = len(prompts[longest])
    if num_tokens + (given.max_tokens or 1) > engine.longest:
        with_completion = f"--max-tokens {given.max_tokens}" if given.max_tokens else "a completion"
        raise ValueError(
            f"{rows[longest].where}: the prompt has {num_tokens} tokens, and the model takes {engine.longest} with "
            f"{with_completion}; shorten or drop the row, or lower --max-tokens"
        )
    return replace(params, n=given.n, max_tokens=min(params.max_tokens, engine.longest - num_tokens)), prompts


def _with_system(row: Row, system: str | None) -> dict[str, Any]:
    """What --system says, for a row that says nothing itself."""
    prompt = canonical(row, "prompts", row.where)["prompt"]
    has_one = not isinstance(prompt, str) and prompt[0]["role"] == "system"
    return row if system is None or has_one else {**row, "system": system}


def _settings(
    given: argparse.Namespace, source: asking.Source, rows: list[Row], params: SamplingParams
) -> dict[str, Any]:
    """What the output depends on."""
    asked = ("system", "prompt_template", "chat_template_kwargs", "dtype", "token_ids")
    content = "".join(json.dumps(row, sort_keys=True) for row in rows)
    return {
        "model": fingerprint(Path(source.path)) if Path(source.path).exists() else source.path,
        "input": hashlib.blake2b(content.encode(), digest_size=16).hexdigest(),
        **{name: getattr(given, name) for name in asked},
        **{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(params).items()},
    }


def _output(row: Row, group: list[Completion], token_ids: bool) -> dict[str, Any]:
    columns = (
        [completion.text for completion in group],
        [completion.finish_reason for completion in group],
        [len(completion.token_ids) for completion in group],
        [sum(completion.logprobs) for completion in group],
    )
    ids = {_IDS: [completion.token_ids for completion in group]} if token_ids else {}
    return {**row, **dict(zip(ADDED, columns, strict=True)), **ids}


class _Progress:
    """Rows of all processes, a bar on a terminal and a line now and then elsewhere; and what came of them."""

    def __init__(self, batch: BatchFile, console: Console, whose: str) -> None:
        """whose: tokens are counted."""
        self.batch, self.console, self.whose = batch, console, whose
        self.started = self.last_line = time.monotonic()
        self.num_tokens = self.num_completions = self.num_cut = 0
        columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(
            *columns, TextColumn("{task.fields[rate]}"), console=console, disable=not console.is_terminal
        )
        self.task = self.bar.add_task("rows", total=batch.num_rows, completed=batch.num_done(), rate="")

    def __enter__(self) -> "_Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.num_completions:
            seconds = time.monotonic() - self.started
            self.console.print(
                f"{self.whose}{self.num_completions:,} completions of {self.num_tokens:,} tokens in {seconds:,.1f} s, "
                f"{self.num_cut:,} of them cut at their longest"
            )

    def add(self, outputs: list[list[Completion]]) -> None:
        found = [completion for group in outputs for completion in group]
        self.num_completions += len(found)
        self.num_tokens += sum(len(completion.token_ids) for completion in found)
        self.num_cut += sum(completion.finish_reason == "length" for completion in found)
        done = self.batch.num_done()
        rate = f"{self.whose}{self.num_tokens / (time.monotonic() - self.started):,.0f} tokens/s"
        self.bar.update(self.task, completed=done, rate=rate)
        if not self.console.is_terminal and time.monotonic() - self.last_line > LINE_SECONDS:
            self.last_line = time.monotonic()
            self.console.print(f"{done:,} of {self.batch.num_rows:,} rows, {rate}")


if __name__ == "__main__":
    sys.exit(main())
