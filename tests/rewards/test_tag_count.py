"""Tags once each, by response format, and none that the prompt has written."""

import pytest

from r1fast.rewards.tag_count import tag_count


@pytest.mark.parametrize(
    ("completion", "layout", "prefilled", "expected"),
    [
        ("<think>\na\n</think>\n<answer>\nb\n</answer>", "think_answer", False, 1.0),
        ("<think>a</think>b", "think_answer", False, 0.5),
        ("<think>a", "think_answer", False, 0.25),
        ("</think><answer></answer>", "think_answer", True, 1.0),  # the prompt ends with <think>
        ("<think></think><answer></answer>", "think_answer", True, 1.0),
        ("<think><think></think><answer></answer>", "think_answer", False, 0.75),
        ("<answer>1</answer><answer>2</answer>", "think_answer", False, 0.0),
        ("<think>a</think>\n\nb", "think_summary", False, 1.0),
        ("|special_token|a|special_token|b", "special_token", False, 1.0),
        ("a|special_token|b", "special_token", True, 1.0),
        ("|special_token|a", "special_token", False, 0.5),
        ("|special_token|a|special_token|b|special_token|", "special_token", False, 0.0),
        ("", "think_answer", False, 0.0),
        ("", "think_answer", True, 0.0),
        ("", "special_token", False, 0.0),
        ("", "special_token", True, 0.0),
        ("no tags at all", "think_summary", False, 0.0),
        ("<THINK>a</THINK>", "think_answer", False, 0.0),
        ("<think>" * 100_000, "think_answer", False, 0.0),
    ],
)
def test_share_of_tags(completion: str, layout: str, prefilled: bool, expected: float) -> None:
    values = tag_count([""], [completion], [[]], response_format=[layout], prefilled=[prefilled])
    assert values == pytest.approx([expected])
