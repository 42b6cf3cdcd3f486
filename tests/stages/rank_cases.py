"""Run under torchrun: python rank_cases.py OUTPUT MOE DENSE [LORA]. All that tests compare between numbers of ranks."""

import sys
from pathlib import Path

import torch

from r1fast.parallel.mesh import init_distributed
from tests.stages import gradient_cases, lora_cases, metric_cases

if __name__ == "__main__":
    output, moe, dense, *lora = sys.argv[1:]
    this = init_distributed("cpu")
    found = {
        "gradients": gradient_cases.run_cases(this, moe),
        "metrics": metric_cases.run_cases(this, {"moe": moe, "dense": dense}),
        "lora": [lora_cases.run_cases(this, Path(folder)) for folder in lora],
    }
    if this.is_main:
        torch.save(found, output)
    this.close()
