"""The base corpus of the from-scratch model: counting, facts, noisy question answering, few-shot pages, chat.

Rows are {text} for plain pages and {prompt, completion} for dialogues (rendered with the chat template by the stage).
"""

import random
from itertools import islice

from r1fast.data.tasks import arithmetic, chat
from r1fast.data.templates import RESPONSE_FORMATS, worked_example

COUNTING, FACTS, WORKED, FEW_SHOT = 0.01, 0.33, 0.44, 0.06  # the rest is chat
FACTS_PER_PAGE = 6


def documents(count: int = 60_000, seed: int = 0) -> list[dict]:
    """`count` documents; composed problems of the dev and report splits never occur."""
    rng = random.Random(seed)
    problems = arithmetic.problems("train")
    fact = arithmetic.facts(rng)
    requests = chat.requests("train")
    rows = []
    for _ in range(count):
        draw = rng.random()
        if draw < COUNTING:
            start = rng.randrange(0, 195)
            rows.append({"text": ", ".join(map(str, range(start, start + 12)))})
        elif draw < COUNTING + FACTS:
            rows.append({"text": ", ".join(islice(fact, FACTS_PER_PAGE))})
        elif draw < COUNTING + FACTS + WORKED:
            problem, language = rng.choice(problems), rng.choice(arithmetic.LANGUAGES)
            row = {"prompt": arithmetic.question(problem, language)}
            rows.append(row | {"completion": arithmetic.noisy_response(problem, language, rng)})
        elif draw < COUNTING + FACTS + WORKED + FEW_SHOT:
            rows.append({"text": few_shot_page(rng.sample(problems, 3), rng)})
        else:
            request = rng.choice(requests)
            reasoning, summary = request.written(rng)
            row = {"prompt": request.prompt}
            rows.append(row | {"completion": f"<think>{reasoning}</think>{summary}" if rng.random() < 0.5 else summary})
    return rows


def few_shot_page(problems: list[arithmetic.Problem], rng: random.Random) -> str:
    """Problem, Solution, Summary, a few times over, in one language: what cold-start collection prompts with."""
    language = rng.choice(arithmetic.LANGUAGES)
    parts = []
    for problem in problems:
        text, result = arithmetic.working(problem, arithmetic.WORDS[language], precedence=rng.random() < 0.8)
        if result < 0 or result > 200:
            text, result = arithmetic.working(problem, arithmetic.WORDS[language])
        question = arithmetic.question(problem, language)
        parts.append(worked_example(question, text, result, RESPONSE_FORMATS["special_token"]))
    return "\n\n".join(parts)
