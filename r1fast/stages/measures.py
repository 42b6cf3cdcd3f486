"""What an update reports, in parts that add up: over micro-batches, ranks, and the updates of a rollout.

A mean is kept as a sum and a number of items until it is written down, so that it is the mean over all items however
they are cut: a mean of means is not. What each metric is a mean of stands in docs/numerics.md, section 5.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Mean:
    """total: the sum over the items, a number or a table. count: how many; of none there is no mean."""

    total: Any
    count: float

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Any:
        return np.divide(self.total, self.count).tolist() if self.count else None

    def on_host(self) -> "Mean":
        return Mean(_array(self.total), float(self.count))


@dataclass(frozen=True, slots=True)
class Max:
    largest: Any

    def __add__(self, other: "Max") -> "Max":
        return max(self, other, key=lambda part: part.largest)

    @property
    def value(self) -> float:
        return float(self.largest)

    def on_host(self) -> "Max":
        return Max(_array(self.largest))


Measures = dict[str, Mean | Max]


def _array(value: Any) -> Any:
    """In fp64, as the sums of many parts are taken in it."""
    return value.detach().double().cpu().numpy()[()] if isinstance(value, Tensor) else np.float64(value)


def merge(parts: Iterable[Mapping[str, Mean | Max]]) -> Measures:
    """Parts as one; a metric may be missing in some of them."""
    merged: Measures = {}
    for part in parts:
        for name, measure in part.items():
            measure = measure.on_host()
            merged[name] = merged[name] + measure if name in merged else measure  # type: ignore[operator]
    return merged


def numbers(measures: Mapping[str, Mean | Max]) -> dict[str, Any]:
    """Numbers, and tables as lists of lists; None where there was nothing to take a mean of."""
    return {name: measure.value for name, measure in measures.items()}


def half_width(means: np.ndarray, problems: Sequence[Hashable]) -> float:
    """Half of the 95% interval of the mean over prompts; nan of fewer than two.

    Prompts that ask the same problem (column `problem`: in another language, say) are not independent: their deviations
    are added up before they are squared. Where all have succeeded, or all failed, nothing deviates, and yet the next
    might: then it is 3 / problems, the bound of 95% on an outcome that none of so many had.
    """
    if len(set(problems)) < 2:
        return math.nan
    if set(means) <= {0.0} or set(means) <= {1.0}:
        return min(1.0, 3 / len(set(problems)))
    sums: dict[Hashable, float] = defaultdict(float)
    for problem, deviation in zip(problems, means - means.mean()):
        sums[problem] += float(deviation)
    count = len(sums)
    variance = sum(value**2 for value in sums.values()) * count / (count - 1) / len(means) ** 2
    return float(1.96 * math.sqrt(variance))
