"""The rows that decode together: finished ones leave at once, waiting ones enter.

queue    p3 p4 ...     prompts; the samples of a prompt enter one by one as rows and blocks become free (admission.py)
prefill  p0 p1 p2      new prompts, packed; their blocks are written once
enter    p0 p0 p1 ...  a row holds the full blocks of its prompt together with its sisters, and has the last,
                       partly filled one as a copy (the last sample: itself), beside blocks for some tokens
decode   o o x o x o   one token per row and step
leave    o o   o   o   stopped rows give back their blocks; on a GPU every eighth step, which is a wait for it
grow     o+o   o+  -   the others get blocks for the steps that follow; with none left the youngest waits again

What a step reads and writes (input_batch.py, the outputs, the cache) stays where it is: on a GPU graphs.py runs them.

blocks   |prompt 0   |prompt 0   |tail, sample 0|sample 0|      16 tokens each
                                 |tail, sample 1|sample 1|

A row that was preempted has lost its keys and values, and nothing else: the tokens, log-probs and experts that it has
stand in its line of the outputs. When it enters again its tokens are fed anew, in the way in which they were, and it
goes on with the noise of its next position.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from r1fast.models.cache import BlockCache
from r1fast.models.decoder import Decoder
from r1fast.models.layers import HeadFn
from r1fast.rollout.admission import Admission, Sample, SequenceGroup, num_blocks_of
from r1fast.rollout.fast_decode import FastDecode, fast_decode
from r1fast.rollout.fused_decode import FusedDecode
from r1fast.rollout.graphs import StepGraphs
from r1fast.rollout.input_batch import InputBatch, RowState, RowViews, width_of
from r1fast.rollout.needs import rows_of_part
from r1fast.rollout.sampling import SampledTokens, SamplingParams, fold_in
from r1fast.rollout.texts import Watcher
from r1fast_kernels import sample_tokens, selective_logprobs
from r1fast_kernels.decode_attention import BLOCK
from r1fast_kernels.products import linear

logger = logging.getLogger("r1fast")
SYNC_STEPS = {"cpu": 1}  # steps between looks at the stop flags
DEVICE_SYNC_STEPS = 8  # elsewhere: each look waits for the device


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
        steps = SYNC_STEPS.get(model.embed_tokens.weight.device.type, DEVICE_SYNC_STEPS)
        num_blocks = limits.num_blocks if graphs is None else limits.num_blocks - 1
        self.admission = Admission(prompts, params.max_tokens, num_blocks, limits.max_rows, steps)
        self.part = rows_of_part(limits.max_rows, limits.max_num_batched_tokens)
        self.decoder = fast_decode(model) or model  # C++ or fused, or the modules
        weight_VD = model.embed_tokens.weight
        self.device = weight_VD.device
        self.cache = BlockCache(model.config, limits.num_blocks, weight_VD.dtype, self.device)
        self.is_stop_V = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=self.device)
        self.is_stop_V[self._int64(stop_ids)] = True
        # One column more: rows that have stopped, but not yet left, write there.
        self.ids_RS = torch.zeros(limits.max_rows, params.max_tokens + 1, dtype=torch.int64, device=self.device)
        self.logprobs_RS = torch.zeros(self.ids_RS.shape, device=self.device)
        self.experts_RSLK: Tensor | None = None
        if record_experts:
            shape = (*self.ids_RS.shape, sum(1 for _ in model.moe_layers()), model.config.num_experts_per_tok)
            self.experts_RSLK = torch.zeros(shape, dtype=torch.int16, device=self.device)
        self.table_width = max(prompt.num_full + prompt.num_own(params.max_tokens) for prompt in prompts)
        self.rows = InputBatch(limits.max_rows, self.table_width, limits.num_blocks - 1, self.device)

    @property
    def running(self) -> list[Sample]:
        return self.admission.running

    def run(self) -> Iterator[tuple[int, SampledTokens]]:
        """Each sample with its index, when it has left."""
        for _ in self.decoder.stacking() if isinstance(self.decoder, FusedDecode) else (None,):
            yield from self._run_all()

    def _run_all(self) -> Iterator[tuple[int, SampledTokens]]:
        addresses = self._addresses()
        while self.admission.queue or self.running:
            self._grow()
            while self._enter():
                yield from self._leave()  # the first token may be the last
            assert self.running or not self.admission.queue, "a sample that does not fit into the empty cache"
            for _ in range(self.admission.steps if self.running else 0):
                shape = len(self.running), width_of(num_blocks_of(self.admission.longest), self.table_width)
                if self.graphs is None:
                    self._step(*shape)
                else:
                    self.graphs.run(self._step, *shape)
                self.admission.step()
            yield from self._leave()
        assert self._addresses() == addresses, "parameters moved: graphs read where they were"
        if count := self.admission.num_preempted:
            logger.info("generation: the cache was full, %d rows were preempted and computed again", count)

    def _grow(self) -> None:
        num_rows = len(self.running)
        grown = self.admission.grow()
        if len(self.running) < num_rows:
            self.rows.keep(range(len(self.running)), num_rows)
        self.rows.add_blocks(grown)

    # ---- entering ----

    def _enter(self) -> bool:
        """False where no sample finds its blocks."""
        prompts, entering = self.admission.enter()
        for some in _packs(prompts, self.limits.max_num_batched_tokens):
            self._prefill(some)
        if entering:
            self._copy_tails(entering)
            self._recompute([x for x in entering if x.num_sampled])
            self._begin(entering)
            self.admission.entered(entering)
        return bool(entering)

    def _prefill(self, prompts: list[SequenceGroup]) -> None:
        """Packed; of a prompt that is longer than a prefill may be, the rest follows, a row for each token."""
        most, part = self.limits.max_num_batched_tokens, self.part
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
            logits_1V = logits_PV[p : p + 1]
            experts = [] if experts_TLK is None else [experts_TLK[end - len(ids) : end].cpu().numpy()]
            for start in range(most, len(prompt.ids), part):
                ids_T = self._int64(prompt.ids[start : start + part])
                logits_1V, more_TLK = self._decode_part(ids_T, start, prompt.blocks, _of_last)
                experts += [] if more_TLK is None else [more_TLK.cpu().numpy()]
            if prompt.logits_1V is None:
                prompt.logits_1V = logits_1V
            if prompt.experts_PLK is None and experts:  # those of the first time stay
                prompt.experts_PLK = np.concatenate(experts)

    def _decode_part(self, ids_T: Tensor, start: int, blocks: list[int], head: HeadFn) -> tuple[Tensor, Tensor | None]:
        """Tokens of a sequence from place `start` on, a row for each. Not in C++: in every layer all rows are written
        before any is read."""
        end = start + len(ids_T)
        table_1N = torch.tensor([blocks[: num_blocks_of(end)]], dtype=torch.int32, device=self.device)
        places_T = torch.arange(start, end, device=self.device)
        decode = self.model.decode if isinstance(self.decoder, FastDecode) else self.decoder.decode
        return self._run(decode, ids_T, places_T, self.cache, table_1N.expand(len(ids_T), -1), head=head)

    def _run(self, run: Callable[..., Any], *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Logits, and the experts of each token as int16 [tokens, L, K] where they are recorded."""
        if self.experts_RSLK is None:
            return run(*args, **options), None
        logits, routing = run(*args, **options, with_routing=True)
        return logits, routing.expert_ids.to(torch.int16)

    def _copy_tails(self, entering: list[Sample]) -> None:
        """The last block of a prompt, unless it is full, goes on differently in each sample."""
        partial = [x for x in entering if len(x.prompt.ids) % BLOCK]
        pairs = [(x.prompt.blocks[x.prompt.num_full], x.blocks[x.prompt.num_full]) for x in partial]
        if copied := [(source, target) for source, target in pairs if source != target]:
            self.cache.copy_blocks(*map(self._int64, zip(*copied)))

    def _recompute(self, samples: list[Sample]) -> None:
        """The keys and values of what they have sampled, but for the last token, which the next step feeds. In C++ step
        by step, as the first time: the same bits. Else all tokens of a sample together: the same ops, whose products
        have other numbers of rows."""
        if not isinstance(self.decoder, FastDecode):
            for x in samples:
                for start in range(0, x.num_sampled - 1, self.part):
                    ids_T = self.ids_RS[x.line, start : min(start + self.part, x.num_sampled - 1)]
                    self._decode_part(ids_T, len(x.prompt.ids) + start, x.blocks, _of_none)
            return
        rows = [(x.line, len(x.prompt.ids), x.num_sampled - 1) for x in samples]
        table_BN = torch.tensor(self._tables(samples), dtype=torch.int32)
        for count in range(max((fed for *_, fed in rows), default=0)):
            row_B = self._int64([row for row, (*_, fed) in enumerate(rows) if fed > count])
            line_B, begin_B, _ = self._int64(rows)[row_B].unbind(1)
            self.decoder.decode(self.ids_RS[line_B, count], begin_B + count, self.cache, table_BN[row_B])

    def _begin(self, entering: list[Sample]) -> None:
        """Rows of their own: those that go on where they were, and behind them those whose first token is sampled."""
        first, most = len(self.running) - len(entering), self.params.max_tokens
        states = [
            RowState(x.line, x.key, len(x.prompt.ids) + x.num_sampled, len(x.prompt.ids) + most - 2, x.num_sampled, 1)
            for x in entering
        ]
        self.rows.put(first, states, self._tables(entering))
        again = [x for x in entering if x.num_sampled]
        rows = self.rows.span(first, first + len(again))
        rows.id_B.copy_(self.ids_RS[rows.line_B, rows.num_sampled_B - 1])
        if new := entering[len(again) :]:
            logits_BV = torch.cat([cast(Tensor, x.prompt.logits_1V) for x in new])
            self._sample(self.rows.span(first + len(again), len(self.running)), logits_BV)

    def _tables(self, samples: list[Sample]) -> list[list[int]]:
        return [x.blocks + [0] * (self.table_width - len(x.blocks)) for x in samples]

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
            logprobs_B = cast(Tensor, selective_logprobs(logits_BV, ids_B, temperature=temperature)).float()
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
        leaving = [(sample, count) for sample, count, lives in zip(self.running, counts, live) if not lives]
        lines_B, most = self._int64([sample.line for sample, _ in leaving]), max(count for _, count in leaving)
        ids, logprobs = (x_RS[lines_B, :most].tolist() for x_RS in (self.ids_RS, self.logprobs_RS))
        routed_BSLK = None if self.experts_RSLK is None else self.experts_RSLK[lines_B, :most].cpu().numpy()
        for b, (sample, count) in enumerate(leaving):
            experts = sample.prompt.experts_PLK
            if experts is not None and routed_BSLK is not None:
                experts = np.concatenate([experts, routed_BSLK[b, : count - 1]])
            yield sample.index, SampledTokens(ids[b][:count], logprobs[b][:count], experts)
        self.rows.keep([position for position, lives in enumerate(live) if lives], len(self.running))
        for sample, _ in leaving:
            self.admission.leave(sample)

    def _show(self, watcher: Watcher, rows: RowViews, live: list[int], counts: list[int]) -> None:
        """New tokens; `live` and `counts` become those of rows that end with them, or before."""
        seen = [sample.num_seen for sample in self.running]
        most = max((count - known for count, known in zip(counts, seen, strict=True)), default=0)
        columns_BS = self._int64(seen)[:, None] + torch.arange(most, device=self.device)
        ids = self.ids_RS[rows.line_B[:, None], columns_BS.clamp(max=self.params.max_tokens)].tolist()
        for position, sample in enumerate(self.running):
            new = ids[position][: counts[position] - sample.num_seen]
            sample.num_seen = counts[position]
            kept = watcher.see(sample.index, new, has_ended=not live[position])
            if kept is not None:
                live[position], counts[position] = 0, kept

    def _addresses(self) -> list[int]:
        return [] if self.graphs is None else [param.data_ptr() for param in self.model.parameters()]

    def _int64(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _slots(self, blocks: list[int], num_tokens: int) -> Tensor:
        return (self._int64(blocks)[:, None] * BLOCK + torch.arange(BLOCK, device=self.device)).flatten()[:num_tokens]


def _of_last(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
    return linear(hidden_TD[-1:], weight_VD)


def _of_none(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
    return hidden_TD[:0]


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
