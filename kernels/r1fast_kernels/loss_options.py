"""The options of the policy loss, each declared once: name, type, default, meaning, and what else is known of it.

The fields of a recipe, the keywords of `grpo_loss` and their checks, the operator's arguments, the struct of the C++
kernel (setup.py writes its header) and the tuple that the Triton kernel gets are made from this table. A new number is
a line here, a term of the reference, and an expression in each kernel.

Imports nothing of the package: schema.py and setup.py run this file by its path, where importing torch would be early.
"""

import math
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo")
LOSS_TYPES = (*CLIPPED, "cispo")
LARGEST = 1e18  # of a number: float32 holds it, with room for a product


class About(NamedTuple):
    meaning: str
    peers: str = ""  # the names of TRL and verl, where they differ
    recipe: str = ""  # the key in a recipe, where it differs
    loss_types: tuple[str, ...] | None = None  # that take it; None: all, a loss of one's own too
    least: float = -LARGEST
    most: float = LARGEST
    is_open: bool = False  # the least value is no value of the option
    derived: bool = False  # a stage derives it from other options: no key of a recipe


class LossOptions(NamedTuple):
    """Of `grpo_loss`. None switches an option off."""

    loss_type: Annotated[
        Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"], About("the surrogate, and what it is a mean of")
    ] = "grpo"
    importance_level: Annotated[
        Literal["token", "sequence"],
        About("a ratio for each token, or for each sample (GSPO, 2507.18071)", recipe="importance_sampling_level"),
    ] = "token"
    scale_rewards: Annotated[
        Literal["group", "batch", "none"], About("standard deviation that advantages are divided by")
    ] = "group"
    epsilon: Annotated[
        float, About("clips the ratio below, at 1 - epsilon", "verl clip_ratio_low", "", CLIPPED, least=0)
    ] = 0.2
    epsilon_high: Annotated[float | None, About(
        "clips the ratio above, at 1 + epsilon_high (None: epsilon); cispo: the cap", "verl clip_ratio_high", least=0
    )] = None  # fmt: skip
    delta: Annotated[float | None, About(
        "dual clip (1912.09729): the ratio never counts for more", "verl clip_ratio_c", "", CLIPPED, least=0
    )] = None  # fmt: skip
    positive_advantage_weight: Annotated[float, About(
        "factor of advantages above 0; below 1 wrong samples teach more (W-REINFORCE, 2506.01347)", least=0
    )] = 1.0  # fmt: skip
    beta: Annotated[float, About("factor of the KL to the reference", "verl kl_loss_coef", least=0)] = 0.0
    kl_estimator: Annotated[Literal["k1", "k2", "k3", "k3_unbiased"], About(
        "estimate of that KL; k3_unbiased weighs k3 by the ratio (DeepSeek-V3.2)",
        "TRL use_bias_correction_kl, verl kl_loss_type",
    )] = "k3"  # fmt: skip
    is_mode: Annotated[Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"], About(
        "what becomes of a weight exp(old - sampler log-prob), of a token or a whole sample, outside is_min to "
        "is_cap: clamped, or 0 (token_mask with both: IcePop)",
        "TRL vllm_importance_sampling_mode, verl rollout_is and rollout_rs", "sampling_importance_mode",
    )] = "token_truncate"  # fmt: skip
    is_cap: Annotated[float | None, About(
        "the most of such a weight; with is_min None too: no weights",
        "TRL vllm_importance_sampling_clip_max, verl rollout_is_threshold", "sampling_importance_cap",
        least=0, is_open=True,
    )] = None  # fmt: skip
    is_min: Annotated[
        float | None,
        About("the least of it", "TRL vllm_importance_sampling_clip_min", "sampling_importance_min", least=0),
    ] = None
    off_policy_mask_threshold: Annotated[float | None, About(
        "a sample of negative advantage whose mean of sampler - new log-prob is above leaves the loss, not its KL "
        "(DeepSeek-V3.2)"
    )] = None  # fmt: skip
    entropy_coef: Annotated[float, About("factor of the entropy, which the loss rewards", "verl entropy_coeff")] = 0.0
    top_entropy_quantile: Annotated[float, About(
        "only this share of the tokens, those of highest entropy, has a surrogate (2506.01939)",
        least=0, most=1, is_open=True,
    )] = 1.0  # fmt: skip
    max_completion_length: Annotated[
        float | None, About("divisor of dr_grpo", "verl loss_scale_factor", "", ("dr_grpo",), least=0, derived=True)
    ] = None


class Option(NamedTuple):
    """A row of the table."""

    name: str
    default: Any
    about: About
    words: tuple[str, ...]  # of a choice; none of a number
    optional: bool

    @property
    def key(self) -> str:
        """In a recipe."""
        return self.about.recipe or self.name

    def check(self, value: Any) -> str | None:
        """What is wrong with a value; None where nothing is."""
        if self.words:
            return None if value in self.words else f"expected one of {', '.join(self.words)}"
        if value is None:
            return None if self.optional else "expected a number"
        about = self.about
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return "expected a finite number"
        if not about.least <= value <= about.most or (about.is_open and value == about.least):
            least = f"more than {about.least:g}" if about.is_open else f"at least {about.least:g}"
            return f"expected {least}{'' if about.most == LARGEST else f' and at most {about.most:g}'}"
        return None


def _options() -> tuple[Option, ...]:
    rows = []
    for name, hint in get_type_hints(LossOptions, include_extras=True).items():
        kind, about = get_args(hint)
        words = get_args(kind) if get_args(kind) and type(None) not in get_args(kind) else ()
        rows.append(Option(name, LossOptions._field_defaults[name], about, words, type(None) in get_args(kind)))
    return tuple(rows)


OPTIONS = _options()
NUMBERS = tuple(option.name for option in OPTIONS if not option.words)
WORDS = tuple(option.name for option in OPTIONS if option.words)
TABLE = f"{' '.join(NUMBERS)} {' '.join(WORDS)}"  # what the extension must have been built with
