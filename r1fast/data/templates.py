"""Prompt templates and response formats of the R1 papers: pure string work, no tokenizer library, no torch.

Parsing is linear-time string search: what a model writes may be hostile.
Sources: DeepSeek-R1 v1 Table 1 and section 2.3.1, v2 listings 5-7, the tokenizer_config of the released checkpoints.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from r1fast.wording import did_you_mean, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

MIN_REASONING_CHARS = 4  # an empty <think></think> before a guess is the first thing a policy finds: it must not pay


@dataclass(frozen=True)
class Parsed:
    """What a completion holds; `reasoning` and `answer` are stripped, and None where the part is absent.

    `well_formed`: the whole text is one reasoning and one answer, each tag once and in order, neither part empty.
    `closed`: the text itself ends the answer. Formats without a closing tag are closed by the end-of-sequence token
    alone, so there it is always False and the caller looks at the finish reason.
    """

    reasoning: str | None
    answer: str | None
    well_formed: bool
    closed: bool


@dataclass(frozen=True)
class ResponseFormat:
    """Layout of a completion: think_open, R, think_close, answer_open, A, answer_close."""

    think_open: str
    think_close: str
    answer_open: str = ""
    answer_close: str = ""
    inner: str = ""  # whitespace on both sides of the reasoning
    outer: str = ""  # whitespace before the answer part

    @property
    def prefill(self) -> str:
        """What a prompt ends with when it already opens the reasoning for the model."""
        return self.think_open + self.inner

    def render(self, reasoning: str, answer: str) -> str:
        think = f"{self.prefill}{reasoning}{self.inner}{self.think_close}"
        return f"{think}{self.outer}{self.answer_open}{answer}{self.answer_close}"

    def is_prefilled(self, prompt_text: str) -> bool:
        """True if the rendered prompt ends with the opening of the reasoning (some chat templates do that)."""
        return prompt_text.rstrip().endswith(self.think_open)

    def parse(self, text: str, prefilled: bool = False) -> Parsed:
        """Splits a completion; `prefilled` means that the prompt, not the completion, holds think_open.

        A malformed text still gives what can be found: reasoning between the first opening and the first closing tag
        (to the end when it was cut off), and the last answer part.
        """
        full = self.think_open + text if prefilled else text
        reasoning, after = self._split_reasoning(full)
        answer, closed = after, False
        if after is not None and self.answer_open:
            _, opened, tail = after.rpartition(self.answer_open)
            answer = tail.partition(self.answer_close)[0] if opened else None
            closed = bool(opened) and self.answer_close in tail
        reasoning, answer = (part if part is None else part.strip() for part in (reasoning, answer))
        return Parsed(reasoning, answer, self._is_well_formed(full, reasoning, answer), closed)

    def _split_reasoning(self, text: str) -> tuple[str | None, str | None]:
        """(reasoning, what follows it); either is None where no tag delimits it."""
        before, opened, rest = text.partition(self.think_open)
        if opened and self.think_close in rest:
            return rest.partition(self.think_close)[0], rest.rpartition(self.think_close)[2]
        if self.think_open == self.think_close:  # one marker only: it closes the reasoning unless nothing precedes it
            return (before, rest) if opened and before.strip() else (rest if opened else None, None)
        before, closed, after = text.rpartition(self.think_close)
        if closed:
            return before, after
        if self.answer_open:  # the answer part has tags of its own, so it is found without the reasoning's end
            return (rest.partition(self.answer_open)[0] if opened else None), text
        return (rest if opened else None), None

    def _is_well_formed(self, text: str, reasoning: str | None, answer: str | None) -> bool:
        """Nothing but white space before, between or after the parts, and each tag once."""
        if not reasoning or not answer or len("".join(reasoning.split())) < MIN_REASONING_CHARS:
            return False
        tags = [tag for tag in (self.think_open, self.think_close, self.answer_open, self.answer_close) if tag]
        pieces = [text]
        for tag in tags:
            pieces += pieces.pop().split(tag, 1)
        expected = ["", reasoning, "", answer, ""] if self.answer_open else ["", reasoning, answer]
        is_alone = [piece.strip() for piece in pieces] == expected
        return is_alone and not any(tag in part for tag in tags for part in (reasoning, answer))


Messages = list[dict[str, Any]]


def target_text(target: str | Messages, layout: ResponseFormat) -> str:
    """A completion as text: of a chat its last turn, the reasoning of which is rendered in `layout`."""
    if isinstance(target, str):
        return target
    content, reasoning = target[-1]["content"], target[-1].get("reasoning_content")
    return layout.render(reasoning.strip(), content.strip()) if reasoning else content


def without_opening(target: str, prompt_text: str, layout: ResponseFormat) -> str:
    """`target` without what the rendered prompt ends with: the opening of the reasoning, whatever the white space.

    A template of R1-Distill ends in "<think>\\n", others in an empty reasoning; a target that begins with the same
    would hold it twice.
    """
    _, opened, tail = prompt_text.rpartition(layout.think_open)
    held = "".join([opened, *tail.split()])
    is_opening = held in (layout.think_open, layout.think_open + layout.think_close)
    opening = is_opening and re.match("".join(rf"\s*{re.escape(character)}" for character in held), target)
    if not opening:
        return target
    rest = target[opening.end() :]
    for character in prompt_text[len(prompt_text.rstrip()) :]:  # the white space that is there already
        rest = rest.removeprefix(character)
    return rest


RESPONSE_FORMATS: dict[str, ResponseFormat] = {
    "think_answer": ResponseFormat("<think>", "</think>", "<answer>", "</answer>"),
    "special_token": ResponseFormat("|special_token|", "|special_token|"),
    "think_summary": ResponseFormat("<think>", "</think>", inner="\n", outer="\n\n"),
}


def get_response_format(name: str) -> ResponseFormat:
    if name not in RESPONSE_FORMATS:
        hint = did_you_mean(name, RESPONSE_FORMATS)
        raise ValueError(f"unknown response format {name!r}, expected one of {sorted(RESPONSE_FORMATS)}{hint}")
    return RESPONSE_FORMATS[name]


BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"

R1_ZERO = (  # up to the question
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: "
)

FEW_SHOT_STOP = "\n\nProblem:"  # a base model goes on with the next problem: cut its completion here
FEW_SHOT_EXAMPLES: tuple[dict[str, str], ...] = (
    {
        "prompt": "What is the square root of 9 plus 5?",
        "reasoning": "The square root of 9 is 3, because 3 * 3 = 9. Then I add 5: 3 + 5 = 8. "
        "Let me check: 8 - 5 = 3, and 3 squared is 9. That is right.",
        "answer": "The answer is 8.",
    },
    {
        "prompt": "A train travels at 60 miles per hour for 2 hours. How many miles does it travel?",
        "reasoning": "Distance is speed times time. The speed is 60 and the time is 2, so 60 * 2 = 120. "
        "Let me check: half of 120 is 60, one hour's way. That is right.",
        "answer": "The answer is 120.",
    },
)


@dataclass(frozen=True)
class PromptTemplate:
    response_format: str  # of the prefill, and of the examples of few_shot, when the caller names none
    before: str = ""  # a single question
    after: str = ""
    gap: str = ""  # before a prefill


# Of a call of a chat template.
_SET_BY_THE_CALL = frozenset((
    "messages", "conversation", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "strftime_now", "tokenize", "today",
))  # fmt: skip

PROMPT_TEMPLATES: dict[str, PromptTemplate] = {
    "r1_zero": PromptTemplate("think_answer", R1_ZERO, ". Assistant:", gap=" "),
    "chat": PromptTemplate("think_summary"),
    "few_shot": PromptTemplate("special_token", "Problem: ", "\nSolution:", gap=" "),
    "plain": PromptTemplate("think_answer"),
    "tokenizer": PromptTemplate("think_summary"),
}


def render_prompt(
    prompt: str | Messages,
    template: str,
    *,
    tokenizer: "Tokenizer | None" = None,
    examples: Sequence[dict[str, str]] = FEW_SHOT_EXAMPLES,
    response_format: str | None = None,
    prefill_think: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text that the model continues.

    prompt: a question, or chat messages ({"role", "content"}) that end with the user's turn, or the answer of a tool.
    tokenizer: for 'tokenizer' its chat template; for 'chat' its bos and eos tokens (default: DeepSeek's).
    examples: for 'few_shot', dicts with prompt, reasoning and answer.
    response_format: layout of the examples and of the prefill (default: the template's own).
    prefill_think: end the prompt with the opening of the reasoning; rewards then need `prefilled`.
    variables: for 'tokenizer' what render_chat takes: tools, today, and variables of the chat template.
    """
    chosen = PROMPT_TEMPLATES[template]
    layout = get_response_format(response_format or chosen.response_format)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if template != "tokenizer" and ((variables or {}).get("tools") or any(map(_is_of_tools, messages))):
        raise ValueError(f"prompt template {template!r} shows no tools, their calls and answers; use 'tokenizer'")
    if template == "chat":
        text = _render_chat(messages, tokenizer)
    elif template == "tokenizer":
        text = _render_by_tokenizer(messages, tokenizer, variables or {})
        prefill_think = prefill_think and not layout.is_prefilled(text)  # R1-Distill's own already opens the reasoning
    else:
        if len(messages) != 1:
            roles = [message["role"] for message in messages]
            raise ValueError(f"prompt template {template!r} takes one user message, got roles {roles}; use 'chat'")
        text = f"{chosen.before}{messages[0]['content']}{chosen.after}"
    if template == "few_shot":
        shots = [worked_example(x["prompt"], x["reasoning"], x["answer"], layout) for x in examples]
        text = "\n\n".join([*shots, text])
    return f"{text}{chosen.gap}{layout.prefill}" if prefill_think else text


def worked_example(question: str, reasoning: str, answer: object, layout: ResponseFormat) -> str:
    """As few_shot shows it: what elicits long reasoning from a base model (v1 section 2.3.1)."""
    return f"Problem: {question}\nSolution: {layout.render(reasoning, f'Summary: {answer}')}"


def _render_chat(messages: Messages, tokenizer: "Tokenizer | None") -> str:
    """The released models' layout: no newlines between turns, assistant turns end with the end-of-sentence token."""
    bos, eos = (BOS, EOS) if tokenizer is None else (tokenizer.bos_token or "", tokenizer.eos_token or "")
    around = {"system": ("", ""), "user": (USER, ""), "assistant": (ASSISTANT, eos)}
    turns = [_without_reasoning(turn).join(around[turn["role"]]) for turn in messages]
    return "".join([bos, *turns, ASSISTANT])


def _without_reasoning(turn: dict[str, Any]) -> str:
    """As the released template has it: earlier turns of the assistant keep the answer and lose the reasoning."""
    content = turn["content"]
    return content.rpartition("</think>")[2] if turn["role"] == "assistant" else content


def _is_of_tools(turn: dict[str, Any]) -> bool:
    return turn["role"] == "tool" or "tool_calls" in turn


def _render_by_tokenizer(messages: Messages, tokenizer: "Tokenizer | None", variables: Mapping[str, Any]) -> str:
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError(
            f"prompt template 'tokenizer' needs a tokenizer with a chat_template, got {type(tokenizer).__name__} "
            "without one; use 'chat', 'r1_zero' or 'plain'"
        )
    return render_chat(messages, tokenizer, **variables)


def render_chat(
    messages: Messages,
    tokenizer: "Tokenizer",
    *,
    tools: list[dict[str, Any]] | None = None,
    today: date | None = None,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """What the model continues, by the tokenizer's chat template; ValueError where that fails, or leaves out a turn.

    tools: functions that the model may call. today: what strftime_now says; None: the clock.
    continue_final_message: the last turn is the beginning of the answer. variables: of the template (enable_thinking).
    """
    variables["continue_final_message" if continue_final_message else "add_generation_prompt"] = True
    if tools:
        variables["tools"] = tools
    try:
        if today is not None and "strftime_now" in str(tokenizer.chat_template):
            variables["chat_template"] = _without_clock(tokenizer.get_chat_template(tools=tools or None), today)
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **variables))
    except Exception as error:  # a template is a program: raise_exception, an undefined name, 1 / 0, ...
        raise ValueError(f"the tokenizer's chat template fails on it: {one_line(error)}") from error
    for message in messages:
        content = _without_reasoning(message).strip()
        # Llama's writes what a tool answers as JSON.
        if content not in text and not (message["role"] == "tool" and _inside_json(content) in text):
            raise ValueError(
                f"the tokenizer's chat template leaves out the turn of {message['role']!r} {content[:40]!r}; "
                "put it into another turn, or use another prompt_template"
            )
    called = [call for message in messages for call in message.get("tool_calls", ())]
    for what, named in (("tool", tools or ()), ("call of", called)):
        for name in (tool.get("function", tool)["name"] for tool in named):
            if name not in text:
                raise ValueError(f"the tokenizer's chat template leaves out the {what} {name}; take it out of the rows")
    return text


@lru_cache(maxsize=64)
def check_variables(template: str, names: tuple[str, ...]) -> None:
    """ValueError for a name that is no variable of this chat template, or that the call sets itself."""
    read = set(re.findall(r"[A-Za-z_]\w*", template))
    for name in names:
        if name in _SET_BY_THE_CALL:
            raise ValueError(f"chat_template_kwargs: {name} is what the prompt itself says; drop it")
        if name not in read:
            what = f"chat_template_kwargs: the tokenizer's chat template does not read {name!r}"
            raise ValueError(f"{what}, so that it would change nothing; drop it{did_you_mean(name, read)}")


def _inside_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _without_clock(template: str, today: date) -> str:
    """The template with a strftime_now of its own: a function that is passed becomes a text in transformers 5."""
    directives = [*("%-" + letter for letter in "dHIjmMSy"), *("%" + letter for letter in "aAbBcdDeFHIjmMpSTuwxXyY")]
    replaced = "".join(f"|replace({name!r}, {today.strftime(name)!r})" for name in directives)
    return "{%- macro strftime_now(format) -%}{{- format" + replaced + " -}}{%- endmacro +%}" + template
