"""The command line: a recipe, what is to be done with it, and overrides in every form that other trainers have.

    mine.yaml  --config mine.yaml                     the recipe
    zero.beta=0  --zero.beta=0  --zero.beta 0         an override, `stages.zero.beta` and `stages.0.beta` too
    --zero.router_replay                              true: of an option that is true or false

Everything that is wrong here ends in one line and exit status 2, before torch is imported.
"""

import argparse
import os
import re
import sys
from functools import cache
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any, NoReturn

from r1fast.config import RECIPES, error_lines, shown
from r1fast.explain import help_text, options_of, topics
from r1fast.unknown_keys import FLAGS, VALUED
from r1fast.wording import did_you_mean

_HELP = ("--help", "-h")
_KEY = re.compile(r"(--)?[A-Za-z0-9_][^=]*")
_ABOUT = {
    "--config": "a recipe by name or a YAML file, as the first argument is",
    "--output-dir": "run directory (default: runs/<recipe>-<time>)",
    "--stages": "run only these stages of the recipe, a,b",
    "--resume": "continue the run in --output-dir (default: runs/latest)",
    "--accept-changes": "with --resume: go on though files or models were changed",
    "--dry-run": "check everything, print the resolved recipe and what it takes, and stop",
    "--version": "print the versions of r1fast and torch, and stop",
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        say(f"{message[:500]}; --help lists the options")
        sys.exit(2)


class Once(argparse.Action):
    """An option with a value that may not be empty, and not be given twice."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if not values:
            parser.error(f"{option_string} is empty")
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} is given twice")
        setattr(namespace, self.dest, values)


class Help(argparse.Action):
    """--help of the command line, --help TOPIC of the options of a stage or a section."""

    def __call__(self, parser: argparse.ArgumentParser, _: Any, topic: Any, *others: Any) -> NoReturn:
        width = min(max(get_terminal_size((100, 24)).columns, 60), 120)
        if topic is not None and topic not in topics():
            near = did_you_mean(topic[:80], topics())
            parser.error(f"--help: nothing is called {topic[:80]!r}{near}; known: {', '.join(topics())}")
        print_and_exit(usage(parser) if topic is None else help_text(topic, width))


class Version(argparse.Action):
    """Worked out when asked for; torch is not imported."""

    def __call__(self, *_: Any) -> NoReturn:
        from importlib.metadata import version

        import r1fast

        print_and_exit(f"r1fast {getattr(r1fast, '__version__', '(not installed)')}, torch {version('torch')}")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the overrides as `key=value`; ends the process where they make no sense."""
    parser = Parser(prog="torchrun -m r1fast.train", allow_abbrev=False, add_help=False)
    parser.add_argument("-h", "--help", action=Help, nargs="?")
    for name in VALUED:
        parser.add_argument(name, action=Once)
    for name in FLAGS:
        if name == "--version":
            parser.add_argument(name, action=Version, nargs=0)
        else:
            parser.add_argument(name, action="store_true")
    options, recipes, overrides = _sort(argv, parser)
    args = parser.parse_args(options)
    if len(recipes) > 1:
        parser.error(f"two recipes: {shown(recipes[0])!r} and {shown(recipes[1])!r} (an override is key=value)")
    if recipes and args.config is not None:
        parser.error(f"two recipes: {shown(recipes[0])!r} and --config {shown(args.config)}")
    args.config = recipes[0] if recipes else args.config
    args.output_dir = None if args.output_dir is None else Path(args.output_dir)
    if args.accept_changes and not args.resume:
        parser.error("--accept-changes goes with --resume: a new run has nothing to compare with")
    return args, overrides


def _sort(argv: list[str], parser: Parser) -> tuple[list[str], list[str], list[str]]:
    """Arguments of the parser, recipes, and overrides as key=value."""
    options: list[str] = []
    recipes: list[str] = []
    overrides: list[str] = []
    left = list(argv)
    while left:
        token = left.pop(0)
        name, is_joined, value = token.partition("=")
        if name in (*FLAGS, *VALUED, *_HELP):
            is_next_option = bool(left) and left[0].partition("=")[0] in (*FLAGS, *VALUED, *_HELP)
            takes_next = not is_joined and name not in FLAGS and left and not is_next_option
            name = "--help" if name == "-h" else name
            # With "=", so that a value may begin with a dash.
            options.append(f"{name}={left.pop(0)}" if takes_next else token)
        elif is_joined and _KEY.fullmatch(name) and not _is_path(token):
            overrides.append(f"{name.removeprefix('--')}={value}")
        elif not is_joined and name.startswith("--") and _KEY.fullmatch(name):
            overrides.append(f"{name[2:]}={_value(name, left, parser)}")
        elif token.startswith(("-", "+", "~")) or (is_joined and not _is_path(token)) or not token:
            parser.error(f"{shown(token)!r} is neither an option nor an override key.sub=value")
        else:
            recipes.append(token)
    return options, recipes, overrides


def _is_path(token: str) -> bool:
    """Of a YAML file in a folder whose name has an equals sign."""
    return token.endswith((".yaml", ".yml")) and "/" in token.partition("=")[0]


def _value(name: str, left: list[str], parser: Parser) -> str:
    """What `--name` is set to: the next argument, which is taken; true of a flag."""
    after = left[0] if left else None
    if name.split(".")[-1].lstrip("-") in _flags() and after not in ("true", "false"):
        return "true"
    if after is None or re.match("--[A-Za-z]|-h$", after):
        near = did_you_mean(name, (*VALUED, *FLAGS))
        parser.error(f"{shown(name)} has no value{near}")
    return left.pop(0)


@cache
def _flags() -> frozenset[str]:
    """Names of options that are true or false."""
    options = [option for topic in topics() for option in options_of(topic)]
    return frozenset(option.name.split(".")[-1] for option in options if option.type == "true or false")


def usage(parser: argparse.ArgumentParser) -> str:
    """What --help prints: the command, recipes, options, overrides, topics."""
    recipes = {path.stem: _first_words(path) for path in sorted(RECIPES.glob("*.yaml"))}
    return "\n".join([
        f"{parser.prog} [RECIPE] [options] [overrides]",
        "Train a model through the DeepSeek-R1 recipe, or through any part of it.",
        "",
        "recipes (or a YAML file; default: tiny)",
        *(f"  {name:20} {about}" for name, about in recipes.items()),
        "",
        "options",
        *(f"  {name + (' VALUE' if name in VALUED else ''):20} {about}" for name, about in _ABOUT.items()),
        "  --help [TOPIC]       this text, or every option of a kind of stage or of a section:",
        *wrap(", ".join(topics()), 110, initial_indent=" " * 23, subsequent_indent=" " * 23),
        "",
        "overrides, the last of two wins; --resume takes those of unfinished stages",
        "  zero.max_steps=20    of the stage that is called zero; also --zero.max_steps 20, --zero.max_steps=20,",
        "                       stages.zero.max_steps=20 and stages.0.max_steps=20 (the first stage)",
        "  model.path=DIR       of a section, which comes before a stage of that name",
    ])  # fmt: skip


def _first_words(path: Path) -> str:
    """Of the comment that a recipe begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    comment = " ".join(line.removeprefix("#").strip() for line in lines[:count])
    return shown(re.split(r"\. |: | \(", comment)[0].rstrip("."))


def print_and_exit(text: str) -> NoReturn:
    print(text, flush=True)  # here, where a pipe that is closed can be told
    sys.exit(0)


def is_main() -> bool:
    """Before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str, go_on: str = "") -> None:
    """One rank speaks: a line for each mistake; go_on ends the last."""
    if is_main():
        print("\n".join(error_lines(message)) + go_on, file=sys.stderr)
