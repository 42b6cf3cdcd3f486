"""python -m r1fast.report RUN_DIR: rebuild RUN_DIR/report.html, and print the chain's scores."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from r1fast.observe.page import build_report
from r1fast.observe.run_files import load_run
from r1fast.observe.table import print_summary


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m r1fast.report", description="Rebuild a run's report.html.")
    parser.add_argument("run_dir", type=Path, help="the --output-dir of a run, finished or not")
    run_dir = parser.parse_args(arguments).run_dir
    try:
        path = build_report(run_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_summary(load_run(run_dir).model_dump())
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
