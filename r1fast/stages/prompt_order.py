"""Which prompts a GRPO stage draws next."""

import random
from collections.abc import Mapping

from r1fast.config import ConfigError
from r1fast.schema import GRPOStage


class PromptOrder:
    """An endless row of prompts for each domain (one, if no weights are given), in a fresh order every epoch.

    The orders are a function of the seed, so that `positions`, how many prompts of each domain were drawn, is all there
    is to save.
    """

    def __init__(self, rows: list[dict], stage: GRPOStage, seed: int) -> None:
        self.seed = f"{seed},{stage.name}"
        weights = self.weights = stage.domain_weights
        self.pools = (
            {name: [row for row in rows if row.get("domain") == name] for name in weights} if weights else {"": rows}
        )
        for name, pool in self.pools.items():
            if not pool:
                raise ConfigError(f"stages.{stage.name}.domain_weights: no prompt has domain {name!r}")
        self.shares = _shares(stage.prompts_per_step, weights or {"": 1.0})
        self.positions = dict.fromkeys(self.pools, 0)
        self.orders: dict[tuple[str, int], list[int]] = {}

    @property
    def num_drawn(self) -> int:
        return sum(self.positions.values())

    def domain_of(self, row: dict) -> str:
        return row["domain"] if self.weights else ""

    def draw(self, counts: Mapping[str, int]) -> list[dict]:
        """The next so many prompts of each domain, domain by domain."""
        chosen = []
        for name, pool in self.pools.items():
            first = self.positions[name]
            self.positions[name] += counts.get(name, 0)
            for position in range(first, self.positions[name]):
                epoch, index = divmod(position, len(pool))
                chosen.append(pool[self._order(name, epoch)[index]])
        return chosen

    def _order(self, name: str, epoch: int) -> list[int]:
        if (name, epoch) not in self.orders:
            order = list(range(len(self.pools[name])))
            random.Random(f"{self.seed},{name},{epoch}").shuffle(order)
            self.orders[name, epoch] = order
        return self.orders[name, epoch]


def _shares(total: int, weights: dict[str, float]) -> dict[str, int]:
    """Whole numbers that add up to total, as near to the weights as they can be (largest remainder)."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    shares = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares
