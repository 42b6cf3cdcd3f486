"""Rejection-sampling filters: each reason alone, and a sample that passes them all."""

import pytest

from r1fast.data.templates import RESPONSE_FORMATS
from r1fast.rewards.filters import check_completion
from r1fast.schema_options import FilterOptions

SETTINGS = {"finish_reason": "stop", "language": "en", **FilterOptions().model_dump()}
THOUGHT = "first multiply 3 by 4, that is 12, then add 2"


def check(reasoning=THOUGHT, answer_part="14", **changes):
    parsed = RESPONSE_FORMATS["think_answer"].parse(f"<think>{reasoning}</think><answer>{answer_part}</answer>")
    return check_completion(parsed, **SETTINGS | changes)


def test_a_good_sample_is_kept():
    assert check() is None
    assert check(language=None) is None
    assert check(answer_part="print it:\n```python\nprint(14)\n```") is None, "code in the answer is fine"


LOOP = "then we add two to the twelve that we have and "
DEFECTS = {
    "truncated": {"finish_reason": "length"},
    "malformed": {"reasoning": " "},
    "mixed_language": {"reasoning": THOUGHT + " 再加二"},
    "repetitive": {"reasoning": LOOP * 5},
    "long_paragraph": {"reasoning": " ".join(f"step {i}" for i in range(400))},
    "code_block": {"reasoning": THOUGHT + "\n```\n3*4+2\n```"},
}


@pytest.mark.parametrize("reason", DEFECTS)
def test_each_reason_alone(reason):
    assert check(**DEFECTS[reason]) == reason


def test_first_reason_wins_and_thresholds_move():
    assert check(reasoning=THOUGHT + " 再加二", finish_reason="length") == "truncated"
    assert check(answer_part="\\boxed{14") == "malformed"
    assert check(**DEFECTS["mixed_language"], min_language=0.5) is None
    assert check(**DEFECTS["repetitive"], max_repetition=1.0) is None
    assert check(**DEFECTS["long_paragraph"], max_paragraph_chars=10_000) is None
    assert check(reasoning="\n\n".join(f"step {i}" for i in range(400))) is None, "short paragraphs may be many"
    assert check(**DEFECTS["code_block"], allow_code=True) is None


def test_prefilled_and_other_formats():
    text, layout = THOUGHT + "\n</think>\n\n14", RESPONSE_FORMATS["think_summary"]
    assert check_completion(layout.parse(text, prefilled=True), **SETTINGS) is None
    assert check_completion(layout.parse(text), **SETTINGS) == "malformed"
