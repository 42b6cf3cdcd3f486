"""python -m r1fast.report RUN [RUN ..]: rebuild RUN/report.html and print the scores, or draw several runs together."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from r1fast.observe.comparison import build_comparison
from r1fast.observe.page import build_report
from r1fast.observe.run_files import load_run
from r1fast.observe.table import print_summary


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m r1fast.report",
        description="Rebuild a run's report.html; of several runs make one page that compares them with the first.",
    )
    parser.add_argument(
        "run_dirs", type=Path, nargs="+", metavar="RUN", help="the --output-dir of a run, finished or not"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="page of several runs (default: comparison.html)")
    args = parser.parse_args(arguments)
    if args.output is not None and len(args.run_dirs) == 1:
        parser.error("--output is of a page of several runs; that of one is RUN/report.html")
    if args.output is not None and not (args.output.suffix == ".html" and args.output.parent.is_dir()):
        parser.error(f"--output {args.output}: expected a file that ends with .html, in a folder that is there")
    try:
        if len(args.run_dirs) > 1:
            path = build_comparison(args.run_dirs, args.output or Path("comparison.html"))
        else:
            path = build_report(args.run_dirs[0])
            print_summary(load_run(args.run_dirs[0]).model_dump())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
