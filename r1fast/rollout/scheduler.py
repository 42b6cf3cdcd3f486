"""The rows that decode together: finished ones leave at once, waiting ones enter.

queue    p3 p4 ...     prompts; the samples of a prompt enter one by one as rows and blocks become free
prefill  p0 p1 p2      new prompts, packed; their blocks are written once
enter    p0 p0 p1 ...  a row holds the full blocks of its prompt together with its sisters, and has the last,
                       partly filled one as a copy (the last sample: itself), beside the blocks for what it will sample
decode   o o x o x o   one token per row and step
leave    o o   o   o   stopped rows give back their blocks; on a GPU every eighth step, which is a wait for it

What a step reads and writes (input_batch.py, the outputs, the cache) stays where it is: on a GPU graphs.py runs them.

blocks   |prompt 0   |prompt 0   |tail, sample 0|sample 0|      16 tokens each
                                 |tail, sample 1|sample 1|
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from r1fast.models.cache import BlockCache
from r1fast.models.decoder import Decoder
from r1fast.rollout.blocks import BlockPool
from r1fast.rollout.fast_decode import fast_decode
from r1fast.rollout.fused_decode import FusedDecode
from r1fast.rollout.graphs import StepGraphs
from r1fast.rollout.input_batch import InputBatch, RowState, RowViews, width_of
from r1fast.rollout.sampling import SampledTokens, SamplingParams, fold_in
from r1fast.rollout.texts import Watcher
from r1fast_kernels import sample_tokens, selective_logprobs
from r1fast_kernels.decode_attention import BLOCK
from r1fast_kernels.products import linear

SYNC_STEPS = {"cpu": 1}  # steps between looks at the stop flags
DEVICE_SYNC_STEPS = 8  # elsewhere: each look waits for the device
ENTER_ABOVE = 1 / 8  # share of free rows at which waiting samples enter: a prefill of few tokens costs as many launches


def num_blocks_of(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK)


@dataclass
class SequenceGroup:
    """A distinct prompt and the samples of it that wait: (index in the output, key of the noise)."""

    ids: list[int]
    waiting: deque[tuple[int, int]] = field(default_factory=deque)
    blocks: list[int] = field(default_factory=list)  # while samples wait
    logits_1V: Tensor | None = None
    experts_PLK: np.ndarray | None = None

    @property
    def num_full(self) -> int:
        return len(self.ids) // BLOCK

    def num_own(self, max_tokens: int) -> int:
        """Blocks that a sample has for itself. The last token is sampled, but never fed."""
        return num_blocks_of(len(self.ids) + max_tokens - 1) - self.num_full


@dataclass
class _Sequence:
    index: int  # in the output
    key: int
    line: int  # of the buffers
    prompt: SequenceGroup
    blocks: list[int]
    begun: int  # its tokens less the steps run, when it entered: as long as it lives, it has begun + steps
    num_seen: int = 0  # tokens, by the watcher


@dataclass(frozen=True)
class Limits:
    num_blocks: int  # of the cache
    max_rows: int  # at a time
    max_num_batched_tokens: int  # of a prefill; longer prompts come in parts


class Scheduler:
    """Samples what waits in `prompts`. graphs: of the steps; the last block is then that of their padding. watcher: is
    shown all tokens at each look at the stop flags, and may end rows there."""

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[SequenceGroup],
        params: SamplingParams,
        stop_ids: list[int],
        limits: Limits,
        *,
        record_experts: bool,
        graphs: StepGraphs | None,
        watcher: Watcher | None = None,
    ) -> None:
        self.model, self.params, self.limits, self.graphs, self.watcher = model, params, limits, graphs, watcher
        self.queue = deque(prompts)
        self.decoder = fast_decode(model) or model  # C++ or fused, or the modules
        weight_VD = model.embed_tokens.weight
        self.device = weight_VD.device
        self.cache = BlockCache(model.config, limits.num_blocks, weight_VD.dtype, self.device)
        self.pool = BlockPool(limits.num_blocks if graphs is None else limits.num_blocks - 1)
        self.is_stop_V = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=self.device)
        self.is_stop_V[self._int64(stop_ids)] = True
        # One column more: rows that have stopped, but not yet left, write there.
        self.ids_RS = torch.zeros(limits.max_rows, params.max_tokens + 1, dtype=torch.int64, device=self.device)
        self.logprobs_RS = torch.zeros(self.ids_RS.shape, device=self.device)
        self.experts_RSLK: Tensor | None = None
        if record_experts:
            shape = (*self.ids_RS.shape, sum(1 for _ in model.moe_layers()), model.config.num_experts_per_tok)
            self.experts_RSLK = torch.zeros(shape, dtype=torch.int16, device=self.device)
        self.free_lines = list(range(limits.max_rows - 1, -1, -1))
        self.running: list[_Sequence] = []
        self.num_steps = 0
        table_width = max(prompt.num_full + prompt.num_own(params.max_tokens) for prompt in prompts)
        self.rows = InputBatch(limits.max_rows, table_width, limits.num_blocks - 1, self.device)

    def run(self) -> Iterator[tuple[int, SampledTokens]]:
        """Each sample with its index, when it has left."""
        with self.decoder.stacked() if isinstance(self.decoder, FusedDecode) else nullcontext():
            yield from self._run_all()

    def _run_all(self) -> Iterator[tuple[int, SampledTokens]]:
        sync_steps = SYNC_STEPS.get(self.device.type, DEVICE_SYNC_STEPS)
        addresses = self._addresses()
        while self.queue or self.running:
            while self.queue and len(self.free_lines) >= self.limits.max_rows * ENTER_ABOVE and self._enter():
                yield from self._leave()  # the first token may be the last
            assert self.running or not self.queue, "a sample that does not fit into the empty cache"
            longest = max((sequence.begun for sequence in self.running), default=0)
            for _ in range(sync_steps if self.running else 0):
                width = width_of(num_blocks_of(longest + self.num_steps), self.rows.block_table_RN.shape[1])
                if self.graphs is None:
                    self._step(len(self.running), width)
                else:
                    self.graphs.run(self._step, len(self.running), width)
                self.num_steps += 1
            yield from self._leave()
        assert self._addresses() == addresses, "parameters moved: graphs read where they were"

    # ---- entering ----

    def _enter(self) -> bool:
        """False where no sample finds its blocks."""
        prompts, entering = self._admit()
        if not entering:
            return False
        for some in _packs(prompts, self.limits.max_num_batched_tokens):
            self._prefill(some)
        self._copy_tails(entering)
        self._sample_first(entering)
        for prompt in {id(sequence.prompt): sequence.prompt for sequence in entering}.values():
            if not prompt.waiting:
                self.pool.free(prompt.blocks)
                prompt.logits_1V = None
        return True

    def _admit(self) -> tuple[list[SequenceGroup], list[_Sequence]]:
        """The prompts to prefill, and the samples that enter, as far as rows and blocks allow."""
        prompts: list[SequenceGroup] = []
        entering: list[_Sequence] = []
        while self.queue and self.free_lines:
            prompt = self.queue[0]
            own = prompt.num_own(self.params.max_tokens)
            if not prompt.blocks:
                if num_blocks_of(len(prompt.ids)) + own > self.pool.num_free:
                    break
                prompt.blocks = self.pool.allocate(num_blocks_of(len(prompt.ids)))
                prompts.append(prompt)
            while prompt.waiting and self.free_lines and own <= self.pool.num_free:
                index, key = prompt.waiting.popleft()
                # The last sample has the last block to itself, and needs no copy.
                shared = prompt.blocks[: prompt.num_full] if prompt.waiting else prompt.blocks[: prompt.num_full + own]
                self.pool.add_reference(shared)
                rest = self.pool.allocate(prompt.num_full + own - len(shared))
                begun = len(prompt.ids) + 1 - self.num_steps
                entering.append(_Sequence(index, key, self.free_lines.pop(), prompt, shared + rest, begun))
            if prompt.waiting:
                break
            self.queue.popleft()
        return prompts, entering

    def _prefill(self, prompts: list[SequenceGroup]) -> None:
        """Packed; of a prompt that is longer than a prefill may be, the rest follows, a row for each token."""
        most = self.limits.max_num_batched_tokens
        heads = [prompt.ids[:most] for prompt in prompts]
        ends_P = torch.tensor([len(ids) for ids in heads]).cumsum(0)
        last_P = (ends_P - 1).to(self.device)
        slots_T = torch.cat([self._slots(prompt.blocks, len(ids)) for prompt, ids in zip(prompts, heads)])
        logits_PV, experts_TLK = self._run(
            self.decoder,
            self._int64([i for ids in heads for i in ids]),
            torch.nn.functional.pad(ends_P, (1, 0)).to(self.device, torch.int32),
            cache=(self.cache, slots_T),
            head=lambda hidden_TD, weight_VD: linear(hidden_TD[last_P], weight_VD),
        )
        for p, (prompt, end, ids) in enumerate(zip(prompts, ends_P.tolist(), heads)):
            prompt.logits_1V = logits_PV[p : p + 1]
            if experts_TLK is not None:
                prompt.experts_PLK = experts_TLK[end - len(ids) : end].cpu().numpy()
            for start in range(most, len(prompt.ids), most):
                self._prefill_part(prompt, start, prompt.ids[start : start + most])

    def _prefill_part(self, prompt: SequenceGroup, start: int, ids: list[int]) -> None:
        """By the modules: in every layer all rows are written before any is read."""
        table_1N = torch.tensor([prompt.blocks], dtype=torch.int32, device=self.device)
        prompt.logits_1V, experts_TLK = self._run(
            self.model.decode,
            self._int64(ids),
            torch.arange(start, start + len(ids), device=self.device),
            self.cache,
            table_1N.expand(len(ids), -1),
            head=lambda hidden_TD, weight_VD: linear(hidden_TD[-1:], weight_VD),
        )
        if prompt.experts_PLK is not None and experts_TLK is not None:
            prompt.experts_PLK = np.concatenate([prompt.experts_PLK, experts_TLK.cpu().numpy()])

    def _run(self, run: Callable[..., Any], *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Logits, and the experts of each token as int16 [tokens, L, K] where they are recorded."""
        if self.experts_RSLK is None:
            return run(*args, **options), None
        logits, routing = run(*args, **options, with_routing=True)
        return logits, routing.expert_ids.to(torch.int16)

    def _copy_tails(self, entering: list[_Sequence]) -> None:
        """The last block of a prompt, unless it is full, goes on differently in each sample."""
        partial = [sequence for sequence in entering if len(sequence.prompt.ids) % BLOCK]
        pairs = [(x.prompt.blocks[x.prompt.num_full], x.blocks[x.prompt.num_full]) for x in partial]
        if copied := [(source, target) for source, target in pairs if source != target]:
            self.cache.copy_blocks(*map(self._int64, zip(*copied)))

    def _sample_first(self, entering: list[_Sequence]) -> None:
        width, more = self.rows.block_table_RN.shape[1], self.params.max_tokens - 2
        rows = self.rows.put(
            len(self.running),
            [RowState(x.line, x.key, len(x.prompt.ids), len(x.prompt.ids) + more, live=1) for x in entering],
            [sequence.blocks + [0] * (width - len(sequence.blocks)) for sequence in entering],
        )
        self._sample(rows, torch.cat([cast(Tensor, sequence.prompt.logits_1V) for sequence in entering]))
        self.running += entering

    # ---- decoding ----

    def _step(self, num_rows: int, width: int) -> None:
        """A token for each of the first rows, of at most `width` blocks. A graph repeats what this launches: only
        tensors may hold what changes from step to step, only such as stay, and nothing may wait for the device."""
        rows = self.rows.span(0, num_rows, width)
        # The position of the token sampled last; a row that has stopped at the end of its blocks stays in them.
        position_B = torch.minimum(rows.next_B - 1, rows.last_B)
        logits_BV, experts_BLK = self._run(self.decoder.decode, rows.id_B, position_B, self.cache, rows.block_table_BN)
        if self.experts_RSLK is not None and experts_BLK is not None:
            self.experts_RSLK[rows.line_B, self._column(rows, rows.num_sampled_B - 1)] = experts_BLK
        self._sample(rows, logits_BV)

    def _sample(self, rows: RowViews, logits_BV: Tensor) -> None:
        """The next token of each row, and where it stands then. In place."""
        params, min_tokens = self.params, self.params.min_tokens
        banned_BV = (rows.num_sampled_B < min_tokens)[:, None] & self.is_stop_V if min_tokens else None
        ids_B, logprobs_B = sample_tokens(
            logits_BV if banned_BV is None else logits_BV.masked_fill(banned_BV, -torch.inf),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seeds_B=fold_in(rows.key_B, rows.next_B),
        )
        if banned_BV is not None:
            # The trainer knows nothing of the ban: its log-prob, and so the ratio, is that of the distribution without.
            temperature = params.temperature or 1.0
            logprobs_B = cast(Tensor, selective_logprobs(logits_BV, ids_B, temperature=temperature))
        column_B = self._column(rows, rows.num_sampled_B)
        self.ids_RS[rows.line_B, column_B] = ids_B
        self.logprobs_RS[rows.line_B, column_B] = logprobs_B
        rows.id_B.copy_(ids_B)
        rows.next_B.add_(rows.live_B)
        rows.num_sampled_B.add_(rows.live_B)
        rows.live_B.mul_(~(self.is_stop_V[ids_B] | (rows.num_sampled_B == params.max_tokens)))

    def _column(self, rows: RowViews, count_B: Tensor) -> Tensor:
        return count_B.where(rows.live_B.bool(), self.params.max_tokens)

    # ---- leaving ----

    def _leave(self) -> Iterator[tuple[int, SampledTokens]]:
        """The rows that have stopped. The one host read of a step."""
        rows = self.rows.span(0, len(self.running))
        live = rows.live_B.tolist()
        if self.watcher is None and all(live):
            return
        counts = rows.num_sampled_B.tolist()
        if self.watcher is not None:
            self._show(self.watcher, rows, live, counts)
        if all(live):
            return
        leaving = [(sequence, count) for sequence, count, lives in zip(self.running, counts, live) if not lives]
        lines_B, most = self._int64([sequence.line for sequence, _ in leaving]), max(count for _, count in leaving)
        ids, logprobs = (x_RS[lines_B, :most].tolist() for x_RS in (self.ids_RS, self.logprobs_RS))
        routed_BSLK = None if self.experts_RSLK is None else self.experts_RSLK[lines_B, :most].cpu().numpy()
        for b, (sequence, count) in enumerate(leaving):
            experts = sequence.prompt.experts_PLK
            if experts is not None and routed_BSLK is not None:
                experts = np.concatenate([experts, routed_BSLK[b, : count - 1]])
            yield sequence.index, SampledTokens(ids[b][:count], logprobs[b][:count], experts)
            self.pool.free(sequence.blocks)
            self.free_lines.append(sequence.line)
        positions = [position for position, lives in enumerate(live) if lives]
        self.rows.keep(positions, len(self.running))
        self.running = [self.running[position] for position in positions]

    def _show(self, watcher: Watcher, rows: RowViews, live: list[int], counts: list[int]) -> None:
        """New tokens; `live` and `counts` become those of rows that end with them, or before."""
        seen = [sequence.num_seen for sequence in self.running]
        most = max((count - known for count, known in zip(counts, seen, strict=True)), default=0)
        columns_BS = self._int64(seen)[:, None] + torch.arange(most, device=self.device)
        ids = self.ids_RS[rows.line_B[:, None], columns_BS.clamp(max=self.params.max_tokens)].tolist()
        for position, sequence in enumerate(self.running):
            new = ids[position][: counts[position] - sequence.num_seen]
            sequence.num_seen = counts[position]
            kept = watcher.see(sequence.index, new, has_ended=not live[position])
            if kept is not None:
                live[position], counts[position] = 0, kept

    def _addresses(self) -> list[int]:
        return [] if self.graphs is None else [param.data_ptr() for param in self.model.parameters()]

    def _int64(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _slots(self, blocks: list[int], num_tokens: int) -> Tensor:
        return (self._int64(blocks)[:, None] * BLOCK + torch.arange(BLOCK, device=self.device)).flatten()[:num_tokens]


def _packs(prompts: list[SequenceGroup], max_tokens: int) -> list[list[SequenceGroup]]:
    """In order, as many as fit into max_tokens together, at least one."""
    packs: list[list[SequenceGroup]] = []
    room = 0
    for prompt in prompts:
        if not packs or len(prompt.ids) > room:
            packs.append([])
            room = max_tokens
        packs[-1].append(prompt)
        room -= len(prompt.ids)
    return packs
