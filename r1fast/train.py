"""The entry: parse (command_line.py), start the process group, run the pipeline.

    torchrun --nproc-per-node 2 -m r1fast.train [NAME_OR_FILE] [--output-dir DIR] [--resume] [key=value]

Exit status: 0 done; 1 a stage failed; 2 the request was wrong (nothing was started and nothing written over); 130 and
143 stopped by Ctrl-C and SIGTERM. Whatever is not a fault of the program ends in one line that says how to go on.
"""

import argparse
import atexit
import os
import shlex
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from r1fast.command_line import is_main, parse, say
from r1fast.config import ConfigError, dump_recipe, load_recipe, shown
from r1fast.read_once import forget
from r1fast.resume import Change, Saved, changed_inputs, changes, read_run
from r1fast.run_folder import locked, read_record
from r1fast.schema import Recipe

if TYPE_CHECKING:  # what imports torch: later, when the threads are chosen and there is a recipe
    from r1fast.parallel.mesh import Dist
    from r1fast.stopping import Stop

RUNS = Path("runs")  # where runs go that are given no --output-dir


def choose_threads(resumed: Path | None) -> None:
    """Set the environment of OpenMP and oneDNN, which is read when torch is imported, and of cuBLAS.

    Spinning barriers stall for milliseconds on a shared machine, and two busy programs with two threads each crawl: so
    threads spin for about 0.1 ms and then sleep (docs/LOG.md), and a loaded machine gets fewer of them. Sums over
    threads round differently, so a resumed run takes as many as it had.
    """
    # Packed batches have a new shape at every step: oneDNN would keep the programs of the last 1,024 products (400 MB).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    # Products on several streams share no scratch: trainer.deterministic asks for it. 32 MiB, as Hopper has by default.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = len(os.sched_getaffinity(0))
    threads = max(1, min(cores, round(cores - os.getloadavg()[0] + 0.5)))
    # As summary.json says, or where it is damaged any stage's record; what is wrong with them, resume.py says.
    for path in (resumed / "summary.json", *resumed.glob("*/stage.json")) if resumed else ():
        with suppress(ValueError, LookupError, TypeError):  # damaged, or of another version
            threads = int(read_record(path)["machine"]["threads"])
            break
    os.environ["OMP_NUM_THREADS"] = str(threads)


@dataclass(frozen=True)
class CommandLine:
    """What is asked for, checked: a recipe in a folder, the stages to run, and the run that is resumed, if one is."""

    recipe: Recipe
    run_dir: Path
    selected: list[str]
    saved: Saved | None
    changes: list[Change]
    stages: str | None  # --stages, for the command that goes on


def main(argv: list[str] | None = None) -> int:
    args, overrides = parse(sys.argv[1:] if argv is None else argv)
    resumed = (args.output_dir or RUNS / "latest").resolve() if args.resume else None
    with ExitStack() as held:
        try:
            if resumed is not None and resumed.is_dir() and not args.dry_run and is_main():
                held.enter_context(locked(resumed))
            choose_threads(resumed)
            request = resolve(args, overrides)
            if args.dry_run:
                if is_main():
                    show(request)
                return 0
        except BrokenPipeError:  # of --dry-run
            raise
        except (ConfigError, OSError) as error:
            say(reason(error))
            return 2
        except KeyboardInterrupt:
            say("stopped by SIGINT before the run began")
            return 130
        finally:
            forget()
        return run(request, held)


def show(request: CommandLine) -> None:
    """The recipe on stdout, what it takes of memory and will do on stderr; ConfigError where it cannot fit."""
    from rich.console import Console

    from r1fast.lengths import Lengths
    from r1fast.memory import estimate, memory_table
    from r1fast.plan import plan_lines

    num_ranks, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    lengths = Lengths(request.recipe)
    found = estimate(request.recipe, request.selected, num_ranks, here, lengths)
    plan = plan_lines(request.recipe, request.selected, lengths, num_ranks)
    print(dump_recipe(request.recipe), end="", flush=True)
    Console(stderr=True, width=160).print(memory_table(found, num_ranks))
    print("\n".join([*plan, "OK"]), file=sys.stderr)


def reason(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    if not error.strerror:
        return " ".join(str(error).split())
    path = error.filename2 or error.filename  # of a rename the file's own name, not the one beside it
    return f"{error.strerror}: {path}" if path else error.strerror


def resolve(args: argparse.Namespace, overrides: list[str]) -> CommandLine:
    """The recipe, the run directory and the stages to run, all checked; ConfigError before anything is written"""
    saved: Saved | None = None
    changed: list[Change] = []
    if args.resume:
        run_dir = args.output_dir or (RUNS / "latest").resolve()
        saved = read_run(run_dir, args.config)
        recipe, taken = laid_out(saved.with_changes(args.config, overrides))
        changed = changes(saved, recipe)
        saved = saved.reopened(changed)
    else:
        recipe, taken = laid_out(load_recipe(args.config or "tiny", overrides))
        run_dir = args.output_dir or RUNS / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = [stage.name for stage in recipe.stages]
    selected = args.stages.split(",") if args.stages else names
    for name in selected:
        if name not in names:
            raise ConfigError(f"--stages: no stage {shown(name)!r}; stages: {', '.join(names)}")
        if selected.count(name) > 1:
            raise ConfigError(f"--stages: {name} is given twice")
    from r1fast.pipeline import check_references
    from r1fast.preflight import check_inputs, check_output

    left = [name for name in selected if saved is None or not saved.is_done(name)]
    check_references(recipe, left, run_dir, saved)
    check_output(run_dir, resume=args.resume, stages=left)
    notes = [f"note: {note}" for note in (*taken, *check_inputs(recipe, left, run_dir))]
    if saved is not None:
        reports, found = changed_inputs(saved, recipe, left)
        if found and not args.accept_changes:
            what = f"not what the run began with: {'; '.join(change.key for change in found)}"
            raise ConfigError(f"--resume: {what}; put it back, or add --accept-changes")
        changed += found
        notes = [*reports, *saved.notes, *map(str, changed), *notes]
    for note in notes:
        say(note)
    return CommandLine(recipe, run_dir, selected, saved, changed, args.stages)


def laid_out(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """With what stages take from the models that they sample; ConfigError."""
    from r1fast.layouts import with_layouts  # with it comes what reads rows

    try:
        return with_layouts(recipe)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def run(request: CommandLine, held: ExitStack) -> int:
    import torch

    from r1fast.parallel.mesh import init_distributed
    from r1fast.stopping import Stop, Stopped

    torch.manual_seed(request.recipe.seed)
    with Stop() as stop:
        dist = init_distributed()
        run_dir = request.run_dir
        try:
            # Its default name holds the time, which differs between ranks, as the day may.
            run_dir, today = dist.all_gather_objects((run_dir, time.strftime("%Y-%m-%d")))[0]
            if request.saved is None:
                request = replace(request, recipe=request.recipe.begun_on(today))
            if request.saved is None and (problem := begin(run_dir, dist, held)):
                say(problem)
                return 2
            execute(request, run_dir, dist, stop)
            return 0
        except (Stopped, ConfigError, FloatingPointError, OSError) as error:  # what only the run could show
            kept = "; what was saved is as it was" if isinstance(error, OSError) else ""
            say(reason(error), kept + how_to_go_on(run_dir, request.stages))
            return 128 + error.signum if isinstance(error, Stopped) else 1
        finally:
            dist.close()


def begin(run_dir: Path, dist: "Dist", held: ExitStack) -> str:
    """Make and hold the folder of a new run; what is wrong or "", on every rank."""
    from r1fast.preflight import check_output

    problem = ""
    if dist.is_main:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(run_dir))
            check_output(run_dir, resume=False)  # again, now that nobody else can begin there
        except (ConfigError, OSError) as error:
            problem = reason(error)
    return dist.all_gather_objects(problem)[0]


def execute(request: CommandLine, run_dir: Path, dist: "Dist", stop: "Stop") -> None:
    from r1fast.observe.live import LivePage
    from r1fast.observe.page import build_report
    from r1fast.observe.table import print_summary
    from r1fast.pipeline import Run

    chain = Run(request.recipe, run_dir, dist, stop)
    if request.saved is not None:
        chain.resume(request.saved.summary, request.changes)
    chain.start()
    try:
        with LivePage(run_dir, is_main=dist.is_main):
            chain.execute(request.selected)
    except BaseException:
        if dist.is_main:
            with suppress(OSError, ValueError):  # a disk that is full or gone: what ended the run tells so
                build_report(run_dir)
        raise
    if dist.is_main:
        page = build_report(run_dir)
        print_summary(chain.summary)
        print(f"report: {page}")


def how_to_go_on(run_dir: Path, stages: str | None) -> str:
    """The command line, to be put behind what ended the run."""
    if not (run_dir / "config.yaml").is_file():
        return "; nothing had begun, start it again"
    size = os.environ.get("LOCAL_WORLD_SIZE")
    start = ["torchrun", "--nproc-per-node", size] if size else ["python"]
    command = [*start, "-m", "r1fast.train", "--output-dir", str(run_dir), "--resume"]
    return f"; go on with: {shlex.join([*command, *(['--stages', stages] if stages else [])])}"


def leave(status: int) -> NoReturn:
    """Exit without tearing the interpreter down.

    Threads of Gloo, which FSDP's caches keep alive past the process group, may then still let go of a tensor: without
    an interpreter that aborts the process, and torchrun calls a run that is done failed (pytorch#179291).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    try:
        leave(main())
    except BrokenPipeError:  # who read the output has seen enough: | head
        os._exit(0)
