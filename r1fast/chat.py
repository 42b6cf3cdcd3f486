"""python -m r1fast.chat MODEL: talk to a model in the terminal, asked as it was trained.

On a terminal an answer appears while it is sampled, its reasoning dim, and Ctrl-C ends the answer, not the program.
Where input or output is none, each line of the input is a question of its own, and what follows the reasoning is
printed, nothing else: echo "What is 2 + 3 ?" | python -m r1fast.chat runs/mine
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from r1fast import asking
from r1fast.data.templates import RESPONSE_FORMATS, Messages, ResponseFormat
from r1fast.rollout.engine import RolloutEngine

HELP = """/reset         forget the conversation
/system TEXT   change the system turn; without a text there is none
/save FILE     write the conversation as a line of JSON, {"messages": [..]}
/exit          leave, as Ctrl-D does; Ctrl-C ends an answer"""
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal would obey
_COMMAND = re.compile(r"/[a-z]+")
_TAIL = 16  # tokens of a prompt in which it may open the reasoning


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m r1fast.chat", description="Talk to a model, asked as it was trained. On a terminal:",
        epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", help=asking.SOURCE)
    asking.add_options(parser)
    given = parser.parse_args(arguments)
    try:
        asking.check_device(given.device)
        device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        source = asking.find_model(given.model)
        conversation = Conversation(asking.load(source, given.dtype, device), given)
        if sys.stdin.isatty() and sys.stdout.isatty():
            talk(conversation, Console(highlight=False, markup=False), source.description)
        else:
            answer_lines(conversation, sys.stdin)
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


@dataclass
class Reasoning:
    """Tells the reasoning of an answer from what follows it, while it comes."""

    layout: ResponseFormat | None  # whose opening the prompt holds; None: the answer may open it itself
    text: str = ""

    @classmethod
    def after(cls, prompt_text: str) -> "Reasoning":
        return cls(next((x for x in RESPONSE_FORMATS.values() if x.is_prefilled(prompt_text)), None))

    def add(self, piece: str) -> tuple[str, str]:
        """What of the piece is reasoning, and what is not."""
        before, self.text = len(self.text), self.text + piece
        end = max(before, self.end)
        return self.text[before:end], self.text[end:]

    @property
    def end(self) -> int:
        """Characters of the text that are reasoning, tags included."""
        layout, begin = self.layout, 0
        if layout is None:
            begun = self.text.lstrip()
            layout = next((x for x in RESPONSE_FORMATS.values() if _may_begin(begun, x.think_open)), None)
            if layout is None:
                return 0
            begin = len(self.text) - len(begun) + len(layout.think_open)
        close = self.text.find(layout.think_close, begin)
        return len(self.text) if close < 0 else close + len(layout.think_close)


def _may_begin(text: str, opening: str) -> bool:
    return text.startswith(opening) or opening.startswith(text)


@dataclass
class Answer:
    text: str
    reasoning: Reasoning
    note: str  # how it ended, where not by itself

    @property
    def visible(self) -> str:
        return self.text[self.reasoning.end :].strip()


class Conversation:
    """Turns so far and how the next is sampled. Raises ValueError where the model cannot be asked."""

    def __init__(self, engine: RolloutEngine, given: argparse.Namespace) -> None:
        assert engine.tokenizer is not None
        self.engine, self.tokenizer, self.given = engine, engine.tokenizer, given
        self.params = asking.params_of(given, engine)
        self.messages: Messages = []
        self.num_answers = 0
        self.system: str | None = None
        self.set_system(given.system)
        turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
        self.single = ""  # why turns do not follow each other
        try:
            self._encode(turns)
        except ValueError as error:
            self.single = str(error)

    def set_system(self, text: str | None) -> None:
        """ValueError, and nothing is changed, where the model's template takes none."""
        before, self.system = self.system, text or None
        try:
            self._encode([{"role": "user", "content": "a"}])
        except ValueError:
            self.system = before
            raise

    def with_system(self, turns: Messages) -> Messages:
        return turns if self.system is None else [{"role": "system", "content": self.system}, *turns]

    def ask(self, question: str, on_piece: Callable[[str, str], object] = lambda *_: None) -> Answer:
        """on_piece: called with reasoning and the rest of each piece. An interrupt ends the answer.

        ValueError for a question that finds no room, which then was not asked.
        """
        if self.single:
            self.messages = []
        turns = [*self.messages, {"role": "user", "content": question}]
        ids = self._encode(turns)
        if (room := self.engine.longest - len(ids)) < 1:
            what = "the question has" if len(turns) == 1 else "the conversation has"
            advice = "shorten it" if len(turns) == 1 else "/reset begins anew"
            raise ValueError(f"{what} {len(ids):,} tokens, and the model takes {self.engine.longest:,}; {advice}")
        most = min(self.params.max_tokens, room)
        params = replace(self.params, max_tokens=most, seed=self.params.seed + self.num_answers)
        reasoning = Reasoning.after(str(self.tokenizer.decode(ids[-_TAIL:], skip_special_tokens=False)))
        note = ""
        try:
            ((found,),) = self.engine.generate([ids], params, on_text=lambda *x: on_piece(*reasoning.add(x[-1])))
            if found.finish_reason == "length":
                limit = "the model has room for no more" if most < self.params.max_tokens else "--max-tokens"
                note = f"cut after {most:,} tokens: {limit}"
        except KeyboardInterrupt:
            note = "stopped"
        self.num_answers += 1
        opening = reasoning.layout.think_open if reasoning.layout is not None else ""
        if reasoning.text.strip():  # a turn that says nothing would teach the model to do so again
            self.messages = [*turns, {"role": "assistant", "content": opening + reasoning.text}]
        return Answer(reasoning.text, reasoning, note)

    def _encode(self, turns: Messages) -> list[int]:
        return asking.prompt_ids(self.with_system(turns), self.tokenizer, self.given)


def answer_lines(conversation: Conversation, lines: Iterable[str]) -> None:
    """Each line is asked alone. ValueError names the line that cannot be."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        conversation.messages = []
        try:
            answer = conversation.ask(line.strip())
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if answer.note == "stopped":
            raise KeyboardInterrupt
        print(answer.visible, flush=True)
        if answer.note:
            print(f"line {number}: {answer.note}", file=sys.stderr)


def talk(conversation: Conversation, console: Console, description: str, read: Callable[[str], str] = input) -> None:
    """Until the end of the input. read: shows its argument and returns a line."""
    with suppress(ImportError):
        import readline  # noqa: F401  input() then has a history, where Python was built with it
    console.print(Text(f"model: {description}; /help lists what is no question", style="dim"), soft_wrap=True)
    if conversation.single:
        console.print(Text("each question is asked alone, as the model's template takes no turns", style="dim"))
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print(Text("\nCtrl-D or /exit leaves", style="dim"))
            continue
        try:
            if _COMMAND.fullmatch(line.split(" ", 1)[0]):
                if line == "/exit":
                    return
                console.print(Text(_command(conversation, *line.split(" ", 1)), style="dim"), soft_wrap=True)
            elif line:
                _show(conversation, line, console)
        except (ValueError, OSError, FloatingPointError) as error:
            console.print(Text(str(error), style="red"), soft_wrap=True)  # a path stays whole


def _show(conversation: Conversation, question: str, console: Console) -> None:
    def on_piece(*parts: str) -> None:
        for part, style in zip(parts, ("dim", ""), strict=True):
            shown = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", part)
            console.print(Text(shown, style=style), end="", soft_wrap=True)

    answer = conversation.ask(question, on_piece)
    console.print()
    if note := answer.note or ("" if answer.text.strip() else "the model says nothing"):
        console.print(Text(f"[{note}]", style="dim"))


def _command(conversation: Conversation, name: str, argument: str = "") -> str:
    """What it says. ValueError for what cannot be done."""
    argument = argument.strip()
    if name == "/help":
        return HELP
    if name == "/reset":
        conversation.messages = []
        return "the conversation begins anew"
    if name == "/system":
        conversation.set_system(argument)
        return "the system turn is changed" if argument else "there is no system turn"
    if name == "/save":
        if not argument:
            raise ValueError("/save FILE")
        path = Path(argument).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                turns = conversation.with_system(conversation.messages)
                file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
        except FileExistsError:
            raise ValueError(f"{path} is there already; choose another file") from None
        return f"written to {path}"
    raise ValueError(f"{name} is no command\n{HELP}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # who read the output has seen enough: | head
        os._exit(0)
