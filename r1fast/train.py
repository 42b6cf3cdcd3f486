"""The entry: parse, start the process group, run the pipeline.

    torchrun --nproc-per-node 2 -m r1fast.train --config NAME_OR_FILE [--output-dir DIR] [--resume] [key=value]

Exit status: 0 done, 1 a stage failed, 2 the request was wrong (nothing was started and nothing written over).
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from r1fast.schema import Recipe


def choose_threads(resumed: Path | None) -> None:
    """Set the OpenMP environment, which is read when torch is imported.

    Spinning barriers stall for milliseconds on a shared machine, and two busy programs with two threads each crawl: so
    threads spin for about 0.1 ms and then sleep (docs/LOG.md), and a loaded machine gets fewer of them. Sums over
    threads round differently, so a resumed run takes as many as it had.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if "OMP_NUM_THREADS" in os.environ:
        return
    summary = resumed / "summary.json" if resumed else None
    if summary is not None and summary.is_file():
        threads = json.loads(summary.read_text(encoding="utf-8"))["machine"]["threads"]
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        threads = max(1, min(cores, round(cores - busy + 0.5)))
    os.environ["OMP_NUM_THREADS"] = str(threads)


RUNS = Path("runs")  # where runs go that are given no --output-dir


def print_error(message: str) -> None:
    """A line for each mistake, from one rank."""
    from r1fast.config import error_lines

    if os.environ.get("RANK", "0") == "0":
        print("\n".join(error_lines(message)), file=sys.stderr)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print_error(f"{message[:500]}; --help lists the options")
        sys.exit(2)


class Once(argparse.Action):
    """An option with a value that may not be empty, and not be given twice."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if not values:
            parser.error(f"{option_string} is empty")
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} is given twice")
        setattr(namespace, self.dest, values)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        prog="torchrun -m r1fast.train",
        description="Train a model through the DeepSeek-R1 recipe, or through any part of it.",
        epilog="Anything else is an override: key.sub=value, stages.NAME.key=value.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action=Once,
        metavar="NAME_OR_FILE",
        help="a recipe of r1fast/recipes or a YAML file (default: tiny)",
    )
    parser.add_argument(
        "--output-dir", action=Once, metavar="DIR", help="run directory (default: runs/<recipe>-<time>)"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --output-dir (default: runs/latest)")
    parser.add_argument("--stages", action=Once, metavar="A,B", help="run only these stages of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the resolved recipe, and stop")
    args, overrides = parser.parse_known_args(argv)
    for override in overrides:
        if "=" not in override:
            parser.error(f"{override[:80]!r} is neither an option nor an override key.sub=value")
    args.output_dir = None if args.output_dir is None else Path(args.output_dir)
    return args, overrides


def main(argv: list[str] | None = None) -> int:
    args, overrides = parse(sys.argv[1:] if argv is None else argv)
    choose_threads((args.output_dir or RUNS / "latest") if args.resume else None)
    from r1fast.config import ConfigError

    is_main = os.environ.get("RANK", "0") == "0"
    try:
        recipe, run_dir, selected = resolve(args, overrides)
        if args.dry_run:
            if is_main:
                from r1fast.config import dump_recipe

                print(dump_recipe(recipe), end="")
            return 0
    except ConfigError as error:
        print_error(str(error))
        return 2
    try:
        return run(recipe, run_dir, selected, resume=args.resume)
    except ConfigError as error:  # what only the run could show, as when no sample passes a filter
        print_error(str(error))
        return 1


def resolve(args: argparse.Namespace, overrides: list[str]) -> tuple["Recipe", Path, list[str]]:
    """The recipe, the run directory and the stages to run, all checked; ConfigError before anything is written"""
    from r1fast.config import ConfigError, dump_recipe, load_recipe, shown

    run_dir = args.output_dir or ((RUNS / "latest").resolve() if args.resume else None)
    saved = run_dir / "config.yaml" if run_dir else None
    if args.resume and (saved is None or not saved.is_file()):
        raise ConfigError(f"--resume: {run_dir} holds no run (no config.yaml); name it with --output-dir")
    recipe = load_recipe(args.config or (str(saved) if args.resume else "tiny"), overrides)
    if args.resume and saved is not None and dump_recipe(recipe) != saved.read_text(encoding="utf-8"):
        raise ConfigError(
            f"--resume: the recipe differs from {saved}; resume without --config and overrides, or start a new run"
        )
    run_dir = run_dir or RUNS / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = [stage.name for stage in recipe.stages]
    selected = args.stages.split(",") if args.stages else names
    for name in selected:
        if name not in names:
            raise ConfigError(f"--stages: no stage {shown(name)!r}; stages: {', '.join(names)}")
        if selected.count(name) > 1:
            raise ConfigError(f"--stages: {name} is given twice")
    from r1fast.pipeline import check_references  # these import torch: only when there is a recipe
    from r1fast.preflight import check_inputs, check_output

    check_references(recipe, selected, run_dir)
    check_output(run_dir, resume=args.resume, stages=names)
    for note in check_inputs(recipe, selected, run_dir):
        if os.environ.get("RANK", "0") == "0":
            print(f"r1fast: note: {note}", file=sys.stderr)
    return recipe, run_dir, selected


def run(recipe: "Recipe", run_dir: Path, selected: list[str], *, resume: bool) -> int:
    import torch

    from r1fast.dist.mesh import init_distributed
    from r1fast.observe.progress import summary_table
    from r1fast.observe.report import build_report
    from r1fast.pipeline import Run
    from r1fast.rollout.vllm_process import InProcess

    torch.manual_seed(recipe.seed)
    dist = init_distributed()
    run_dir = dist.all_gather_objects(run_dir)[0]  # its default name holds the time, which differs between ranks
    try:
        chain = Run(recipe, run_dir, dist)
        if resume:
            chain.resume()
        chain.start()
        try:
            chain.execute(selected)
        finally:
            if dist.is_main:
                page = build_report(run_dir)
        if dist.is_main:
            from rich.console import Console

            console = Console()
            if not console.is_terminal:
                console = Console(width=132)
            console.print(summary_table(chain.summary))
            console.print(f"report: {page}", soft_wrap=True)
    finally:
        InProcess.release()
        dist.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
