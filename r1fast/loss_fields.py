"""The options of the policy loss as fields of a recipe, from the one table in r1fast_kernels/loss_options.py."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from r1fast.schema_types import Reads

_PACKAGE = find_spec("r1fast_kernels")
assert _PACKAGE is not None and _PACKAGE.submodule_search_locations is not None
# By its path: to import the package is to import torch, which reads the number of threads when it starts.
_TABLE = run_path(str(Path(_PACKAGE.submodule_search_locations[0]) / "loss_options.py"))
OPTIONS = [option for option in _TABLE["OPTIONS"] if not option.about.derived]
LossOptions = _TABLE["LossOptions"]
LOSS_TYPES: tuple[str, ...] = _TABLE["LOSS_TYPES"]

# Where a recipe begins otherwise than the op. auto: 2.0 where the sampler is not just the policy (grpo.py), else None.
DEFAULTS = {"beta": 0.001, "sampling_importance_cap": "auto"}


# A loss of one's own: my_losses.py:name, package.module.name
def _own_loss(name: str) -> str:
    if not re.fullmatch(r".+\.py:\w+|\w+(\.\w+)+", name):
        raise ValueError("file.py:name or package.module.name for a loss of your own")
    return name


OwnLoss = Annotated[str, Field(max_length=4096), AfterValidator(_own_loss)]


def _type_of(option: Any) -> Any:
    if option.words:
        kind: Any = Literal[option.words]
        return Annotated[kind | OwnLoss, Reads("code")] if option.name == "loss_type" else kind
    least = {"gt" if option.about.is_open else "ge": option.about.least}
    kind = Annotated[float, Field(**least, le=option.about.most)]
    if option.key == "sampling_importance_cap":
        kind = Literal["auto"] | kind
    return kind | None if option.optional else kind


def fields() -> dict[str, tuple[Any, Any]]:
    """Type and default of each, as pydantic.create_model takes them."""
    return {option.key: (_type_of(option), DEFAULTS.get(option.key, option.default)) for option in OPTIONS}


def unused(loss_type: str, changed: dict[str, Any]) -> Iterator[str]:
    """Of options that are set, those that a built-in loss takes no notice of, in words."""
    for option in OPTIONS:
        takers = option.about.loss_types
        if option.key in changed and takers is not None and loss_type in LOSS_TYPES and loss_type not in takers:
            known = f"{loss_type}, only to {', '.join(takers)}"
            yield f"{option.key} = {changed[option.key]} does not apply to loss_type {known}; drop it"
