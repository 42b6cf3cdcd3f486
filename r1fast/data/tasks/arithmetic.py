"""Arithmetic with precedence, asked and worked in English or Chinese.

`What is 2 + 3 * 4?` is worked as `first 3 * 4 = 12, then 2 + 12 = 14, so 14`. The base corpus holds such workings
in many noisy ways (`noisy_response`): wrong precedence, slips, no working at all, languages mixed word by word, broken
tags. RL has to find the good way among them; a working in the prompt's language is what the language reward asks for.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product, starmap
from typing import Any

LANGUAGES = ("en", "zh")
SPLITS = ("train", "dev", "report")
MAX_ADDEND = 12
FACTORS = range(2, 10)

QUESTIONS = {"en": "What is {expression}?", "zh": "计算 {expression}?"}
# The three words of a working, by language: before the first step, before the second, before the result.
WORDS = {"en": ("first", "then", "so"), "zh": ("先算", "再算", "所以")}

# Shares of the base corpus (of worked and direct answers), chosen so that the base answers about one prompt in ten.
DIRECT, DIRECT_CORRECT = 0.40, 0.15
WRONG_PRECEDENCE, SLIP = 0.35, 0.06
WORDS_OF_PROMPT, WORDS_OF_OTHER = 0.35, 0.15
FULL_TAGS, BROKEN_TAGS = 0.33, 0.27


@dataclass(frozen=True)
class Problem:
    """`a op b * c`, or `b * c op a` when the product stands first."""

    op: str
    a: int
    b: int
    c: int
    product_first: bool

    @property
    def terms(self) -> list[Any]:
        factors = [self.b, "*", self.c]
        return [*factors, self.op, self.a] if self.product_first else [self.a, self.op, *factors]

    @property
    def result(self) -> int:
        return working(self, WORDS["en"])[1]

    @property
    def expression(self) -> str:
        return _written(self.terms)

    @property
    def canonical(self) -> str:
        """The same for commuted twins."""
        return f"{self.op},{self.a},{min(self.b, self.c)},{max(self.b, self.c)}"

    @property
    def split(self) -> str:
        """By the canonical problem, so that commuted twins share a side; independent of any run's seed."""
        bucket = hashlib.sha256(self.canonical.encode()).digest()[0]
        return "train" if bucket < 185 else "dev" if bucket < 205 else "report"


def problems(split: str) -> list[Problem]:
    """Every problem of a split with a result of zero or more."""
    every = starmap(Problem, product("+-", range(1, MAX_ADDEND + 1), FACTORS, FACTORS, (False, True)))
    return [problem for problem in every if problem.result >= 0 and problem.split == split]


def question(problem: Problem, language: str) -> str:
    return QUESTIONS[language].format(expression=problem.expression)


def prompts(split: str) -> list[dict]:
    """Rows {prompt, answer, language, domain, problem} of a split, in a fixed order, each problem in both languages."""
    rows = []
    for problem, language in product(problems(split), LANGUAGES):
        row = {"prompt": question(problem, language), "answer": str(problem.result), "language": language}
        rows.append(row | {"domain": "reasoning", "problem": problem.canonical})
    random.Random(0).shuffle(rows)
    return rows


def working(
    problem: Problem, words: tuple[str, str, str], *, precedence: bool = True, slip: int = 0
) -> tuple[str, int]:
    """The two steps and the result they lead to; `slip` is added to the first step's value."""
    terms = problem.terms
    start = terms.index("*" if precedence else problem.op) - 1
    step_1 = terms[start : start + 3]
    value = _value(*step_1) + slip
    step_2 = [*terms[:start], value, *terms[start + 3 :]]
    result = _value(*step_2)
    first, then, so = words
    text = f"{first} {_written(step_1)} = {value}, {then} {_written(step_2)} = {result}, {so} {result}"
    return text, result


def _value(left: int, op: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[op]


def _written(terms: list[Any]) -> str:
    return " ".join(map(str, terms))


def examples(count: int = 12) -> list[dict]:
    """Worked examples {prompt, reasoning, answer, language} for few-shot prompts, from the train split."""
    rows = []
    for problem, language in product(random.Random(1).sample(problems("train"), count), LANGUAGES):
        text, result = working(problem, WORDS[language])
        row = {"prompt": question(problem, language), "reasoning": text}
        rows.append(row | {"answer": str(result), "language": language})
    return rows


def noisy_words(language: str, rng: random.Random) -> tuple[str, str, str]:
    other = LANGUAGES[1 - LANGUAGES.index(language)]
    draw = rng.random()
    if draw < WORDS_OF_PROMPT:
        return WORDS[language]
    if draw < WORDS_OF_PROMPT + WORDS_OF_OTHER:
        return WORDS[other]
    first, then, so = (WORDS[rng.choice(LANGUAGES)][i] for i in range(3))
    return first, then, so


def noisy_response(problem: Problem, language: str, rng: random.Random) -> str:
    """One of the many ways in which the base corpus answers a question, most of them bad."""
    if rng.random() < DIRECT:
        correct = rng.random() < DIRECT_CORRECT
        result = problem.result if correct else rng.randint(0, 90)
        return _tagged("", result, rng)
    slip = rng.choice((-2, -1, 1, 2)) if rng.random() < SLIP else 0
    precedence = rng.random() >= WRONG_PRECEDENCE
    text, result = working(problem, noisy_words(language, rng), precedence=precedence, slip=slip)
    if result < 0 or result > 200:  # rare, and not worth a token of its own
        text, result = working(problem, noisy_words(language, rng))
    return _tagged(text, result, rng)


def _tagged(text: str, result: int, rng: random.Random) -> str:
    draw = rng.random()
    if draw < FULL_TAGS:
        return f"<think>{text}</think><answer>{result}</answer>"
    if draw < FULL_TAGS + BROKEN_TAGS:
        return rng.choice(
            (f"<think>{text}<answer>{result}</answer>", f"<think>{text}</think>{result}", f"{text}</think>{result}")
        )
    return text or str(result)


def facts(rng: random.Random) -> Iterator[str]:
    """Correct one-step facts, endless. Those of held-out problems occur too: composing them is what is held out."""
    while True:
        a, p = rng.randint(1, MAX_ADDEND), rng.choice(FACTORS) * rng.choice(FACTORS)
        draw = rng.random()
        if draw < 0.35:
            b, c = rng.choice(FACTORS), rng.choice(FACTORS)
            yield f"{b} * {c} = {b * c}"
        elif draw < 0.60:
            yield f"{a} + {p} = {a + p}"
        elif draw < 0.80:
            yield f"{p} + {a} = {p + a}"
        else:
            yield f"{max(p, a)} - {min(p, a)} = {abs(p - a)}"
