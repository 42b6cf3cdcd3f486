"""Rejection-sampling filters: each reason alone, and a sample that passes them all."""

import pytest

from r1fast.rewards.filters import DROP_REASONS, check_completion

THOUGHT = "first multiply 3 by 4, that is 12, then add 2"


def check(reasoning=THOUGHT, answer_part="14", **changes):
    settings = {"response_format": "think_answer", "finish_reason": "stop", "answer": "14", "language": "en"} | changes
    return check_completion(f"<think>{reasoning}</think><answer>{answer_part}</answer>", **settings)


def test_a_good_sample_is_kept():
    assert check() is None
    assert check(answer=None, language=None) is None
    assert check(answer_part="print it:\n```python\nprint(14)\n```", answer=None) is None, "code in the answer is fine"


LOOP = "then we add two to the twelve that we have and "
DEFECTS = {
    "incorrect": {"answer_part": "13"},
    "truncated": {"finish_reason": "length"},
    "malformed": {"reasoning": " "},
    "mixed_language": {"reasoning": THOUGHT + " 再加二"},
    "repetitive": {"reasoning": LOOP * 5},
    "long_paragraph": {"reasoning": " ".join(f"step {i}" for i in range(400))},
    "code_block": {"reasoning": THOUGHT + "\n```\n3*4+2\n```"},
}


@pytest.mark.parametrize("reason", DROP_REASONS)
def test_each_reason_alone(reason):
    assert check(**DEFECTS[reason]) == reason


def test_first_reason_wins_and_thresholds_move():
    assert check(reasoning=THOUGHT + " 再加二", answer_part="13") == "incorrect"
    assert check(answer_part="\\boxed{14", answer=None) == "malformed"
    assert check(answer="?") == "incorrect", "an unreadable gold proves nothing"
    assert check(**DEFECTS["mixed_language"], min_language=0.5) is None
    assert check(**DEFECTS["repetitive"], max_repetition=1.0) is None
    assert check(**DEFECTS["long_paragraph"], max_paragraph_chars=10_000) is None
    assert check(reasoning="\n\n".join(f"step {i}" for i in range(400))) is None, "short paragraphs may be many"
    assert check(**DEFECTS["code_block"], allow_code=True) is None


def test_prefilled_and_other_formats():
    text = THOUGHT + "\n</think>\n\n14"
    settings = {"response_format": "think_summary", "finish_reason": "stop", "answer": 14, "language": "en"}
    assert check_completion(text, prefilled=True, **settings) is None
    assert check_completion(text, **settings) == "malformed"
