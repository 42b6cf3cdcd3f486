"""The embedded tasks: splits that do not leak, workings that are right, rules that judge what they say they judge."""

import random
import re

import pytest

from r1fast.data.tasks import arithmetic, chat, corpus, load


def test_splits_share_no_problem() -> None:
    seen = {split: {row["problem"] for row in load("arithmetic", split)} for split in arithmetic.SPLITS}
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


@pytest.mark.parametrize(("name", "split", "hint"), [("arithmetics", "train", "arithmetic"), ("chat", "pair", "pairs")])
def test_unknown_names_the_nearest(name: str, split: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{hint}'"):
        load(name, split)
