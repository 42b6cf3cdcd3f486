"""Write tests/golden/curves.json anew, on the reference path: python -m tests.golden.record

For a change that is meant to change the numbers, together with the curve before and after; never to make a test pass.
"""

import json
import tempfile
from pathlib import Path

import torch

from r1fast.parallel.mesh import init_distributed
from tests.golden.runs import CURVES, RUNS, curve


def main() -> None:
    torch.set_num_threads(1)
    dist = init_distributed("cpu")
    curves = {run: curve(run, "reference", dist, Path(tempfile.mkdtemp())) for run in RUNS}
    digits = {run: {name: [float(f"{x:.9g}") for x in xs] for name, xs in c.items()} for run, c in curves.items()}
    CURVES.write_text(json.dumps(digits, indent=1) + "\n", encoding="utf-8")
    dist.close()


if __name__ == "__main__":
    main()
