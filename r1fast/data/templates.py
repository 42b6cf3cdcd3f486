"""Prompt templates and response formats of the R1 papers: pure string work, no tokenizer library, no torch.

A response format says how reasoning and answer are laid out in a completion. It renders training targets and parses
samples. Parsing is linear-time string search: no regular expression sees model output here.
A prompt template turns a question, or a list of chat messages, into the text that the model continues.
Sources: DeepSeek-R1 v1 Table 1 and section 2.3.1, v2 listings 5-7, the tokenizer_config of the released checkpoints.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

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
    """Layout of a completion: think_open, R, think_close, answer_open, A, answer_close.

    inner: whitespace rendered on both sides of the reasoning; outer: whitespace rendered before the answer part.
    """

    name: str
    think_open: str
    think_close: str
    answer_open: str = ""
    answer_close: str = ""
    inner: str = ""
    outer: str = ""

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
        answer, closed = self._split_answer(after)
        return Parsed(reasoning, answer, self._is_well_formed(full, reasoning, answer), closed)

    def _split_reasoning(self, text: str) -> tuple[str | None, str | None]:
        """(reasoning, what follows it); either is None where no tag delimits it."""
        before, opened, rest = text.partition(self.think_open)
        if opened and self.think_close in rest:
            reasoning = rest.partition(self.think_close)[0]
            return reasoning.strip(), rest.rpartition(self.think_close)[2]
        if self.think_open == self.think_close:  # one marker only: it closes the reasoning unless nothing precedes it
            return (before.strip(), rest) if opened and before.strip() else (rest.strip() if opened else None, None)
        before, found, after = text.rpartition(self.think_close)
        if found:
            return before.strip(), after
        if self.answer_open:  # the answer part has tags of its own, so it is found without the reasoning's end
            return (rest.partition(self.answer_open)[0].strip() if opened else None), text
        return (rest.strip() if opened else None), None

    def _split_answer(self, text: str | None) -> tuple[str | None, bool]:
        """(the last answer part, whether its closing tag is there)."""
        if text is None:
            return None, False
        if not self.answer_open:
            return text.strip(), False
        _, opened, tail = text.rpartition(self.answer_open)
        if not opened:
            return None, False
        answer, closed, _ = tail.partition(self.answer_close)
        return answer.strip(), bool(closed)

    def _is_well_formed(self, text: str, reasoning: str | None, answer: str | None) -> bool:
        if not reasoning or not answer or len("".join(reasoning.split())) < MIN_REASONING_CHARS:
            return False
        tags = [tag for tag in (self.think_open, self.think_close, self.answer_open, self.answer_close) if tag]
        if any(text.count(tag) != tags.count(tag) for tag in tags):
            return False
        # Rebuilt without the whitespace around its parts, the text must be exactly one response: nothing before,
        # between or after. Tags are unique by now, so this also fixes their order.
        pieces = [text.strip()]
        for tag in tags:
            head, _, tail = pieces.pop().partition(tag)
            pieces += [head.strip(), tail.strip()]
        expected = ["", reasoning, "", answer, ""] if self.answer_open else ["", reasoning, answer]
        return pieces == expected


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
    start = prompt_text.rfind(layout.think_open)
    held = "".join(prompt_text[start:].split()) if start >= 0 else ""
    if held not in (layout.think_open, layout.think_open + layout.think_close):
        return target
    rest = target
    for character in held:
        rest = rest.lstrip()
        if not rest.startswith(character):
            return target
        rest = rest[1:]
    for character in prompt_text[len(prompt_text.rstrip()) :]:  # the white space that is there already
        rest = rest.removeprefix(character)
    return rest


RESPONSE_FORMATS: dict[str, ResponseFormat] = {
    "think_answer": ResponseFormat("think_answer", "<think>", "</think>", "<answer>", "</answer>"),
    "special_token": ResponseFormat("special_token", "|special_token|", "|special_token|"),
    "think_summary": ResponseFormat("think_summary", "<think>", "</think>", inner="\n", outer="\n\n"),
}


def get_response_format(name: str) -> ResponseFormat:
    """The format of that name; ValueError with the nearest name otherwise."""
    if name not in RESPONSE_FORMATS:
        raise _unknown("response format", name, RESPONSE_FORMATS)
    return RESPONSE_FORMATS[name]


BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"

R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: {prompt}. Assistant:"
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
class RenderOptions:
    """Options of render_prompt after checking; `format` is never None."""

    tokenizer: Any
    format: ResponseFormat
    examples: Sequence[dict[str, str]]
    prefill_think: bool


def _render_r1_zero(messages: Messages, options: RenderOptions) -> str:
    # replace, not str.format: the question may hold braces
    text = R1_ZERO.replace("{prompt}", _single_question(messages, "r1_zero"))
    return f"{text} {options.format.prefill}" if options.prefill_think else text


def _render_chat(messages: Messages, options: RenderOptions) -> str:
    """The released models' layout: no newlines between turns, assistant turns end with the end-of-sentence token."""
    tokenizer = options.tokenizer
    bos, eos = (BOS, EOS) if tokenizer is None else (tokenizer.bos_token or "", tokenizer.eos_token or "")
    parts = [bos]
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant":
            # As the released template does: earlier turns keep the answer and lose the reasoning.
            parts.append(f"{ASSISTANT}{content.split('</think>')[-1]}{eos}")
        else:
            parts.append(content if message["role"] == "system" else f"{USER}{content}")
    parts.append(ASSISTANT)
    return "".join(parts) + (options.format.prefill if options.prefill_think else "")


def _render_few_shot(messages: Messages, options: RenderOptions) -> str:
    """Worked examples, then the problem: what elicits long reasoning from a base model (v1 section 2.3.1)."""
    shots = [
        f"Problem: {example['prompt']}\n"
        f"Solution: {options.format.render(example['reasoning'], 'Summary: ' + example['answer'])}"
        for example in options.examples
    ]
    text = "\n\n".join([*shots, f"Problem: {_single_question(messages, 'few_shot')}\nSolution:"])
    return f"{text} {options.format.prefill}" if options.prefill_think else text


def _render_plain(messages: Messages, options: RenderOptions) -> str:
    text = _single_question(messages, "plain")
    return text + options.format.prefill if options.prefill_think else text


def _render_tokenizer(messages: Messages, options: RenderOptions) -> str:
    tokenizer = options.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError(
            f"prompt template 'tokenizer' needs a tokenizer with a chat_template, got {type(tokenizer).__name__} "
            "without one; use 'chat', 'r1_zero' or 'plain'"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: raise_exception, an undefined name, 1 / 0, ...
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"the tokenizer's chat template fails on it: {cause}") from error
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant":
            content = content.rpartition("</think>")[2]  # R1's template takes the reasoning of earlier turns out
        if content.strip() not in text:
            raise ValueError(
                f"the tokenizer's chat template leaves out the turn of {message['role']!r} {content.strip()[:40]!r}; "
                "put it into another turn, or use another prompt_template"
            )
    # R1-Distill's own template already opens the reasoning.
    wanted = options.prefill_think and not options.format.is_prefilled(text)
    return text + options.format.prefill if wanted else text


@dataclass(frozen=True)
class PromptTemplate:
    """`response_format` is what the prefill, and the examples of few_shot, use when the caller names none."""

    name: str
    render: Callable[[Messages, RenderOptions], str]
    response_format: str


PROMPT_TEMPLATES: dict[str, PromptTemplate] = {
    "r1_zero": PromptTemplate("r1_zero", _render_r1_zero, "think_answer"),
    "chat": PromptTemplate("chat", _render_chat, "think_summary"),
    "few_shot": PromptTemplate("few_shot", _render_few_shot, "special_token"),
    "plain": PromptTemplate("plain", _render_plain, "think_answer"),
    "tokenizer": PromptTemplate("tokenizer", _render_tokenizer, "think_summary"),
}


def render_prompt(
    prompt: str | Messages,
    template: str,
    *,
    tokenizer: Any = None,
    system: str | None = None,
    examples: Sequence[dict[str, str]] | None = None,
    response_format: str | None = None,
    prefill_think: bool = False,
) -> str:
    """The text that the model continues.

    prompt: a question, or chat messages ({"role", "content"}) that end with the user's turn.
    tokenizer: for 'tokenizer' its chat template; for 'chat' its bos and eos tokens (default: DeepSeek's).
    system: a system message, for 'chat' and 'tokenizer', when `prompt` has none.
    examples: for 'few_shot', dicts with prompt, reasoning and answer (default: FEW_SHOT_EXAMPLES).
    response_format: layout of the examples and of the prefill (default: the template's own).
    prefill_think: end the prompt with the opening of the reasoning; rewards then need `prefilled`.
    """
    if template not in PROMPT_TEMPLATES:
        raise _unknown("prompt template", template, PROMPT_TEMPLATES)
    chosen = PROMPT_TEMPLATES[template]
    if system is not None and template not in ("chat", "tokenizer"):
        raise ValueError(
            f"prompt template {template!r} has no system message; use 'chat' or 'tokenizer', or drop system"
        )
    if examples is not None and template != "few_shot":
        raise ValueError(f"prompt template {template!r} takes no examples; use 'few_shot', or drop examples")
    shots = FEW_SHOT_EXAMPLES if examples is None else examples
    for index, example in enumerate(shots):
        if missing := {"prompt", "reasoning", "answer"} - set(example):
            raise ValueError(f"few_shot example {index} lacks {sorted(missing)}, got keys {sorted(example)}")
    layout = get_response_format(response_format or chosen.response_format)
    return chosen.render(_as_messages(prompt, system), RenderOptions(tokenizer, layout, shots, prefill_think))


def _as_messages(prompt: str | Messages, system: str | None) -> Messages:
    messages: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {index} must be a dict with role and content (text), got {message!r:.120}")
        if message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"message {index} has role {message.get('role')!r}, expected system, user or assistant")
    if not messages or messages[-1]["role"] != "user":
        roles = [message["role"] for message in messages]
        raise ValueError(f"a prompt must end with a user message, got roles {roles}; move the last turn to the target")
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _single_question(messages: Messages, template: str) -> str:
    if len(messages) != 1:
        roles = [message["role"] for message in messages]
        raise ValueError(f"prompt template {template!r} takes one user message, got roles {roles}; use 'chat'")
    return messages[0]["content"]


def _unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    near = get_close_matches(name, list(known), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}, expected one of {sorted(known)}{hint}")
