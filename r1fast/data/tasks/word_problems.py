"""Word problems of one or two steps, asked and worked in English or Chinese: for a model that can read.

`Tom has 12 apples and buys 7 more. How many apples does he have now?` is worked `Tom has 12 and buys 7: 12 + 7 = 19.`
Cold-start rows are what a hasty collection gives: a third of the answers are wrong, a quarter of the workings are in
the other language. The same problem, in both languages and both orders, is always on the same side of the split.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from r1fast.data.templates import RESPONSE_FORMATS

LANGUAGES = ("en", "zh")
SPLITS = ("train", "dev", "report")
FORMAT = RESPONSE_FORMATS["think_answer"]
WRONG, OTHER_LANGUAGE = 0.33, 0.25  # shares of the cold-start rows
COLD_PROBLEMS = 24  # of each kind


@dataclass(frozen=True)
class Story:
    """How one kind of problem is told, and worked, in each language; {c} is the first step's value, {r} the result."""

    question: dict[str, str]
    working: dict[str, str]
    numbers: tuple[range, range]
    step: Callable[[int, int], int]
    last: Callable[[int, int], int] = lambda c, d: c  # of two steps
    then: range = range(1)


def _add(a: int, b: int) -> int:
    return a + b


def _subtract(a: int, b: int) -> int:
    return a - b


def _multiply(a: int, b: int) -> int:
    return a * b


_SMALL, _LARGE = range(2, 10), range(11, 60)
STORIES = {
    "sum": Story(
        {"en": "What is {a} + {b}?", "zh": "{a} + {b} 是多少?"},
        {"en": "I add them: {a} + {b} = {r}.", "zh": "加起来: {a} + {b} = {r}."},
        (_LARGE, _LARGE), _add,
    ),
    "more": Story(
        {"en": "Tom has {a} apples and buys {b} more. How many apples does he have now?",
         "zh": "小明有 {a} 本书, 又来 {b} 本. 小明有多少本书?"},
        {"en": "Tom has {a} and buys {b}: {a} + {b} = {r}.", "zh": "小明有 {a} 本, 又来 {b} 本: {a} + {b} = {r}."},
        (_LARGE, _SMALL), _add,
    ),
    "left": Story(
        {"en": "Anna had {a} coins and gave away {b}. How many coins are left?",
         "zh": "小明有 {a} 本书, 少了 {b} 本. 还有多少本书?"},
        {"en": "Anna gave {b} of {a} away: {a} - {b} = {r}.", "zh": "小明少了 {b} 本: {a} - {b} = {r}."},
        (_LARGE, _SMALL), _subtract,
    ),
    "rows": Story(
        {"en": "There are {a} rows of {b} chairs. How many chairs are there?",
         "zh": "有 {a} 天, 一天 {b} 人. 一共多少人?"},
        {"en": "There are {a} rows of {b}: {a} * {b} = {r}.", "zh": "{a} 天, 一天 {b} 人: {a} * {b} = {r}."},
        (_SMALL, _SMALL), _multiply,
    ),
    "rows_more": Story(
        {"en": "There are {a} rows of {b} chairs, and {d} more. How many chairs are there?",
         "zh": "有 {a} 天, 一天 {b} 人, 又来 {d} 人. 一共多少人?"},
        {"en": "The rows have {a} * {b} = {c}. With {d} more: {c} + {d} = {r}.",
         "zh": "{a} * {b} = {c}. 又来 {d} 人: {c} + {d} = {r}."},
        (_SMALL, _SMALL), _multiply, _add, _SMALL,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    kind: str
    a: int
    b: int
    d: int

    @property
    def result(self) -> int:
        story = STORIES[self.kind]
        return story.last(story.step(self.a, self.b), self.d)

    @property
    def canonical(self) -> str:
        """The same for both orders of what is added or multiplied."""
        pair = (self.a, self.b) if self.kind == "left" else sorted((self.a, self.b))
        return ",".join(map(str, (self.kind, *pair, self.d)))

    @property
    def split(self) -> str:
        bucket = hashlib.sha256(self.canonical.encode()).digest()[0]
        return "train" if bucket < 205 else "dev" if bucket < 225 else "report"

    def question(self, language: str) -> str:
        return STORIES[self.kind].question[language].format(a=self.a, b=self.b, d=self.d)

    def working(self, language: str, slip: int = 0) -> tuple[str, int]:
        """The working and the answer it comes to; `slip` is added to the last value."""
        story, answer = STORIES[self.kind], self.result + slip
        values = {"a": self.a, "b": self.b, "c": story.step(self.a, self.b), "d": self.d, "r": answer}
        return story.working[language].format(**values), answer


def problems(split: str, most: int, seed: int) -> list[Problem]:
    """At most so many of each kind, drawn with this seed."""
    rng, found = random.Random(seed), []
    for kind, story in STORIES.items():
        every = [Problem(kind, *numbers) for numbers in product(*story.numbers, story.then)]
        ours = [problem for problem in every if problem.split == split]
        found += rng.sample(ours, min(most, len(ours)))
    return found


def prompts(split: str) -> list[dict]:
    """Rows {prompt, answer, language, domain, problem} of a split, in a fixed order."""
    most = {"train": 200, "dev": 12, "report": 12}[split]
    rows = [
        {"prompt": problem.question(language), "answer": str(problem.result), "language": language,
         "domain": "reasoning", "problem": problem.canonical}
        for problem, language in product(problems(split, most, SPLITS.index(split)), LANGUAGES)
    ]  # fmt: skip
    random.Random(0).shuffle(rows)
    return rows


def cold_rows() -> list[dict]:
    """Rows {prompt, completion, language} of the train split, of which many are bad."""
    rng, rows = random.Random(3), []
    for problem, language in product(problems("train", COLD_PROBLEMS, 3), LANGUAGES):
        spoken = LANGUAGES[1 - LANGUAGES.index(language)] if rng.random() < OTHER_LANGUAGE else language
        slip = rng.choice((-10, -2, -1, 1, 2, 10)) if rng.random() < WRONG else 0
        text, answer = problem.working(spoken, slip)
        row = {"prompt": problem.question(language), "completion": FORMAT.render(text, str(answer))}
        rows.append(row | {"language": language})
    rng.shuffle(rows)
    return rows
