"""What two ranks compute, for test_parallelize.py. Argument: the file that it is saved in."""

from typing import Any

import torch

from r1fast.parallel.mesh import Dist, init_distributed
from r1fast.parallel.optim import build_optimizer
from r1fast.parallel.parallelize import (
    generation_phase,
    grad_norm_and_clip,
)
from tests.parallel.tiny_model import (
    backward_all,
    decoder_gradients,
    full,
    full_state_dict,
    sharded,
    tokens_of_rank,
    train,
)


def gradients(dist: Dist, **options: Any) -> dict[str, torch.Tensor]:
    model = sharded(dist, **options)
    backward_all(model, dist)
    norm = grad_norm_and_clip(model.parameters(), 0.05)
    return {"norm": norm} | {name: full(param.grad) for name, param in model.named_parameters()}


def generation(dist: Dist) -> dict[str, torch.Tensor]:
    """Logits of the same tokens by decode in a phase after a step, and the weights after one more step."""
    model = sharded(dist, one_unit_numel=0)
    optimizer = train(model, dist, 1)
    with generation_phase(model):
        logits = model.decode(tokens_of_rank(0)).clone()
    train(model, dist, 1, optimizer)
    return {"logits": logits} | full_state_dict(model, dist)


def muon(dist: Dist, offload: bool = False) -> dict[str, torch.Tensor]:
    model = sharded(dist, one_unit_numel=0)
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "offload": offload}
    train(model, dist, 3, build_optimizer(model, name="muon", **settings))
    return full_state_dict(model, dist)


def main(argv: list[str]) -> None:
    (output,) = argv
    dist = init_distributed("cpu")
    results = {
        "one_unit": gradients(dist),
        "units": gradients(dist, one_unit_numel=0),
        "tied": gradients(dist, tied=True, one_unit_numel=0),
        "recompute": gradients(dist, one_unit_numel=0, activation_checkpointing="full"),
        "selective": gradients(dist, one_unit_numel=0, activation_checkpointing="selective"),
        "decoder": decoder_gradients(dist, one_unit_numel=0, activation_checkpointing="full"),
        "generation": generation(dist),
        "muon": muon(dist),
        "offloaded": muon(dist, offload=True),
        "collectives": {
            "sum": dist.all_reduce_sum(torch.tensor(dist.rank + 1)),
            "max": dist.all_reduce_max(torch.tensor(dist.rank + 1)),
            "objects": dist.all_gather_objects({"rank": dist.rank}),
        },
    }
    if dist.is_main:
        torch.save(results, output)
    dist.close()
