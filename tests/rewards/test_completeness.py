"""Completeness: ended by itself, well formed, box closed."""

from r1fast.rewards.format import completeness

GOOD = "<think>real thought</think><answer>\\boxed{14}</answer>"


def score(text, finish_reason="stop", **columns):
    return completeness([""], [text], [[]], [finish_reason], **columns)[0]


def test_complete_response():
    assert score(GOOD) == 1.0
    assert score("<think>real thought</think><answer>14</answer>") == 1.0
    assert score("real thought</think>14", response_format="think_summary", prefilled=[True]) == 1.0


def test_each_defect_scores_zero():
    assert score(GOOD, "length") == 0.0
    assert score(GOOD + "x") == 0.0
    assert score("<think>real thought</think><answer></answer>") == 0.0
    assert score("<think>real thought</think><answer>\\boxed{1} or \\boxed{14</answer>") == 0.0
