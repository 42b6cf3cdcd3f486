"""Which prompts a GRPO stage draws next."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from r1fast.data.rows import location, shown
from r1fast.schema import GRPOStage
from r1fast.schema_options import WeightedSpec, reward_specs
from r1fast.stages.packed import permutation


class PromptOrder:
    """An endless row of prompts for each domain (one, if no weights are given), in a fresh order every epoch.

    The orders are a function of the seed, so that `positions`, how many prompts of each domain were drawn, is all there
    is to save.
    """

    def __init__(self, rows: list[dict], stage: GRPOStage, seed: int) -> None:
        self.seed = f"{seed},{stage.name}"
        weights = self.weights = stage.domain_weights
        by_domain = {name: [row for row in rows if row.get("domain") == name] for name in weights}
        self.pools = by_domain or {"": rows}
        self.shares = _shares(stage.prompts_per_step, weights or {"": 1.0})
        self.positions = dict.fromkeys(self.pools, 0)

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
                chosen.append(pool[permutation(len(pool), f"{self.seed},{name},{epoch}")[index]])
        return chosen


def prompt_problems(stage: GRPOStage, rows: Sequence[dict]) -> Iterator[str]:
    """Too few prompts for a step, and domains without a weight or a prompt."""
    if len(rows) < stage.prompts_per_step:
        yield f"train_files: {len(rows)} prompts, fewer than prompts_per_step = {stage.prompts_per_step}"
    weights = stage.domain_weights
    yield from (problems := list(domain_problems("domain_weights", "train_files", weights, rows)))
    for name in sorted({str(row.get("domain")) for row in rows} - weights.keys()) if weights and not problems else ():
        yield f"domain_weights: rows of train_files have domain {name!r}; give it a weight (0 leaves it out)"
    for name, spec in stage.reward_models.items():
        yield from domain_problems(f"reward_models.{name}.domains", "train_files", spec.domains, rows)


def unrewarded_problems(stage: GRPOStage, rows: Sequence[dict]) -> Iterator[str]:
    """Rows of a domain that no reward is for: nothing can be learned from them."""
    specs: list[WeightedSpec] = [*reward_specs(stage.rewards).values(), *stage.reward_models.values()]
    if not all(spec.domains for spec in specs):
        return  # one is for all
    rewarded = {name for spec in specs for name in spec.domains}
    for name in dict.fromkeys(str(row.get("domain")) for row in rows):
        if name not in rewarded and (not stage.domain_weights or stage.domain_weights.get(name, 0) > 0):
            yield f"rewards: none applies to the rows of train_files with domain {name!r}; name one, or drop the rows"


def domain_problems(key: str, files: str, names: Iterable[str], rows: Sequence[dict]) -> Iterator[str]:
    """Domains that an option names, and no row has."""
    if not names:
        return
    for i, row in enumerate(rows):
        if not isinstance(row.get("domain"), str | None):
            yield f"{files}: {location(row, i)}: column 'domain' is {shown(row['domain'])}, expected a string ({key})"
            return
    domains = {row.get("domain") for row in rows}
    for name in names:
        if name not in domains:
            yield f"{key}: no row of {files} has domain {name!r}; domains: {sorted(map(str, domains))}"


def _shares(total: int, weights: dict[str, float]) -> dict[str, int]:
    """Whole numbers that add up to total, as near to the weights as they can be (largest remainder)."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    shares = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares
