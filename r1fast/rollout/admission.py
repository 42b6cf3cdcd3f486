"""Which samples run, and in which blocks of the cache. Bookkeeping alone: scheduler.py has the tensors.

    queue     p1: s3*  p2: s4* s5 s6  p3: ..     in the order of age; * has run before, and is recomputed when it enters
    running   s0 s1 s2                           older than all that waits

    enter     the oldest that wait, while their expected need fits beside that of those that run
    grow      every row has blocks for the steps until the next look, and gets more, a block at a time
    preempt   where there is none left, the youngest row gives its blocks back, and is again the first that waits
    leave     a finished one gives back its blocks

    cache     |s0 s0 s0 s0 s1 s1 s1 s1 s2 s2 s2 . . .|      . free, and expected to be needed
    later     |s0 s0 s0 s0 s1 s1 s1 s1 s2 s2 s2 s0 s1 s2|   full: s2 goes back
              |s0 s0 s0 s0 s1 s1 s1 s1 . . . s0 s1 .|       s0 and s1 go on

**Expected need.** A sample is expected to take E tokens, or those that it has where they are more. E is the number of
tokens sampled in this call so far, over that of the samples that have ended: the likeliest mean where a sample may end
at any token alike, in which those that still run have their part. A first guess, START of max_tokens, counts as one
that has ended. Too low an E costs work done twice, too high a one rows that stay empty. More for samples that are past
E saves few preemptions, and costs as many steps (docs/LOG.md).

**Nobody starves.** The oldest row is never preempted while another runs, and alone it always fits (engine.py): it ends,
and the next one is the oldest.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from r1fast.rollout.blocks import BlockPool
from r1fast_kernels.decode_attention import BLOCK

ENTER_ABOVE = 1 / 8  # share of free rows at which waiting samples enter: a prefill of few tokens costs as many launches
START = 1 / 4  # of max_tokens: what a sample is expected to take while none has ended


def num_blocks_of(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK)


@dataclass(eq=False)
class Sample:
    index: int  # in the output
    key: int  # of the noise
    prompt: "SequenceGroup"
    line: int = -1  # of the output buffers, from when it first enters until it leaves
    blocks: list[int] = field(default_factory=list)
    num_sampled: int = 0  # tokens, when it was preempted last
    begun: int = 0  # its tokens less the steps run, when it entered: while it lives, it has begun + steps
    num_seen: int = 0  # tokens, by the watcher


@dataclass(eq=False)
class SequenceGroup:
    """A distinct prompt and the samples of it that wait, those first that have run before."""

    ids: list[int]
    waiting: deque[Sample] = field(default_factory=deque)
    num_running: int = 0
    blocks: list[int] = field(default_factory=list)  # of the prompt, held until all that wait have entered
    logits_1V: Tensor | None = None  # as long as a sample waits that has not run
    experts_PLK: np.ndarray | None = None

    @property
    def num_full(self) -> int:
        return len(self.ids) // BLOCK

    def num_own(self, num_tokens: int) -> int:
        """Blocks that a sample of so many tokens has for itself. The last token is sampled, but never fed."""
        return num_blocks_of(len(self.ids) + num_tokens - 1) - self.num_full

    @property
    def has_new(self) -> bool:
        return bool(self.waiting) and not self.waiting[-1].num_sampled


class Admission:
    """Of the samples that wait in `prompts`. steps: between two looks at who has ended."""

    def __init__(
        self, prompts: Iterable[SequenceGroup], max_tokens: int, num_blocks: int, max_rows: int, steps: int
    ) -> None:
        self.queue = deque(prompts)
        self.max_tokens, self.max_rows, self.steps = max_tokens, max_rows, steps
        self.ahead = max(steps, BLOCK)  # steps that a row has blocks for, after it entered or grew
        self.pool = BlockPool(num_blocks)
        self.running: list[Sample] = []  # from old to young
        self.holding: list[SequenceGroup] = []  # those with blocks of their own
        self.free_lines = list(range(max_rows - 1, -1, -1))
        self.num_steps = self.num_tokens = self.num_ended = self.num_preempted = 0
        self.enough = 0  # up to this step all rows have blocks
        self.is_full = False  # the next sample did not fit, and since then none has left

    # ---- what is expected ----

    @property
    def expected_tokens(self) -> int:
        tokens = START * self.max_tokens + self.num_tokens
        return min(self.max_tokens, round(tokens / (1 + self.num_ended)))

    def num_sampled(self, sample: Sample) -> int:
        """Of one that runs and has not ended."""
        return sample.begun + self.num_steps - len(sample.prompt.ids)

    def _own(self, sample: Sample, num_sampled: int, expected: int = 0) -> int:
        """Blocks for itself: for the steps ahead, or also for what is expected."""
        return sample.prompt.num_own(min(max(num_sampled + self.ahead, expected), self.max_tokens))

    # ---- entering ----

    def enter(self) -> tuple[list[SequenceGroup], list[Sample]]:
        """The prompts to prefill, and the samples that enter: behind those that run, first those that have run before.
        None enter while nearly all rows are taken."""
        prompts: list[SequenceGroup] = []
        entering: list[Sample] = []
        if self.running and (self.is_full or self.max_rows - len(self.running) < self.max_rows * ENTER_ABOVE):
            return prompts, entering
        expected = self.expected_tokens
        spoken_for = sum(
            max(0, self._own(x, self.num_sampled(x), expected) + x.prompt.num_full - len(x.blocks))
            for x in self.running
        )
        room = self.pool.num_free - spoken_for
        while self.queue and len(self.running) < self.max_rows:
            prompt = self.queue[0]
            sample = prompt.waiting[0]
            more = 0 if prompt.blocks or prompt.num_running else num_blocks_of(len(prompt.ids))
            now, later = (self._own(sample, max(1, sample.num_sampled), x) for x in (0, expected))
            if more + later > room and (self.running or not self._has_room(more + now, prompt)):
                self.is_full = bool(self.running)
                break
            room -= more + later
            if more:
                prompts.append(prompt)
            self._take(sample, more, now)
            entering.append(sample)
        return prompts, entering

    def _has_room(self, num_blocks: int, prompt: SequenceGroup) -> bool:
        """For the only one to run: nothing is kept for others."""
        for other in [x for x in self.holding if x is not prompt]:
            self._release(other)
        return num_blocks <= self.pool.num_free

    def _take(self, sample: Sample, num_prompt: int, num_own: int) -> None:
        prompt = sample.prompt
        if num_prompt:
            self._hold(prompt, self.pool.allocate(num_prompt))
        elif not prompt.blocks:  # of a sample that runs: its last one may have more than the prompt in it
            sister = next(x for x in self.running if x.prompt is prompt)
            prompt.blocks = sister.blocks[: num_blocks_of(len(prompt.ids))]
            self.pool.add_reference(prompt.blocks)
            self.holding.append(prompt)
        prompt.waiting.popleft()
        # Who comes last has the last block to itself, and needs no copy.
        is_last = not prompt.waiting and self.pool.num_references(prompt.blocks[-1]) == 1
        shared = prompt.blocks[: prompt.num_full + num_own if is_last else prompt.num_full]
        self.pool.add_reference(shared)
        sample.blocks = shared + self.pool.allocate(prompt.num_full + num_own - len(shared))
        if sample.line < 0:
            sample.line = self.free_lines.pop()
            self.num_tokens += 1
        sample.begun = len(prompt.ids) + max(1, sample.num_sampled) - self.num_steps
        self.running.append(sample)
        prompt.num_running += 1
        if not prompt.waiting:
            self.queue.popleft()

    def entered(self, entering: Iterable[Sample]) -> None:
        """Their prompts are computed and copied: who waits for more samples holds its blocks."""
        for prompt in {id(x.prompt): x.prompt for x in entering}.values():
            if not prompt.has_new:
                prompt.logits_1V = None
            if not prompt.waiting:
                self._release(prompt)

    def _hold(self, prompt: SequenceGroup, blocks: list[int]) -> None:
        prompt.blocks = blocks
        self.holding.append(prompt)

    def _release(self, prompt: SequenceGroup) -> None:
        self.pool.free(prompt.blocks)
        prompt.blocks = []
        self.holding.remove(prompt)

    # ---- running ----

    def step(self) -> None:
        """One more token of each row."""
        self.num_steps += 1
        self.num_tokens += len(self.running)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, the one that was sampled last included."""
        return max(x.begun for x in self.running) + self.num_steps

    def grow(self) -> list[tuple[int, int, list[int]]]:
        """Blocks for the steps until the next look, oldest rows first: (row, how many it had, those that it got). Rows
        behind the last of `running` have been preempted."""
        if self.num_steps + self.steps <= self.enough:
            return []
        self.enough = self.num_steps + self.ahead
        grown = []
        row = 0
        while row < len(self.running):
            x = self.running[row]
            had = len(x.blocks)
            more = x.prompt.num_full + self._own(x, self.num_sampled(x)) - had
            while more > self.pool.num_free and row < len(self.running):
                self._make_room()
            if more > 0 and row < len(self.running):
                new = self.pool.allocate(more)
                x.blocks += new
                grown.append((row, had, new))
            row += 1
        return grown

    def _make_room(self) -> None:
        """What nobody reads goes first: a prompt that is kept for samples that wait is computed again in an instant."""
        unread = [prompt for prompt in self.holding if not prompt.num_running]
        for prompt in unread:
            self._release(prompt)
        if not unread:
            assert len(self.running) > 1, "a sample that does not fit into the empty cache"
            self._preempt()

    def _preempt(self) -> None:
        """The youngest row: the first of all that wait."""
        x = self.running[-1]
        x.num_sampled = self.num_sampled(x)
        self._stop(x)
        x.prompt.waiting.appendleft(x)
        if not self.queue or self.queue[0] is not x.prompt:
            self.queue.appendleft(x.prompt)
        self.num_preempted += 1

    def leave(self, sample: Sample) -> None:
        self._stop(sample)
        self.free_lines.append(sample.line)
        self.num_ended += 1
        self.is_full = False

    def _stop(self, sample: Sample) -> None:
        self.running.remove(sample)
        self.pool.free(sample.blocks)
        sample.blocks = []
        sample.prompt.num_running -= 1
