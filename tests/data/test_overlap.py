"""n-grams in common with a test, and near duplicates: by hand, in Chinese too, against all pairs, in linear time."""

import random
import time

import pytest

from r1fast.data.overlap import BOILERPLATE, SHINGLE, contaminated, near_duplicates, ngrams, words_of

TEST = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
BOX = "Please reason step by step, and put your final answer within \\boxed{}."


def test_words() -> None:
    assert words_of("Don't  PANIC: x^2+3_x = ４２!") == ["don", "t", "panic", "x", "2", "+", "3", "x", "42"]
    assert words_of("小明有3个苹果。AB") == ["小", "明", "有", "3", "个", "苹", "果", "ab"]
    assert words_of("?! +") == ["?!", "+"] and words_of(" ") == []
    assert words_of("Cafe\u0301 हिन्दी が 한국어") == ["cafe", "हनद", "が", "한국어"]
    assert words_of("2 − 3×(-4) = x/y") == ["2", "-", "3", "*", "-", "4", "=", "x", "/", "y"]
    assert words_of("- 3 x-rays and/or **4**\n* 5") == ["3", "x", "rays", "and", "or", "4", "5"]
    assert list(ngrams(["a", "b", "c"], 2)) == ["a b", "b c"] and list(ngrams(["a"], 2)) == ["a"]


@pytest.mark.parametrize(
    ("text", "n", "hit"),
    [
        ("In April NATALIA sold clips\nto 48 of her friends, so", 8, "natalia sold clips to 48 of her friends"),
        ("Natalia sold clips to 47 of her friends in May.", 8, None),
        ("Natalia sold clips to 48 of her friends", 13, None),  # 8 words are no 13
        ("she sold half as many clips in May", 8, "she sold half as many clips in may"),
        ("", 8, None),
    ],
)  # fmt: skip
def test_a_run_of_words_of_a_test(text: str, n: int, hit: str | None) -> None:
    assert contaminated(["other", text], [TEST], n) == ({} if hit is None else {1: hit})


def test_lines_and_signs_do_not_hide_a_test() -> None:
    """A text that is wrapped otherwise, or has the test in the middle of something longer."""
    wrapped = TEST.replace(" ", "\n\n* ")
    assert set(contaminated([f"Story. {'filler ' * 500} {wrapped} {'more ' * 500}"], [TEST], 13)) == {0}


def test_short_prompts_are_compared_as_a_whole() -> None:
    texts = ["What is 2 + 3?", "what is 2+3", "What is 2 + 4?", "So what is 2 + 3?", "hello", "What is 2-3?"]
    assert set(contaminated(texts, ["What is 2+3 ?", "Hello!"], 13)) == {0, 1, 4}


def test_chinese_has_no_spaces() -> None:
    known = ["小明有三个苹果，他又买了五个苹果，现在一共有多少个苹果？"]
    texts = [
        "题目：小明有三个苹果, 他又买了五个苹果。一共多少？",
        "小红有三个橘子，她又买了五个橘子，现在一共有多少个橘子？",
    ]
    assert contaminated(texts, known, 13) == {0: "小 明 有 三 个 苹 果 他 又 买 了 五 个"}


def test_an_instruction_around_every_question_is_no_contamination() -> None:
    """An instruction that more than ten different tests have; the same test, repeated for more samples, is one."""
    known = [f"{word} is asked here alone and nowhere else at all. {BOX}" for word in "abcdefghijk"]
    assert len(known) > BOILERPLATE
    assert contaminated([f"Something else. {BOX}", known[3]], known, 8) == {1: "d"}
    assert contaminated([f"Something else. {BOX}"], known[:3], 8) == {0: "please reason step by step and put your"}
    assert set(contaminated([TEST], [TEST] * 64, 8)) == {0}


def test_the_last_words_of_an_instruction_are_no_contamination_either() -> None:
    """One word of the question after twelve of the instruction is a run of thirteen that few tests have."""
    ask = "Work out the value of this expression step by step and box the final result: {}"
    known = [ask.format(f"{i} * 7 + 5") for i in range(BOILERPLATE + 2)]
    texts = [ask.format("3 * 8 - 1"), ask.format("3 * 7 + 5"), "3*7+5", ask.format("3 + 7 * 5"), ask.format("")]
    assert contaminated(texts, known, 13) == {1: "3 * 7 + 5", 2: "3 * 7 + 5"}


def test_near_duplicates_keep_the_first() -> None:
    words = [f"w{i}" for i in range(54)]  # 50 shingles of five
    changed = [*words[:-1], "other"]  # 49 in common of 51: 0.96
    middle = [*words[:20], "other", *words[21:]]  # 45 of 55: 0.82
    texts = [" ".join(x) for x in (words, changed, words[:40], middle, words, ["something", "else"])]
    assert near_duplicates(texts, 0.8) == {1: 0, 3: 0, 4: 0}
    assert near_duplicates(texts, 0.82) == {1: 0, 4: 0}
    assert near_duplicates(texts, 1.0) == {4: 0}
    assert near_duplicates(["a b", "A, b!", "b a", "", ""], 1.0) == {1: 0, 4: 3}
    assert near_duplicates(["12 * 7 + 5", "12 + 7 * 5", "12*7 + 5"], 0.8) == {2: 0}
    assert near_duplicates([], 0.8) == {}


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_near_duplicates_are_those_of_all_pairs(threshold: float) -> None:
    rng = random.Random(0)
    texts = []
    for _ in range(60):
        base = [rng.choice("abcdefgh") for _ in range(rng.randint(1, 30))]
        for _ in range(rng.randint(1, 4)):
            texts.append(" ".join(word if rng.random() > 0.03 else "x" for word in base))
    sets = [set(ngrams(words_of(text), SHINGLE)) for text in texts]
    staying: list[int] = []
    for i, some in enumerate(sets):
        if all(len(some & sets[j]) < threshold * len(some | sets[j]) for j in staying):
            staying.append(i)
    found = near_duplicates(texts, threshold)
    assert [i for i in range(len(texts)) if i not in found] == staying
    assert all(len(sets[i] & sets[j]) >= threshold * len(sets[i] | sets[j]) and j in staying for i, j in found.items())


def test_rows_of_one_pattern_take_linear_time() -> None:
    """Every two of them are alike, though not enough: a comparison of all pairs would take minutes."""
    rng = random.Random(0)
    frame = "{} has {} apples and buys {} more at the market on Monday morning and then {} more from a friend in town"
    texts = [frame.format(rng.choice("ABCDEFGH"), *(rng.randint(2, 99) for _ in range(3))) for _ in range(12_000)]
    start = time.process_time()
    near_duplicates(texts, 0.8)
    assert time.process_time() - start < 20
