"""How many tokens a stage's sequences have, for the memory estimate: its files, encoded as the stage will encode them.

Of rows that a stage of the run is still to make, and where there is no tokenizer yet, only bounds are known.
"""

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from r1fast.artifacts import inputs_of
from r1fast.data.packing import balance, pack
from r1fast.preflight_models import origin, tokenizer_of
from r1fast.read_once import rows_of
from r1fast.schema import DistillStage, PretrainStage, Recipe, RewardModelStage
from r1fast.schema_options import EpochOptions, FitOptions, GenerateOptions, SampleOptions, StageBase, TrainFilesOptions
from r1fast.stages.packed import encode_examples, encode_prompts, of_step
from r1fast.stages.pretrain import tokenizer_of_rows, visited
from r1fast.stages.reward_model import encode_units
from r1fast.stages.train_rows import choose_rows, tested_key

MOST_ROWS, MOST_STEPS = 4_000, 1_000  # that are looked at


class Lengths:
    """Of the stages of a recipe; prompts are encoded, and tokenizers trained, once."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._tokenizer_from = cache(self._find_tokenizer)
        self._known: dict[tuple[str, str], list[dict] | None] = {}  # rows of a stage's option
        self._longest: dict[Any, int] = {}  # prompt, by files and how they are rendered

    def prompt(self, stage: GenerateOptions, keys: Sequence[str] = ("train_files", "eval_files")) -> int:
        """Tokens of the longest prompt of these files, at most max_prompt_length."""
        named = {found.key for found in inputs_of(self.recipe, stage) if found.rows == "prompts"}
        longest = [self._longest_of(stage, key) for key in keys if key in named]
        known = [length for length in longest if length is not None]
        if not known or len(known) < len(longest):
            return stage.max_prompt_length
        return min(stage.max_prompt_length, max(known))

    def _longest_of(self, stage: GenerateOptions, key: str) -> int | None:
        rows, tokenizer = self._rows(stage.name, key), self._tokenizer(stage.name)
        if not rows or tokenizer is None:
            return None
        refs = [found.ref for found in inputs_of(self.recipe, stage) if found.key == key]
        how = stage.prompt_template, stage.response_format, stage.prefill_think, repr(stage.chat_template_kwargs)
        asked = (id(tokenizer), *refs, *how)
        if asked not in self._longest:
            prompts = encode_prompts(_some(rows), tokenizer, stage)
            self._longest[asked] = max(len(ids) for ids, _ in prompts)
        return self._longest[asked]

    def files(self, stage: StageBase, key: str) -> dict[str, int | None]:
        """Rows of each file of an option; None where the run is still to make them."""
        found: dict[str, int | None] = {}
        for one in inputs_of(self.recipe, stage):
            if one.key == key and one.rows is not None:
                found[one.ref] = None if one.stage is not None else len(rows_of(one.ref, one.rows))
        return found

    def num_rows(self, stage: StageBase, key: str) -> int:
        """Very many, where they are still to be made."""
        rows = self._rows(stage.name, key)
        return MOST_ROWS if rows is None else len(rows)

    def batches(self, stage: FitOptions, num_ranks: int) -> tuple[int, int, int]:
        """The most tokens of a micro-batch, micro-batches of a rank in a step, and tokens of a step."""
        seed, room = self.recipe.seed if stage.seed is None else stage.seed, stage.max_tokens_per_microbatch
        units = [min(length, room) for length in self._units(stage)]
        steps = stage.updates_on(len(units)) if isinstance(stage, EpochOptions) else stage.num_updates()
        assert steps is not None, "pretrain says how many"
        tokens, count, total = [0], [0], [0]
        for step in range(min(steps, MOST_STEPS)):
            chosen = [units[i] for i in of_step(step, len(units), stage.batch_size, seed)]
            total.append(sum(chosen))
            for indices in balance(chosen, num_ranks):
                mine = [chosen[i] for i in indices]
                packs = pack(mine, room)
                tokens += [sum(mine[i] for i in members) for members in packs]
                count.append(len(packs))
        return max(tokens), max(count), max(total)

    def _units(self, stage: FitOptions) -> list[int]:
        """Inputs of each row."""
        rows, tokenizer = self._rows(stage.name, "train_files"), self._tokenizer(stage.name)
        if rows is None or tokenizer is None or (isinstance(stage, DistillStage) and stage.teacher is not None):
            together = 2 if isinstance(stage, RewardModelStage) and stage.loss == "pairwise" else 1
            return [together * (min(stage.max_length, self._longest_made(stage)) - 1)] * stage.batch_size
        if isinstance(stage, PretrainStage):
            rows = visited(stage, rows, self.recipe.seed if stage.seed is None else stage.seed)
        return _encoded(stage, rows, tokenizer)

    def _longest_made(self, stage: FitOptions) -> int:
        """Tokens of a row of train_files, some of which this stage or an earlier one samples."""
        tokenizer, lengths = self._tokenizer(stage.name), [0]
        for found in inputs_of(self.recipe, stage):
            maker = stage if found.rows == "prompts" else found.stage and self.recipe.stage(found.stage)
            if found.key != "train_files":
                continue
            if isinstance(maker, SampleOptions):
                lengths.append(self.prompt(maker, ["train_files"]) + maker.max_completion_length)
            elif maker is None and tokenizer is not None and found.rows is not None:
                lengths.append(max(_encoded(stage, rows_of(found.ref, found.rows), tokenizer)) + 1)
            else:
                return stage.max_length
        return max(lengths)

    def _rows(self, name: str, key: str) -> list[dict] | None:
        """All rows, of train_files those that are not left out; None where the run still makes some of them."""
        if (name, key) not in self._known:
            self._known[name, key] = self._read(name, key)
        return self._known[name, key]

    def _read(self, name: str, key: str) -> list[dict] | None:
        stage = self.recipe.stage(name)
        files = [found for found in inputs_of(self.recipe, stage) if found.key == key]
        if any(found.stage is not None for found in files):
            return None
        try:
            rows = [row for one in files if one.rows is not None for row in rows_of(one.ref, one.rows)]
        except (ValueError, OSError):  # of a stage that is not to be run: preflight has read the others
            return None
        if key != "train_files" or not isinstance(stage, TrainFilesOptions) or not stage.leaves_out:
            return rows
        compared = tested_key(stage)
        tested = [] if compared is None else self._rows(name, compared)
        kind = files[0].rows
        return rows if tested is None or kind is None else choose_rows(stage, kind, rows, tested)[0]

    def _tokenizer(self, name: str) -> Tokenizer | None:
        source = origin(self.recipe, self.recipe.stage(name), of_tokenizer=True)
        return self._tokenizer_from(source if isinstance(source, str) else self.recipe.stages.index(source))

    def _find_tokenizer(self, source: str | int) -> Tokenizer | None:
        if isinstance(source, str):
            return tokenizer_of(source)
        stage = self.recipe.stages[source]
        assert isinstance(stage, PretrainStage)
        rows = self._rows(stage.name, "train_files")
        return None if rows is None else tokenizer_of_rows(rows, stage.vocab_size)


def _encoded(stage: FitOptions, rows: list[dict], tokenizer: Tokenizer) -> list[int]:
    """Inputs of each row, or of so many of them."""
    if isinstance(stage, RewardModelStage):
        units = encode_units(_some(rows), tokenizer, stage)
        return [sum(example.num_inputs for example in unit) for unit in units]
    assert isinstance(stage, GenerateOptions)
    return [example.num_inputs for example in encode_examples(_some(rows), tokenizer, stage)]


def _some(rows: list[dict]) -> list[dict]:
    return rows if len(rows) <= MOST_ROWS else random.Random(0).sample(rows, MOST_ROWS)
