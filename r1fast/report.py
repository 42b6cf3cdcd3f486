"""python -m r1fast.report RUN_DIR: rebuild RUN_DIR/report.html, and print the chain's scores."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from r1fast.observe.page import build_report
from r1fast.observe.progress import summary_table
from r1fast.observe.run_data import load_run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m r1fast.report", description="Rebuild a run's report.html.")
    parser.add_argument("run_dir", type=Path, help="the --output-dir of a run, finished or not")
    run_dir = parser.parse_args(arguments).run_dir
    try:
        path, run = build_report(run_dir), load_run(run_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if run.summary:
        Console().print(summary_table(run.summary | {"stages": [vars(stage) for stage in run.stages]}))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
