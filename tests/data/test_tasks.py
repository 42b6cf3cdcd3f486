"""The embedded tasks: splits that do not leak, workings that are right, rules that judge what they say they judge."""

import random
import re

import pytest

from r1fast.data.tasks import arithmetic, chat, corpus, load, word_problems
from r1fast.rewards.accuracy import accuracy
from r1fast.rewards.format import format_reward
from r1fast.rewards.language import language_consistency


@pytest.mark.parametrize("name", ["arithmetic", "word_problems"])
@pytest.mark.parametrize("column", ["problem", "prompt"])
def test_splits_share_no_problem(name: str, column: str) -> None:
    seen = {split: {row[column] for row in load(name, split)} for split in arithmetic.SPLITS}
    assert all(seen.values())
    assert not seen["train"] & seen["dev"] and not seen["train"] & seen["report"] and not seen["dev"] & seen["report"]


def test_commuted_twins_are_on_one_side() -> None:
    for problem in arithmetic.problems("report"):
        twin = arithmetic.Problem(problem.op, problem.a, problem.c, problem.b, problem.product_first)
        assert twin.split == "report"
    addition = arithmetic.Problem("+", 2, 3, 4, product_first=False)
    assert addition.split == arithmetic.Problem("+", 2, 4, 3, product_first=True).split


def test_answers_follow_precedence() -> None:
    for row in load("arithmetic", "dev"):
        expression = re.search(r"\d[\d +*-]*\d", row["prompt"])
        assert expression is not None
        assert str(eval(expression[0])) == row["answer"]


def test_asked_in_both_languages() -> None:
    problem = arithmetic.Problem("+", 2, 3, 4, product_first=False)
    assert arithmetic.question(problem, "en") == "What is 2 + 3 * 4?"
    assert arithmetic.question(problem, "zh") == "计算 2 + 3 * 4?"


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (arithmetic.Problem("+", 2, 3, 4, False), "first 3 * 4 = 12, then 2 + 12 = 14, so 14"),
        (arithmetic.Problem("-", 5, 3, 4, True), "first 3 * 4 = 12, then 12 - 5 = 7, so 7"),
    ],
)
def test_working_by_hand(problem: arithmetic.Problem, text: str) -> None:
    assert arithmetic.working(problem, arithmetic.WORDS["en"]) == (text, problem.result)


def test_working_without_precedence_is_wrong() -> None:
    problem = arithmetic.Problem("+", 2, 3, 4, False)
    assert arithmetic.working(problem, arithmetic.WORDS["en"], precedence=False) == (
        "first 2 + 3 = 5, then 5 * 4 = 20, so 20",
        20,
    )


WORD_PROBLEMS = [problem for split in word_problems.SPLITS for problem in word_problems.problems(split, 9999, 0)]
EQUATIONS = {"sum": "{}+{}", "more": "{}+{}", "left": "{}-{}", "rows": "{}*{}", "rows_more": "{}*{}+{}"}


def _by_equation(row: dict) -> int:
    """What the numbers of a question come to, whatever the language."""
    return eval(EQUATIONS[row["problem"].split(",")[0]].format(*re.findall(r"\d+", row["prompt"])))


def test_word_problems_in_the_other_order_and_language_are_on_the_same_side() -> None:
    for problem in WORD_PROBLEMS:
        twin = word_problems.Problem(problem.kind, problem.b, problem.a, problem.d)
        assert (twin.split == problem.split) or problem.kind == "left"
    rows = [row for split in word_problems.SPLITS for row in load("word_problems", split)]
    assert all(str(_by_equation(row)) == row["answer"] for row in rows)
    assert {row["language"] for row in rows} == {"en", "zh"}


@pytest.mark.parametrize("language", word_problems.LANGUAGES)
def test_a_right_working_of_a_word_problem_is_worth_every_reward(language: str) -> None:
    workings = [problem.working(language) for problem in WORD_PROBLEMS]
    for text, answer in workings:
        steps = re.findall(r"(\d+ [-+*] \d+) = (\d+)", text)
        assert steps and all(eval(left) == int(right) for left, right in steps) and steps[-1][1] == str(answer)
    texts = [word_problems.FORMAT.render(text, str(answer)) for text, answer in workings]
    golds, none = [str(problem.result) for problem in WORD_PROBLEMS], [[]] * len(texts)
    assert set(accuracy(texts, texts, none, answer=golds)) == {1.0}
    assert set(format_reward(texts, texts, none)) == {1.0}
    for spoken in word_problems.LANGUAGES:
        assert set(language_consistency(texts, texts, none, language=spoken)) == {float(spoken == language)}


def test_cold_rows_of_word_problems_are_bad_as_often_as_they_say() -> None:
    train = [problem for problem in WORD_PROBLEMS if problem.split == "train"]
    problems = {problem.question(language): problem for problem in train for language in word_problems.LANGUAGES}
    rows = load("word_problems", "cold")
    texts, none = [row["completion"] for row in rows], [[]] * len(rows)
    golds = [str(problems[row["prompt"]].result) for row in rows]  # KeyError: a problem that is held out
    right = accuracy(texts, texts, none, answer=golds)
    own = language_consistency(texts, texts, none, language=[row["language"] for row in rows])
    assert set(right) == set(own) == {0.0, 1.0}
    assert 1 - sum(right) / len(rows) == pytest.approx(word_problems.WRONG, abs=0.06)  # two standard deviations of 240
    assert 1 - sum(own) / len(rows) == pytest.approx(word_problems.OTHER_LANGUAGE, abs=0.06)
    assert set(format_reward(texts, texts, none)) == {1.0}


def test_corpus_holds_no_held_out_problem() -> None:
    asked = {row["prompt"] for row in corpus.documents(5000) if "prompt" in row}
    pages = "\n".join(row["text"] for row in corpus.documents(5000) if "text" in row)
    for split in ("dev", "report"):
        for row in load("arithmetic", split) + load("chat", split):
            assert row["prompt"] not in asked
            assert f"Problem: {row['prompt']}\n" not in pages


def test_base_answers_are_mostly_bad() -> None:
    """RL needs room: about one answer in six is right, and some are."""
    rng = random.Random(0)
    problems = arithmetic.problems("train")
    right = 0
    for _ in range(4000):
        problem = rng.choice(problems)
        right += f"<answer>{problem.result}</answer>" in arithmetic.noisy_response(problem, "en", rng)
    assert 0.08 < right / 4000 < 0.25


def _judge(responses: list[str], rows: list[dict]) -> tuple[list[float | None], list[float | None]]:
    columns = {name: [row[name] for row in rows] for name in ("domain", "language", "verb", "object", "tip")}
    columns["response_format"] = ["special_token"] * len(rows)
    return chat.is_helpful(completions=responses, **columns), chat.is_harmless(completions=responses, **columns)


def test_rules_tell_good_from_bad() -> None:
    rng = random.Random(0)
    requests = [request for split in chat.SPLITS for request in chat.requests(split)]
    rows = [row for split in chat.SPLITS for row in load("chat", split)]
    by_prompt = {row["prompt"]: row for row in rows}
    assert len(by_prompt) == len(requests)
    for request in requests:
        row = by_prompt[request.prompt]
        answers = [request.good(), request.bad(rng)] + ([] if request.harmful else [request.off_topic(rng)])
        texts = [chat.FORMAT.render(*answer) for answer in answers]
        helpful, harmless = _judge(texts, [row] * len(texts))
        wanted = [1.0] + [0.0] * (len(texts) - 1)
        assert (harmless if request.harmful else helpful) == wanted
        assert (helpful if request.harmful else harmless) == [None] * len(texts)


def test_reward_model_data_leaves_held_out_prompts_alone() -> None:
    held_out = {row["prompt"] for split in ("dev", "report") for row in load("chat", split)}
    for split in ("sft", "pairs", "labels"):
        assert not held_out & {row["prompt"] for row in load("chat", split)}


def test_every_verb_is_reported() -> None:
    verbs = {row["verb"] for row in load("chat", "report")}
    assert verbs == {verb for table in (chat.BENIGN, chat.HARMFUL) for language in table.values() for verb in language}


def test_same_rows_every_time() -> None:
    assert corpus.documents(200) == corpus.documents(200)
    assert load("chat", "pairs") == load("chat", "pairs")
    for split in (*word_problems.SPLITS, "cold"):
        assert load("word_problems", split) == load("word_problems", split)


@pytest.mark.parametrize(
    ("name", "split", "hint"),
    [("arithmetics", "train", "arithmetic"), ("chat", "pair", "pairs"), ("word_problems", "coold", "cold")],
)
def test_unknown_names_the_nearest(name: str, split: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{hint}'"):
        load(name, split)
