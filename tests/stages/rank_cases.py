"""All that tests compare between numbers of ranks. Arguments: OUTPUT MOE DENSE [LORA]."""

from pathlib import Path

import torch

from r1fast.parallel.mesh import init_distributed
from tests.stages import gradient_cases, lora_cases, metric_cases


def main(argv: list[str]) -> None:
    output, moe, dense, *lora = argv
    dist = init_distributed("cpu")
    found = {
        "gradients": gradient_cases.run_cases(dist, moe),
        "metrics": metric_cases.run_cases(dist, {"moe": moe, "dense": dense}),
        "lora": [lora_cases.run_cases(dist, Path(folder)) for folder in lora],
    }
    if dist.is_main:
        torch.save(found, output)
    dist.close()
