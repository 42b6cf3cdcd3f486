"""Format: the known holes of published format rewards stay closed. Completeness: ended by itself, box closed."""

from r1fast.rewards.format import completeness, format_reward


def score(*completions, **columns):
    return format_reward([""] * len(completions), list(completions), [[]] * len(completions), **columns)


def test_only_the_whole_layout_pays():
    assert score(
        "<think>real thought</think><answer>14</answer>",
        "<think></think><answer>14</answer>",  # empty-think hack
        "<think>real <think>thought</think></think><answer>14</answer>",  # nested
        "<think>real thought</think><answer>14</answer><answer>15</answer>",  # repeated
        "<think>real thought</think><answer>14</answer>\nand more",  # `$` of a regex matches before this line end
        "14",
    ) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_rows_have_their_own_format_and_prefill():
    assert score(
        "real thought</think><answer>14</answer>",
        "real thought</think><answer>14</answer>",
        "<think>\nreal thought\n</think>\n\n14",
        "|special_token|real thought|special_token|14",
        response_format=["think_answer", "think_answer", "think_summary", "special_token"],
        prefilled=[True, False, False, False],
    ) == [1.0, 0.0, 1.0, 1.0]


def test_no_rows():
    assert score() == []


GOOD = "<think>real thought</think><answer>\\boxed{14}</answer>"


def complete(text, finish_reason="stop", **columns):
    return completeness([""], [text], [[]], [finish_reason], **columns)[0]


def test_a_complete_response():
    assert complete(GOOD) == 1.0
    assert complete("<think>real thought</think><answer>14</answer>") == 1.0
    assert complete("real thought</think>14", response_format="think_summary", prefilled=[True]) == 1.0


def test_what_is_not_complete_scores_zero():
    assert complete(GOOD, "length") == 0.0
    assert complete(GOOD + "x") == 0.0
    assert complete("<think>real thought</think><answer></answer>") == 0.0
    assert complete("<think>real thought</think><answer>\\boxed{1} or \\boxed{14</answer>") == 0.0
